"""The Flower apps: the same two objects run under `deepspeed launch/run_federation.py` and under `flwr run`.

A rank that trains has a `Worker`, and does what `client.py` says. Any other process that runs the ClientApp, as Flower
starts one for every message, passes the message on to the resident worker of its node (`relay.py`): it loads neither
torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

if TYPE_CHECKING:
    from sam_ds.clients.worker import Worker

server_app = ServerApp()
client_app = ClientApp()

_worker: Worker | None = None


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the federation that the run config describes."""
    from sam_ds.config import from_flat
    from sam_ds.federation.methods.registry import configured
    from sam_ds.federation.run import run_server

    run_server(grid, configured(from_flat(context.run_config)))


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Registration: who this is and what its data look like."""
    if _worker is None:
        return _relayed(message, context)
    from sam_ds.federation.client import register

    return register(_worker, message, context)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    if _worker is None:
        return _relayed(message, context)
    from sam_ds.federation import client

    return client.train(_worker, message, context)


def set_worker(worker: Worker) -> None:
    """Use this worker in this process: who starts the ranks makes it before the first message."""
    global _worker
    _worker = worker


def _relayed(message: Message, context: Context) -> Message:
    from sam_ds.federation.relay import relay

    return relay(message, context)
