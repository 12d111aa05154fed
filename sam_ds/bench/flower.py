"""What a message costs beside its training: our grid and Flower's simulation, a ClientApp with and without its worker.

`empty`: a client that answers `--parameters` numbers at once, `--clients` messages a round; `grid` is `DeepSpeedGrid`
over two ranks, `simulation` (with `--simulation`) Flower's own, on ray, with as many actors. Seconds of a round, over
its messages.

`process`: what a SuperNode does with every message of a small federation (`--set` changes it): a fresh process runs
the ClientApp. `relay` passes the message on to the resident worker; `alone` loads torch, model and engine itself. The
first message is not counted.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run

from sam_ds.bench.options import check_sizes
from sam_ds.bench.ranks import on_ranks
from sam_ds.clients.task import WorkerGroup
from sam_ds.config import RunConfig, flatten, load_config
from sam_ds.errors import InputError
from sam_ds.federation.grid import DeepSpeedGrid, Mailbox, answering, identify, open_stores, serve
from sam_ds.federation.supernode.relay import private_folder, stop

RANKS = 2
_ROUND = [
    "federation.clients=3", "federation.clients_per_round=3", 'federation.partition="dirichlet"',
    "evaluation.max_tokens=256", "evaluation.test_tokens=256", "runtime.threads=1",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8, help="messages a round of `empty`")
    parser.add_argument("--parameters", type=int, default=1000, help="fp32, each way, of `empty`")
    parser.add_argument("--simulation", action="store_true", help="Flower's own too; needs flwr[simulation]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run of `process`")
    parser.add_argument("--skip", choices=("empty", "process"), help="leave this half out")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a call, the median seconds of a message, of its training, and over it, and CPU seconds of the client's
    process. Ratios of what is over training: simulation / grid, which is the throughput gained, and alone / relay."""
    check_sizes(options, "clients", "parameters")
    spent: dict[str, list[tuple[float, float, float]]] = {}
    if options.skip != "empty":
        seconds = on_ranks(RANKS, _grid, options)
        spent["empty grid"] = [(value / options.clients, 0.0, math.nan) for value in seconds]
        if options.simulation:
            seconds = _simulation(options)
            spent["empty simulation"] = [(value / options.clients, 0.0, math.nan) for value in seconds]
    if options.skip != "process":
        for way in ("relay", "alone"):
            spent[f"process {way}"] = _processes(options, way)
    rows, over = [], {}
    for name, values in spent.items():
        wall, own, cpu = np.median(values, axis=0)
        over[name] = float(np.median([wall - own for wall, own, _ in values]))
        rows.append({
            "call": name, "messages": len(values) * (options.clients if name.startswith("empty") else 1),
            "median_s": float(wall), "training_s": float(own), "over_s": over[name],
            "cpu_s": None if math.isnan(cpu) else float(cpu),
        })  # fmt: skip
    pairs = (("empty simulation", "empty grid"), ("process alone", "process relay"))
    return {"rows": rows, "ratios": {f"{a} / {b}": over[a] / over[b] for a, b in pairs if a in over and b in over}}


# ------------------------------------------------------------------ empty


def _app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def answer(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return app


def _rounds(grid: Grid, options: argparse.Namespace) -> list[float]:
    """Seconds of every round of messages to all clients, after one that is not kept."""
    while len(nodes := list(grid.get_node_ids())) < options.clients:
        time.sleep(0.1)
    seconds = []
    for _ in range(options.rounds + 1):
        array = Array(np.zeros(options.parameters, np.float32))
        messages = [Message(RecordDict({"a": ArrayRecord({"a": array})}), node, "train") for node in nodes]
        began = time.perf_counter()
        assert len(list(grid.send_and_receive(messages))) == len(messages)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def _grid(rank: int, options: argparse.Namespace) -> list[float]:
    server_store, store = open_stores()
    alone = WorkerGroup([rank], [dist.new_group([each]) for each in range(RANKS)][rank])
    identify(rank)
    seconds: list[float] = []
    thread = None
    if server_store is not None:
        grid = DeepSpeedGrid(Mailbox(server_store), options.clients, RANKS)

        def drive() -> None:
            try:
                seconds.extend(_rounds(grid, options))
            finally:
                grid.stop()

        thread = threading.Thread(target=drive)
        thread.start()

    def context(node: int) -> Context:
        return Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})

    serve(Mailbox(store), answering(_app(), context), alone, {1: alone})
    if thread is not None:
        thread.join()
    return seconds


def _simulation(options: argparse.Namespace) -> list[float]:
    from flwr.simulation import run_simulation

    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise InputError("--simulation needs ray: pip install 'flwr[simulation]'") from error
    server, seconds = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seconds.extend(_rounds(grid, options))

    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                               "init_args": {"num_cpus": RANKS}}  # fmt: skip
    run_simulation(server, _app(), options.clients, backend_config=backend)
    return seconds


# ------------------------------------------------------------------ process


def _processes(options: argparse.Namespace, way: str) -> list[tuple[float, float, float]]:
    from sam_ds.federation.run import run_server

    with tempfile.TemporaryDirectory() as folder:
        settings = [*_ROUND, f"federation.rounds={options.rounds}", *options.set, f'out="{folder}/run"']
        config = load_config(None, settings)
        grid = ProcessGrid(config, Path(folder), way)
        identify(0)
        try:
            run_server(grid, config)
        finally:
            stop(private_folder(f"{folder}/worker"))
    return grid.spent[1:]


class ProcessGrid(Grid):
    """A fresh process for every message, as a SuperNode starts one, and each node's context between them."""

    def __init__(self, config: RunConfig, folder: Path, way: str) -> None:
        self.spent: list[tuple[float, float, float]] = []
        """Of each message to train: wall seconds, those that the client loaded and trained, its process's on a CPU."""
        self._folder, self._way, self._messages = folder, way, 0
        self._replies: dict[str, Message] = {}
        self._contexts = {
            node: Context(run_id=1, node_id=node, state=RecordDict(), run_config=flatten(config),
                          node_config={"partition-id": node - 1, "worker": f"{folder}/worker"})
            for node in range(1, config.federation.clients + 1)
        }  # fmt: skip

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            self._messages += 1
            message.metadata.__dict__["_message_id"] = identity = str(self._messages)
            began, cpu = time.perf_counter(), _children_seconds()
            reply = self._answered(message)
            wall, cpu = time.perf_counter() - began, _children_seconds() - cpu
            if message.metadata.message_type == "train":
                said = reply.content["metrics"]
                self.spent.append((wall, float(said["load-seconds"]) + float(said["train-seconds"]), cpu))
            self._replies[identity] = reply
            identities.append(identity)
        return identities

    def _answered(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        files = [self._folder / name for name in ("context", "message")]
        files[0].write_bytes(context_to_proto(self._contexts[node]).SerializeToString())
        files[1].write_bytes(message_to_proto(message).SerializeToString())
        program = [sys.executable, "-m", "sam_ds.bench.flower_process", self._way, str(self._folder)]
        done = subprocess.run(program, capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"a client's process ended with {done.returncode}: {done.stderr[-2000:]}")
        self._contexts[node] = context_from_proto(ProtoContext.FromString(files[0].read_bytes()))
        return message_from_proto(ProtoMessage.FromString(files[1].read_bytes()))

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(identity) for identity in message_ids if identity in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def _children_seconds() -> float:
    """On a CPU, of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
