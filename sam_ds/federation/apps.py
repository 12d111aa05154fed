"""The Flower apps: the same two objects run under `deepspeed launch/run_federation.py` and under `flwr run`.

A process that runs the ClientApp keeps one `Worker` with its engines; under Flower's own runtime it is made from the
run config at the first message.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from sam_ds.clients.task import WorkerGroup
from sam_ds.clients.worker import Worker
from sam_ds.config import RunConfig, from_flat
from sam_ds.errors import InputError
from sam_ds.federation.feedback import encode_update
from sam_ds.federation.graphs import follow
from sam_ds.federation.messages import blob_record, result_content, task_of
from sam_ds.federation.methods.registry import METHODS, configured
from sam_ds.federation.run import run_server
from sam_ds.federation.setup import clients_of, corpus_of
from sam_ds.wire.codec import encode
from sam_ds.wire.payload import encode_units

server_app = ServerApp()
client_app = ClientApp()

_worker: Worker | None = None


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or go on with, the federation that the run config describes."""
    run_server(grid, configured(from_flat(context.run_config)))


@client_app.query()
def query(message: Message, context: Context) -> Message:
    """Registration: who this is and what its data look like."""
    worker = worker_for(context)
    client = int(context.node_config["partition-id"])
    asked = message.content["task"]
    if not 0 <= client < len(asked["tiers"]):
        raise InputError(f"partition-id is {client}, the federation has {len(asked['tiers'])} clients: give this node "
                         "another, or raise federation.clients")
    examples, scores, rates = worker.register(client, asked["tiers"][client], asked["trains"])
    content = RecordDict(
        {
            "description": blob_record({"shared/scores": encode(scores), "shared/rates": encode(rates)}),
            "metrics": MetricRecord({"client": client, "num-examples": examples}),
        }
    )
    return Message(content, reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One client's round."""
    worker = worker_for(context)
    graph_LEE, edits = follow(message.content, context.state)
    task = task_of(message.content, graph_LEE)
    result = worker.train(task)
    stays = METHODS[worker.config.method].stays
    sent = {unit: delta for unit, delta in result.deltas.items() if not stays(unit)}
    blobs = encode_update(sent, context.state, worker.config, round_=task.round, client=task.client)
    # What stays with the client is not rounded for a wire that it does not see.
    kept = {unit: delta for unit, delta in result.deltas.items() if stays(unit)}
    blobs |= encode_units(kept, base_round=task.round)
    return Message(result_content(result, blobs, task.round, edits), reply_to=message)


def set_worker(worker: Worker) -> None:
    """Use this worker in this process: the launcher makes it before the first message."""
    global _worker
    _worker = worker


def worker_for(context: Context) -> Worker:
    """This process's worker, made at the first message where no launcher did."""
    if _worker is None:
        set_worker(_lone_worker(configured(from_flat(context.run_config))))
    assert _worker is not None
    return _worker


def _lone_worker(config: RunConfig) -> Worker:
    """A worker on a single rank, for a ClientApp that Flower started."""
    rendezvous = Path(tempfile.mkdtemp()) / "store"
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    corpus = corpus_of(config)
    return Worker(config, Path(config.out) / "base", clients_of(config, corpus), [WorkerGroup([0], dist.group.WORLD)])
