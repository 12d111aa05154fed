"""Decoding and folding the replies of a round against `out.add_` of as many values that lie in memory already.

Each reply holds some experts of every layer; a kind of reply is how its values travel, or what they look like: `rows`
has a quarter of its rows, `lora` is of low-rank slices, which are many small units. The peer adds the values that are
not zero, a reply at a time, to one vector. Seconds are the processor's, of all threads; nanoseconds are a value's.

Memory is what Python and numpy allocate at the height of decoding and folding, beyond the encoded replies: over the sum
of one model and one decoded reply, in float32.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.bench.timing import interleave
from sam_ds.errors import InputError
from sam_ds.federation.aggregation import Aggregated, AggregationConfig, Aggregator
from sam_ds.wire.payload import ExpertUnit, Unit, decode_units, encode_units

KINDS = ("raw", "bf16", "int8", "rows", "lora")
_DISTINCT = 4
"""Replies that are made; they come in turn."""
_LORA_RANK = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--replies", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--held", type=int, default=8, help="experts of a layer in a reply")
    parser.add_argument("--d", type=int, default=512, help="hidden size")
    parser.add_argument("--n", type=int, default=128, help="neurons of an expert")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of replies")
    add_rounds(parser)
    add_seed(parser)


@dataclass(frozen=True, kw_only=True)
class Replies:
    """Encoded replies of one kind, and how many of their values are not zero."""

    blobs: list[dict[str, bytes]]
    shapes: list[dict[Unit, tuple[int, ...]]]
    nonzero: list[int]
    model_bytes: int


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row a kind. Ratios: seconds over the peer's, and memory over its bound, of the worst kind too."""
    check_sizes(options, "replies", "layers", "experts", "held", "d", "n")
    kinds = options.kinds.split(",")
    if not (set(kinds) <= set(KINDS) and options.held <= options.experts):
        raise InputError(f"--kinds must be from {', '.join(KINDS)}, --held at most --experts; got {options.kinds}, "
                         f"{options.held} of {options.experts}")  # fmt: skip
    rows = [_measured(kind, options) for kind in kinds]
    ratios = {f"{kind} time": row["time"] for kind, row in zip(kinds, rows, strict=True)}
    return {"rows": rows, "ratios": ratios | {"memory": max(row["memory"] for row in rows)}}


def fold(replies: Replies, count: int) -> Aggregated[Unit]:
    """What the strategy does with the replies of a round, but for their counters."""
    aggregator: Aggregator[Unit] = Aggregator(AggregationConfig(), total_weight=float(count))
    for number in range(count):
        turn = number % len(replies.blobs)
        # No name: one reply has to go before the next is decoded.
        aggregator.add(
            decode_units(replies.blobs[turn], expected=replies.shapes[turn], base_round=1, copy=False),
            weight=1.0, probability=lambda unit: 0.5,
        )  # fmt: skip
    return aggregator.result()


def _measured(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    replies, count = make_replies(kind, options), options.replies
    values = [torch.ones(nonzero) for nonzero in replies.nonzero]
    out = torch.zeros(max(replies.nonzero))
    decoded = [decode_units(blobs, base_round=1) for blobs in replies.blobs]

    def ours(number: int) -> None:
        fold(replies, count)

    def fold_only(number: int) -> None:
        aggregator: Aggregator[Unit] = Aggregator(AggregationConfig(), total_weight=float(count))
        for turn in range(count):
            aggregator.add(decoded[turn % len(decoded)], weight=1.0, probability=lambda unit: 0.5)
        aggregator.result()

    def peer(number: int) -> None:
        for turn in range(count):
            own = values[turn % len(values)]
            out[: len(own)].add_(own)

    timed = interleave(
        {"ours": ours, "fold": fold_only, "add_": peer}, rounds=options.rounds, clock=time.process_time
    )
    added = count * float(np.mean(replies.nonzero))
    reply_bytes = max(sum(delta.nbytes for delta in reply.values()) for reply in decoded)
    return {
        "kind": kind, "seconds": timed["ours"].median, "fold_s": timed["fold"].median, "add_s": timed["add_"].median,
        "ns": 1e9 * timed["ours"].median / added, "fold_ns": 1e9 * timed["fold"].median / added,
        "add_ns": 1e9 * timed["add_"].median / added, "time": timed["ours"].median / timed["add_"].median,
        "fold": timed["fold"].median / timed["add_"].median, "model_mb": replies.model_bytes / 1e6,
        "reply_mb": reply_bytes / 1e6, "peak_mb": (peak := _peak(replies, count)) / 1e6,
        "memory": peak / (replies.model_bytes + reply_bytes),
    }  # fmt: skip


def _peak(replies: Replies, count: int) -> int:
    tracemalloc.start()
    fold(replies, min(count, 2 * _DISTINCT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def make_replies(kind: str, options: argparse.Namespace) -> Replies:
    """Of Gaussian values, experts drawn anew for each layer and reply."""
    rng = np.random.default_rng([options.seed, KINDS.index(kind)])
    shape = (options.n, _LORA_RANK if kind == "lora" else options.d)
    blobs, shapes, nonzero = [], [], []
    for _ in range(_DISTINCT):
        reply: dict[Unit, NDArray[np.float32]] = {}
        for layer in range(options.layers):
            for expert in sorted(rng.permutation(options.experts)[: options.held].tolist()):
                for tensor in ("down", "gate", "up"):
                    delta = rng.standard_normal(shape, dtype=np.float32)
                    if kind == "rows":
                        delta[rng.permutation(shape[0])[shape[0] // 4 :]] = 0
                    reply[ExpertUnit(layer, expert, tensor)] = delta
        values = kind if kind in ("bf16", "int8") else "raw"
        blobs.append(encode_units(reply, values=values, base_round=1, rng=rng))
        shapes.append({unit: delta.shape for unit, delta in reply.items()})
        nonzero.append(sum(int(np.count_nonzero(delta)) for delta in reply.values()))
    model_bytes = 4 * 3 * options.layers * options.experts * shape[0] * shape[1]
    return Replies(blobs=blobs, shapes=shapes, nonzero=nonzero, model_bytes=model_bytes)
