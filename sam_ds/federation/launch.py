"""One rank of `deepspeed launch/run_federation.py`: a worker on every rank, the Flower server app beside rank 0's.

Exit codes: 0 done, 2 bad input, 1 anything else.

When a rank dies, the launcher ends the others: the run goes on with `--resume`, from its last round.
"""

from __future__ import annotations

import argparse
import faulthandler
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from flwr.app import Context, RecordDict

from sam_ds.config import RunConfig, flatten, load_config
from sam_ds.errors import InputError, RunStopped
from sam_ds.federation.apps import client_app, server_app
from sam_ds.federation.grid import DeepSpeedGrid, Mailbox, answering, open_stores, serve
from sam_ds.federation.methods.registry import configured
from sam_ds.federation.ranks import Pods, make_worker, process_group
from sam_ds.federation.run import prepare
from sam_ds.federation.setup import open_run
from sam_ds.federation.supernode.config import tier_of

_GRACE_SECONDS = 60
"""From the end of a run that failed until its ranks must have come home."""


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, run this rank, return the exit code."""
    try:
        config, resume = _configured(arguments)
    except InputError as error:
        print(f"run_federation: {error}", file=sys.stderr)
        return 2
    with process_group(config):
        return _run(config, resume=resume)


def _configured(arguments: Sequence[str]) -> tuple[RunConfig, bool]:
    parser = argparse.ArgumentParser(prog="run_federation.py", description=__doc__)
    parser.add_argument("--config", help="TOML file; see sam_ds/config.py for every key")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one key")
    parser.add_argument("--resume", metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.resume is None:
        return configured(load_config(options.config, options.set)), False
    saved = Path(options.resume) / "config.toml"
    if options.config or not saved.is_file():
        raise InputError(
            f"--resume {options.resume}: "
            + ("it brings its own configuration, leave out --config" if options.config else f"there is no {saved}")
        )
    return load_config(saved, [*options.set, f"out={options.resume}"]), True


def _run(config: RunConfig, *, resume: bool) -> int:
    rank = dist.get_rank()
    # Rank 0 decides for all; the others learn the outcome, so that nobody waits for a rank that has left.
    outcome: list[str | None] = [None, None, None]
    if rank == 0:
        try:
            Pods(config, config.working_tiers)
            out = config.out if resume else str(open_run(config, default_out=RunConfig().out))
            outcome[0] = out
            prepare(replace(config, out=out))
        except (InputError, RunStopped) as error:
            outcome[1:] = str(error), str(_code(error))
    _share(outcome)
    if outcome[1] is not None:
        if rank == 0:
            print(f"run_federation: {outcome[1]}", file=sys.stderr)
        # Rank 0 holds the store: it must not leave before the others have read from it.
        dist.barrier()
        return int(outcome[2] or 2)
    config = replace(config, out=str(outcome[0]))
    pods = Pods(config, config.working_tiers)
    groups = pods.groups()
    server_store, store = open_stores()
    worker = make_worker(pods, list(groups.values()))
    failures: list[BaseException] = []
    thread = None
    if rank == 0:
        assert server_store is not None
        grid = DeepSpeedGrid(
            Mailbox(server_store), config.federation.clients, pods.count,
            lambda message: pods.lanes(tier_of(message, message.metadata.dst_node_id - 1, worker.dealt)),
        )  # fmt: skip
        thread = threading.Thread(target=_serve_app, args=(grid, config, failures), name="server-app")
        thread.start()

    def context(node: int) -> Context:
        facts: dict[str, bool | float | int | str] = {
            "partition-id": node - 1, "num-partitions": config.federation.clients,
        }  # fmt: skip
        return Context(run_id=1, node_id=node, node_config=facts, state=RecordDict(), run_config=flatten(config))

    serve(Mailbox(store), answering(client_app, context), groups[1], groups)
    worker.close()
    if thread is not None:
        thread.join()
    dist.barrier()
    faulthandler.cancel_dump_traceback_later()
    return _code(failures[0]) if failures else 0


def _code(error: BaseException) -> int:
    return 2 if isinstance(error, InputError) else 1


def _serve_app(grid: DeepSpeedGrid, config: RunConfig, failures: list[BaseException]) -> None:
    """The server app's thread: whatever happens, the workers are sent home."""
    try:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=flatten(config))
        server_app(grid, context)
    except BaseException as error:
        if not isinstance(error, InputError | RunStopped):
            traceback.print_exc()
        print(f"run_federation: {error}", file=sys.stderr, flush=True)
        failures.append(error)
        # A rank that hangs in a client's training never takes the message that sends it home; when this one has left,
        # the launcher ends the others.
        faulthandler.dump_traceback_later(_GRACE_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr)
    finally:
        grid.stop()


def _share(outcome: list[str | None]) -> None:
    """Rank 0's list on every rank. Preparing may take long, so this waits on the store, not on a collective."""
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        store.set("sam_ds/outcome", "\0".join(value or "" for value in outcome))
    else:
        store.wait(["sam_ds/outcome"], timedelta(days=1))
        outcome[:] = [value or None for value in store.get("sam_ds/outcome").decode().split("\0")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
