"""What a client can do to its answer: the catalogue of faults, and the updates of clients that are hostile.

A tamper function takes the honest reply (`bench/in_process.py`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord
from numpy.typing import NDArray

from sam_ds.bench.in_process import ClientCrash, Late, Tamper, over_the_wire
from sam_ds.federation.messages import blob_record, blobs_of
from sam_ds.wire.checksum import crc32c
from sam_ds.wire.codec import decode, encode
from sam_ds.wire.header import LENGTH_AT, SHAPE_AT

_NODE_UNAVAILABLE = 5
"""Flower's error code for a SuperNode that has gone."""
_PICKLE = b"cposix\nsystem\n(S'exit 1'\ntR."
"""Whoever opens it runs a command."""
Blobs = dict[str, bytes]
Change = Callable[[Message], Message]
"""A tamper function after which the reply still is one, and comes at once."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How a reply goes wrong, and by which name it must be known."""

    tamper: Tamper
    reason: str = ""
    """Why the client's answer is rejected; empty where it is folded."""
    refused: str = ""
    """Why a further message of it is refused; empty where there is none."""


def replace_blobs(record: str, change: Callable[[Blobs], Mapping[str, bytes]]) -> Change:
    """Change the blobs of a record of the reply."""

    def tamper(reply: Message) -> Message:
        blobs = {name: bytes(blob) for name, blob in blobs_of(reply.content[record]).items()}
        reply.content[record] = blob_record(change(blobs))
        return reply

    return tamper


def change_first(change: Callable[[NDArray[Any], int], bytes]) -> Change:
    """Decode the first expert's first tensor, and encode it again from (values, round)."""

    def first(blobs: Blobs) -> Blobs:
        name = min(name for name in blobs if name.startswith("expert/"))
        value, round_ = decode(blobs[name])
        return blobs | {name: change(value.copy(), round_)}

    return replace_blobs("units", first)


def scaled(factor: float) -> Change:
    """The whole update times a factor; -1 flips its signs."""

    def grow(blobs: Blobs) -> Blobs:
        values = {name: decode(data) for name, data in blobs.items()}
        return {name: encode(np.float32(factor) * value, base_round=round_) for name, (value, round_) in values.items()}

    return replace_blobs("units", grow)


def with_metric(name: str, value: Any) -> Change:
    """Another value of one metric, or None to leave it out."""

    def tamper(reply: Message) -> Message:
        metrics = dict(reply.content["metrics"]) | {name: value}
        reply.content["metrics"] = MetricRecord({n: v for n, v in metrics.items() if v is not None})
        return reply

    return tamper


def without(record: str) -> Change:
    """The reply lacks one of its records."""

    def tamper(reply: Message) -> Message:
        del reply.content[record]
        return reply

    return tamper


def crash(reply: Message) -> Message:
    """The ClientApp raises."""
    raise ClientCrash("CUDA out of memory")


def _poisoned(number: float) -> Change:
    def poison(value: NDArray[Any], round_: int) -> bytes:
        value.flat[-1] = number
        return encode(value, base_round=round_)

    return change_first(poison)


def _dies(reply: Message) -> Message:
    reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(_NODE_UNAVAILABLE, "the node is not available")
    return reply


def _another(reply: Message) -> Message:
    reply.metadata.__dict__["_src_node_id"] += 1
    return reply


def _nobodys(reply: Message) -> Message:
    reply.metadata.__dict__["_reply_to_message_id"] = "../../passwd"
    return reply


def _forged(at: int, number: int) -> Callable[[NDArray[Any], int], bytes]:
    """A number of the header that is made up, with a checksum that fits."""

    def forge(value: NDArray[Any], round_: int) -> bytes:
        blob = bytearray(encode(value, base_round=round_))
        struct.pack_into("<Q", blob, at, number)
        struct.pack_into("<I", blob, 4, crc32c(blob[8:]))
        return bytes(blob)

    return forge


def _flipped(value: NDArray[Any], round_: int) -> bytes:
    blob = bytearray(encode(value, base_round=round_))
    blob[-1] ^= 1
    return bytes(blob)


def _not_given(blobs: Blobs) -> Blobs:
    """Experts of a layer are given ids that the client does not hold."""
    first = min(name for name in blobs if name.startswith("expert/"))
    tensor = first.rsplit("/", 1)[1]
    held = {int(name.split("/")[2]) for name in blobs if name.startswith("expert/0/")}
    return blobs | {f"expert/0/{min(set(range(len(held) + 1)) - held)}/{tensor}": blobs[first]}


def _negative(blobs: Blobs) -> Blobs:
    return {name: encode(-1 - decode(data)[0], base_round=1) for name, data in blobs.items()}


def _flowers_own(reply: Message) -> Message:
    reply.content["units"] = ArrayRecord({"expert/0/0/up": Array(np.zeros(3))})
    return reply


def _without_first(blobs: Blobs) -> Blobs:
    return {name: data for name, data in blobs.items() if name != min(blobs)}


FAULTS = {
    "raises": Fault(crash, "client-failed"),
    "dies": Fault(_dies, "client-failed"),
    "never answers": Fault(lambda reply: None, "no-answer"),
    "answers a round later": Fault(Late, "no-answer", "late"),
    "answers twice": Fault(lambda reply: [reply, reply], refused="duplicate"),
    "answers twice, then otherwise": Fault(lambda reply: [reply, scaled(9)(over_the_wire(reply))], refused="duplicate"),
    "answers in another's name": Fault(_another, "no-answer", "wrong-node"),
    "answers what nobody asked": Fault(_nobodys, "no-answer", "unasked"),
    "an earlier round": Fault(change_first(lambda v, r: encode(v, base_round=r - 1)), "wrong-round"),
    "NaN": Fault(_poisoned(math.nan), "not-finite"),
    "infinity": Fault(_poisoned(-math.inf), "not-finite"),
    "1e31": Fault(_poisoned(1e31), "not-finite"),
    "wrong shape": Fault(change_first(lambda v, r: encode(v[:, 1:], base_round=r)), "wrong-shape"),
    "wrong dtype": Fault(change_first(lambda v, r: encode(v.astype(np.float64), base_round=r)), "wrong-shape"),
    "unknown expert": Fault(replace_blobs("units", lambda b: b | {"expert/0/99/up": b[min(b)]}), "unknown-unit"),
    "an expert it was not given": Fault(replace_blobs("units", _not_given), "unknown-unit"),
    "a path for a name": Fault(replace_blobs("units", lambda b: b | {"../../passwd": b[min(b)]}), "unknown-unit"),
    "a unit left out": Fault(replace_blobs("units", _without_first), "missing-unit"),
    "no unit": Fault(replace_blobs("units", lambda b: {}), "missing-unit"),
    "a flipped bit": Fault(change_first(_flipped), "corrupt"),
    "a truncated blob": Fault(change_first(lambda v, r: encode(v, base_round=r)[:-1]), "corrupt"),
    "a length of 10 GB": Fault(change_first(_forged(LENGTH_AT, 10**10)), "corrupt"),
    "a shape of 10 GB": Fault(change_first(_forged(SHAPE_AT, 10**10)), "wrong-shape"),
    "counters of 10 GB": Fault(
        replace_blobs("counters", lambda b: dict.fromkeys(b, _forged(SHAPE_AT, 10**10)(np.zeros((3, 1, 1), int), 1))),
        "corrupt",
    ),
    "a pickle": Fault(change_first(lambda v, r: _PICKLE), "corrupt"),
    "a pickle in Flower's array": Fault(_flowers_own, "corrupt"),
    "negative counters": Fault(replace_blobs("counters", _negative), "corrupt"),
    "no counters": Fault(replace_blobs("counters", lambda b: {}), "missing-unit"),
    "units left out": Fault(without("units"), "missing-unit"),
    "counters left out": Fault(without("counters"), "missing-unit"),
    "metrics left out": Fault(without("metrics"), "missing-unit"),
    "a metric left out": Fault(with_metric("loss-last", None), "corrupt"),
    "a metric that is NaN": Fault(with_metric("tokens", math.nan), "not-finite"),
    "a metric that is a list": Fault(with_metric("started", [1.0, 2.0]), "corrupt"),
    "a metric below zero": Fault(with_metric("tokens", -1), "corrupt"),
    "a metric of 1e300": Fault(with_metric("tokens", 1e300), "corrupt"),
}  # fmt: skip
"""Of one client in one round; what it answers otherwise is honest."""
