"""What a client does with a message, on every rank of its worker group: register, or train a round."""

from __future__ import annotations

from typing import Any

from flwr.app import Context, Message

from sam_ds.clients.worker import Worker
from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import fingerprint
from sam_ds.federation.feedback import encode_update
from sam_ds.federation.graphs import follow
from sam_ds.federation.messages import registration_content, result_content, task_of
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.supernode.config import client_of, tier_of
from sam_ds.wire.payload import encode_units


def register(worker: Worker, message: Message, context: Context) -> Message:
    """Registration: who this is, what it can hold, what its data look like. Raises InputError where the client's base
    model is not the server's: its experts would be others."""
    client = client_of(context.node_config)
    asked: dict[str, Any] = dict(message.content["task"])
    if asked["base"] != fingerprint(worker.folder):
        raise InputError(f"the base model in {worker.folder} is not the one that the server has: copy the server's")
    tier = tier_of(message, client, worker.dealt)
    examples, scores, rates = worker.register(client, tier, asked["trains"])
    capacity = worker.config.tiers[tier].experts
    return Message(registration_content(client, tier, capacity, examples, scores, rates), reply_to=message)


def train(worker: Worker, message: Message, context: Context) -> Message:
    """One client's round."""
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
