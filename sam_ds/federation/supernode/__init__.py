"""What a machine with data runs under `flwr run`: a process a message, and the worker behind all of them.

Flower's SuperNode starts a process for every message. There `apps.py`, which has no worker, calls `relay.py`: that
reads the node's own settings (`config.py`), starts the resident worker where there is none, and passes the message to
it through a socket (`frames.py`). On the other side are the ranks of a DeepSpeed launch: each is a `resident.py` that
becomes a `resident_rank.py`; rank 0 keeps the `door.py` at which messages arrive, and hands them to the ranks as the
launcher's grid does. There `apps.py` has a worker, and `client.py` answers.

The relaying side loads no torch, since it pays for its imports with every message: `relay.py`, `frames.py`, `config.py`
and the head of `resident.py` import nothing that does.
"""
