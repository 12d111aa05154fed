"""A SuperNode's resident worker: model, engines and CUDA context, kept between messages.

`relay.py` starts it at the first message, under the DeepSpeed launcher; on several machines, or to have it warm, an
operator does, with `launch/client_worker.py`. Flower sees one node; behind it the ranks train as under
`launch/run_federation.py`, fed from a socket. Exit codes: 0 done, 2 bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import threading
from collections.abc import Sequence

from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.federation.supernode.config import NodeConfig
from sam_ds.federation.supernode.relay import private_folder, stop


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, run this rank, return the exit code."""
    parser = argparse.ArgumentParser(prog="client_worker.py", description=__doc__)
    parser.add_argument("--config", help="TOML file: the run's, as this node has it")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--tiers", default="", help="of the clients to come, with commas; else all of the run")
    parser.add_argument("--worker", metavar="FOLDER", help="of the socket: the node-config key `worker`")
    parser.add_argument("--owner", type=int, metavar="PID", help="leave when this process has ended")
    parser.add_argument("--stop", action="store_true", help="send the worker of this folder home")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    given = {"worker": options.worker} if options.worker else {}
    try:
        node = NodeConfig(partition_id=0, tiers=options.tiers, **given)
        folder = private_folder(node.worker)
        if options.stop:
            print("stopped" if stop(folder) else f"there is no worker in {folder}")
            return 0
        config = load_config(options.config, options.set)
        _end_with(os.getppid())
        # Only now: a stop or a wrong option need not wait for torch.
        from sam_ds.federation.supernode.resident_rank import serve_rank

        serve_rank(config, node.tiers, folder, options.owner)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"client_worker: {error}", file=sys.stderr)
        return 2
    return 0


def _end_with(launcher: int) -> None:
    """A rank whose launcher was killed would wait for its peers for ever."""
    handle = os.pidfd_open(launcher)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
