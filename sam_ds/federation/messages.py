"""What the server and a client say to each other, as Flower records. Tensors are codec blobs; nothing is pickled.

    query    what trains, the base model's fingerprint    -> who, tier, capacity, examples, mean gate scores,
                                                             visit rates
    train    units, graphs, condition, refitted stand-ins,
             the task's scalars                           -> deltas, counters, metrics

How graphs travel is in `graphs.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_to_proto
from numpy.typing import NDArray

from sam_ds.clients.task import Result, Task
from sam_ds.wire.bundle import bundle, unbundle
from sam_ds.wire.codec import CodecError, decode, encode
from sam_ds.wire.payload import STYPE, ByteCount, RejectedUpdate, decode_units

_Record = ArrayRecord | MetricRecord | ConfigRecord
"""What the content of a message may have under a name."""
_BLOBS = "blobs"
_MAX_COUNTER_BYTES = 1 << 26
_MAX_COUNT = 1 << 40
"""Of tokens or examples that one client can have: sums over clients and rounds stay within 64 bits."""


def blob_record(blobs: Mapping[str, bytes | memoryview]) -> ArrayRecord:
    """Blobs by name as one Flower array of our serialisation type."""
    data = bundle(blobs)
    return ArrayRecord({_BLOBS: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def blobs_of(record: _Record) -> dict[str, memoryview]:
    """The blobs of a record. Raises RejectedUpdate for anything that `blob_record` would not have made."""
    if not isinstance(record, ArrayRecord):
        raise RejectedUpdate("corrupt", f"a {type(record).__name__} where arrays were asked for")
    if list(record) != [_BLOBS]:
        raise RejectedUpdate("corrupt", f"{len(record)} arrays where one named {_BLOBS!r} was asked for")
    array = record[_BLOBS]
    if array.stype != STYPE:
        raise RejectedUpdate("corrupt", f"an array of type {array.stype[:40]!r}, not {STYPE!r}")
    try:
        return unbundle(array.data)
    except CodecError as error:
        raise RejectedUpdate("corrupt", str(error)) from None


def message_bytes(message: Message) -> int:
    """Length of the serialised message."""
    return int(message_to_proto(message).ByteSize())


def count_bytes(message: Message, raw: int) -> ByteCount:
    """`raw` bytes of tensors, the bytes of their blobs and names, and of the message around them."""
    encoded = sum(len(a.data) for record in message.content.array_records.values() for a in record.values())
    return ByteCount(raw=raw, encoded=encoded, message=message_bytes(message))


def task_content(task: Task, blobs: Mapping[str, bytes | memoryview]) -> RecordDict:
    """The content of a train message but for the graph; `blobs` are the encoded `task.units`."""
    extra = {}
    if task.condition is not None:
        extra["condition"] = encode(task.condition, base_round=task.round)
    if task.standins is not None:
        extra["standins"] = encode(task.standins, base_round=task.round)
    scalars = ConfigRecord(
        {
            "round": task.round, "client": task.client, "tier": task.tier, "trains": task.trains,
            "held": [expert for layer in task.held for expert in layer],
            "held-per-layer": [len(layer) for layer in task.held],
            "sent": [expert for layer in task.sent for expert in layer],
            "sent-per-layer": [len(layer) for layer in task.sent],
        }
    )  # fmt: skip
    return RecordDict({"units": blob_record(blobs), "extra": blob_record(extra), "task": scalars})


def task_of(content: RecordDict, graph_LEE: NDArray[np.bool_]) -> Task:
    """The inverse of `task_content`, on the client, over its graph."""
    scalars: dict[str, Any] = dict(content["task"])

    def per_layer(name: str) -> tuple[tuple[int, ...], ...]:
        flat = iter(scalars[name])
        return tuple(tuple(islice(flat, size)) for size in scalars[f"{name}-per-layer"])

    extra = blobs_of(content["extra"])
    round_ = scalars["round"]
    return Task(
        round=round_, client=scalars["client"], tier=scalars["tier"], trains=scalars["trains"],
        held=per_layer("held"), sent=per_layer("sent"),
        graph_LEE=graph_LEE,
        condition=decode(extra["condition"])[0] if "condition" in extra else None,
        units=decode_units(blobs_of(content["units"]), base_round=round_),
        standins=decode(extra["standins"])[0] if "standins" in extra else None,
    )  # fmt: skip


def result_content(result: Result, blobs: Mapping[str, bytes | memoryview], round_: int, edits: int) -> RecordDict:
    """The content of a train reply; `blobs` are the encoded `result.deltas`, `edits` what the client's copy of the
    graph holds (`graphs.py`)."""
    counters = {
        f"shared/counters/{layer}": encode(value, base_round=round_) for layer, value in enumerate(result.counters)
    }
    metrics = MetricRecord(
        {
            "num-examples": result.examples, "tokens": result.tokens, "loss-first": result.loss_first,
            "loss-last": result.loss_last, "load-seconds": result.load_seconds,
            "train-seconds": result.train_seconds, "started": result.started, "edits": edits,
        }
    )  # fmt: skip
    return RecordDict({"units": blob_record(blobs), "counters": blob_record(counters), "metrics": metrics})


_RECORDS = ("units", "counters", "metrics")
_METRICS = ("num-examples", "tokens", "loss-first", "loss-last", "load-seconds", "train-seconds", "started",
            "edits")
_LEAST = {"edits": -1}
"""Of the metrics that may be negative (`graphs.UNKNOWN`)."""


def reply_content(reply: Message) -> RecordDict:
    """The content of a train reply, its records there and its metrics numbers of their range. Raises RejectedUpdate."""
    if reply.has_error():
        raise RejectedUpdate("client-failed", str(reply.error.reason)[-500:])
    for name in _RECORDS:
        if name not in reply.content:
            raise RejectedUpdate("missing-unit", f"the record {name!r} was asked for")
    metrics_of(reply.content)
    return reply.content


def metrics_of(content: RecordDict) -> dict[str, int | float]:
    """The metrics of a train reply. Raises RejectedUpdate."""
    metrics = {}
    for name in _METRICS:
        value, least = content["metrics"].get(name), _LEAST.get(name, 0)
        if isinstance(value, float) and not math.isfinite(value):
            raise RejectedUpdate("not-finite", f"the metric {name!r} is {value}")
        if not isinstance(value, int | float) or not least <= value <= _MAX_COUNT:
            raise RejectedUpdate("corrupt", f"the metric {name!r} is {str(value)[:80]}, no number in {least}..2^40")
        metrics[name] = value
    return metrics


def registration_content(
    client: int, tier: str, capacity: int, examples: int, scores_LE: NDArray[np.float32], rates_LE: NDArray[np.float32]
) -> RecordDict:
    """The content of a registration; `capacity`: experts a layer that the client can hold."""
    return RecordDict(
        {
            "description": blob_record({"shared/scores": encode(scores_LE), "shared/rates": encode(rates_LE)}),
            "metrics": MetricRecord({"client": client, "capacity": capacity, "num-examples": examples}),
            "device": ConfigRecord({"tier": tier}),
        }
    )


def registration_of(
    content: RecordDict, shape_LE: tuple[int, ...], dealt: Sequence[tuple[str, int]]
) -> tuple[int, int, NDArray[np.float32], NDArray[np.float32]]:
    """A client's number, its examples, mean gate scores (L, E) and visit rates (L, E), checked: everything later is
    drawn and weighed by them. `dealt`: of every client the tier and the experts it can hold, as the run has them.
    Raises RejectedUpdate."""
    for name, kind in (("metrics", MetricRecord), ("description", ArrayRecord), ("device", ConfigRecord)):
        if not isinstance(content.get(name), kind):
            raise RejectedUpdate("missing-unit", f"the record {name!r} was asked for")
    facts = dict(content["metrics"])
    client, examples = facts.get("client"), facts.get("num-examples")
    if not (isinstance(client, int) and 0 <= client < len(dealt)):
        raise RejectedUpdate("corrupt", f"client {str(client)[:80]} is none of the {len(dealt)}")
    if not (isinstance(examples, int) and 1 <= examples <= _MAX_COUNT):
        raise RejectedUpdate("corrupt", f"client {client} has {str(examples)[:80]} examples")
    device = (content["device"].get("tier"), facts.get("capacity"))
    if device != dealt[client]:
        raise RejectedUpdate("wrong-tier", f"client {client} says tier and experts are {str(device)[:80]}, the run has "
                                           f"{dealt[client]}: start its node with the run's configuration")  # fmt: skip
    blobs, values = blobs_of(content["description"]), []
    for name, low, high in (("scores", -np.inf, np.inf), ("rates", 0.0, 1.0)):
        try:
            value = decode(blobs.get(f"shared/{name}", b""), max_bytes=_MAX_COUNTER_BYTES)[0]
        except CodecError as error:
            raise RejectedUpdate("corrupt", f"{name} of client {client}: {error}") from None
        if value.shape != shape_LE or value.dtype != np.float32:
            raise RejectedUpdate("wrong-shape", f"{name} of client {client} are {value.dtype} {value.shape}")
        if not bool((np.isfinite(value) & (value >= low) & (value <= high)).all()):
            raise RejectedUpdate("corrupt", f"{name} of client {client} are not finite, or no shares")
        values.append(value)
    return client, examples, values[0], values[1]


def counters_of(content: RecordDict, held: tuple[tuple[int, ...], ...], round_: int) -> list[NDArray[np.int64]]:
    """Per layer (3, S, S), checked. Raises RejectedUpdate."""
    blobs = blobs_of(content["counters"])
    values = []
    for layer, experts in enumerate(held):
        name = f"shared/counters/{layer}"
        if name not in blobs:
            raise RejectedUpdate("missing-unit", f"{name} was asked for")
        try:
            value, base_round = decode(blobs[name], max_bytes=_MAX_COUNTER_BYTES)
        except CodecError as error:
            raise RejectedUpdate("corrupt", f"{name}: {error}") from None
        if base_round != round_:
            raise RejectedUpdate("wrong-round", f"{name} is of {base_round}, not {round_}")
        if value.shape != (3, len(experts), len(experts)) or value.dtype != np.int64:
            raise RejectedUpdate("wrong-shape", f"{name} is {value.dtype} {value.shape}")
        if value.min(initial=0) < 0 or value.max(initial=0) > _MAX_COUNT:
            raise RejectedUpdate("corrupt", f"{name} has a count that is negative or above 2^40")
        values.append(value)
    return values
