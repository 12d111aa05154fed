"""What a message costs beside its training: our grid and Flower's simulation, a ClientApp with and without its worker.

`empty`: a client that answers `--parameters` numbers at once, `--clients` messages a round; `grid` is `DeepSpeedGrid`
over two ranks, `simulation` (with `--simulation`) Flower's own, on ray, with as many actors. Seconds of a round, over
its messages.

`train`, with `--simulation`: the ServerApp and the ClientApp of a tiny federation (`--set` changes it) whose three
clients train every round, on the CPU. `grid` is our launcher with two ranks, `simulation` Flower's own with two actors,
behind which the relay reaches one worker of two ranks: both train two clients at a time. A worker that nobody told how
many ranks to have would be of one, and train them one after the other. Seconds of a round without the server's
evaluation, over its messages; its training is the time in which any client trains.

`process`: what a SuperNode does with every message of that federation, one a round: a fresh process runs the ClientApp.
`relay` passes the message on to the resident worker; `alone` loads torch, model and engine itself, seconds long. Before
the `--rounds` that count both ways answer three registrations and one message that does not.
"""

from __future__ import annotations

import argparse
import math
import os
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

from sam_ds.bench.options import add_rounds, check_sizes
from sam_ds.bench.ranks import on_ranks
from sam_ds.bench.tiny import SETTINGS, write_corpus, write_model
from sam_ds.clients.task import WorkerGroup
from sam_ds.config import RunConfig, flatten, load_config, to_toml
from sam_ds.errors import InputError
from sam_ds.federation.apps import client_app, server_app
from sam_ds.federation.grid import DeepSpeedGrid, LocalGrid, Mailbox, answering, identify, open_stores, serve
from sam_ds.federation.messages import metrics_of
from sam_ds.federation.metrics import read_records
from sam_ds.federation.supernode.relay import free_port, private_folder, stop

RANKS = 2
Seconds = list[tuple[float, float, float]]
"""Of each message: wall, training, and on a CPU in the client's process, or NaN."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clients", type=int, default=8, help="messages a round of `empty`")
    parser.add_argument("--parameters", type=int, default=1000, help="fp32, each way, of `empty`")
    parser.add_argument("--simulation", action="store_true", help="Flower's own too; needs flwr[simulation]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of `train` and `process`")
    parser.add_argument("--skip", choices=("empty", "process"), help="leave this part out")
    add_rounds(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a call, the median seconds of a message, of its training, and over it, and CPU seconds of the client's
    process. Ratios: simulation / grid, which is the throughput gained, and of what is over training alone / relay."""
    check_sizes(options, "clients", "parameters")
    if options.simulation:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise InputError("--simulation needs ray: pip install 'flwr[simulation]'") from error
    spent: dict[str, Seconds] = {}
    if options.skip != "empty":
        spent["empty grid"] = _shared(on_ranks(RANKS, _grid, options), options.clients)
        if options.simulation:
            spent["empty simulation"] = _shared(_simulation(options), options.clients)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", write_corpus(folder / "corpus"))
        if options.simulation:
            spent["train grid"] = _launched(_run_of(options, folder, "grid", clients=3))
            spent["train simulation"] = _simulated(_run_of(options, folder, "simulation", clients=3))
        if options.skip != "process":
            for way in ("relay", "alone"):
                spent[f"process {way}"] = _processes(_run_of(options, folder, way, clients=1), way)
    rows: list[dict[str, Any]] = []
    for call, values in spent.items():
        wall, own, cpu = np.median(values, axis=0)
        rows.append({
            "call": call, "messages": len(values) * {"empty": options.clients, "train": 3}.get(call.split()[0], 1),
            "median_s": float(wall), "training_s": float(own),
            "over_s": float(np.median([wall - own for wall, own, _ in values])),
            "cpu_s": None if math.isnan(cpu) else float(cpu),
        })  # fmt: skip
    of = {row["call"]: row for row in rows}
    pairs = (("empty simulation", "empty grid", "over_s"), ("train simulation", "train grid", "median_s"),
             ("process alone", "process relay", "over_s"))  # fmt: skip
    return {"rows": rows, "ratios": {f"{a} / {b}": of[a][s] / of[b][s] for a, b, s in pairs if a in of and b in of}}


def _shared(rounds: list[float], messages: int) -> Seconds:
    """Of a message of each of these rounds, in which nobody trains."""
    return [(seconds / messages, 0.0, math.nan) for seconds in rounds]


def _run_of(options: argparse.Namespace, folder: Path, name: str, *, clients: int) -> RunConfig:
    """The tiny federation, with so many clients a round; its first round is to be left out."""
    return load_config(None, [
        *SETTINGS, f'model="{folder}/model"', f'data="{folder}/corpus"', "federation.clients=3",
        f"federation.clients_per_round={clients}", 'federation.partition="dirichlet"',
        f"federation.rounds={options.rounds + 1}", *options.set, f'out="{folder}/{name}"',
    ])  # fmt: skip


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
    dist.barrier()  # rank 0 holds the store, and must not leave while another reads from it
    return seconds


def _simulation(options: argparse.Namespace) -> list[float]:
    server, seconds = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seconds.extend(_rounds(grid, options))

    _simulate(server, _app(), options.clients)
    return seconds


def _simulate(server: ServerApp, client: ClientApp, nodes: int) -> None:
    """Flower's simulation of so many nodes, with as many actors as our grid has ranks."""
    from flwr.simulation import run_simulation

    backend: dict[str, Any] = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                               "init_args": {"num_cpus": RANKS}}  # fmt: skip
    run_simulation(server, client, nodes, backend_config=backend)


# ------------------------------------------------------------------ train


def _launched(config: RunConfig) -> Seconds:
    file = Path(f"{config.out}.toml")
    file.write_text(to_toml(config))
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(RANKS), "--master_port", str(free_port()),
        "--module", "sam_ds.federation.launch", "--config", str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    if done.returncode:
        raise InputError(f"the launcher ended with {done.returncode}: {done.stderr[-2000:]}")
    return _trained(config)


def _simulated(config: RunConfig) -> Seconds:
    """The apps get what `flwr run` gives them, as `run_simulation` has no run config; and the worker its ranks."""
    given, worker = flatten(config), f"{config.out}-worker"
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        server_app(grid, Context(context.run_id, context.node_id, context.node_config, context.state, given))

    @client.query()
    @client.train()
    def answer(message: Message, context: Context) -> Message:
        os.environ["DS_ACCELERATOR"] = "cpu"
        node = {**context.node_config, "ranks": RANKS, "worker": worker}
        own = Context(context.run_id, context.node_id, node, context.state, given)
        reply = client_app(message, own)
        context.state = own.state
        return reply

    try:
        _simulate(server, client, config.federation.clients)
    finally:
        stop(private_folder(worker))
    return _trained(config)


def _trained(config: RunConfig) -> Seconds:
    """Of every round but the first, over its messages."""
    rounds = [each for each in read_records(Path(config.out) / "metrics.jsonl")
              if each["kind"] == "round" and each["round"] > 1]  # fmt: skip
    messages = config.federation.clients_per_round
    return [((each["wall_seconds"] - each["evaluation_seconds"]) / messages, each["work_seconds"] / messages, math.nan)
            for each in rounds]  # fmt: skip


# ------------------------------------------------------------------ process


def _processes(config: RunConfig, way: str) -> Seconds:
    folder = Path(f"{config.out}-node")
    folder.mkdir()
    grid = ProcessGrid(config, folder, way)
    identify(0)
    try:
        server_app(grid, Context(1, 0, {}, RecordDict(), flatten(config)))
    finally:
        stop(private_folder(f"{folder}/worker"))
    return grid.spent[1:]


class ProcessGrid(LocalGrid):
    """A fresh process for every message, as a SuperNode starts one, and each node's context between them."""

    def __init__(self, config: RunConfig, folder: Path, way: str) -> None:
        self.spent: Seconds = []
        """Of each message to train; its training is what the client loaded and trained."""
        self._folder, self._way, self._messages = folder, way, 0
        self._replies: dict[str, Message] = {}
        self._contexts = {
            node: Context(run_id=1, node_id=node, state=RecordDict(), run_config=flatten(config),
                          node_config={"partition-id": node - 1, "worker": f"{folder}/worker"})
            for node in range(1, config.federation.clients + 1)
        }  # fmt: skip

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
                said = metrics_of(reply.content)
                self.spent.append((wall, said["load-seconds"] + said["train-seconds"], cpu))
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


def _children_seconds() -> float:
    """On a CPU, of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
