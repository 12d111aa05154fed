"""The codec against a plain copy of the same array and against what else would write it: seconds and bytes.

`blocks`: fp32 values of which a share of the 4 KiB blocks is not zero. `scattered`: a share of single values is not.
Both are timed twice: into memory that was written to before (`encode_into`, `decode(out=)`, beside `numpy.copyto`), and
into fresh memory, whose pages are first touched in the call (beside `numpy.copy`). `dense`: values without zeros,
rounded to nearest. `units`: many small arrays. `bound` is the fewest bytes: the non-zero values and, for scattered
ones, the entropy of their positions; elsewhere those of the array. `error` is that of the sum of 16 updates which were
rounded one by one, over the length of the sum: to nearest, stochastically, and to nearest with error feedback.

Seconds are those of the processor: every call runs on one thread.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.bench.timing import interleave
from sam_ds.errors import InputError
from sam_ds.wire.codec import decode, encode, encode_into
from sam_ds.wire.payload import ExpertUnit, Unit, decode_units, encode_units

BLOCK = 1024
"""Values of a block of 4 KiB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mib", type=int, default=256, help="of the array in blocks; the scattered one has a quarter")
    parser.add_argument("--blocks", type=float, default=0.25, help="share of the blocks that is not zero")
    parser.add_argument("--scattered", type=float, default=0.01, help="share of the values that is not zero")
    parser.add_argument("--units", type=int, default=2000, help="of 64 values each, encoded and decoded together")
    parser.add_argument("--peers", action="store_true", help="also zstd, safetensors, torch.save, npz and scipy's COO")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a call on an array. Ratios: the speed of the codec over that of a copy, and bytes over the bound."""
    check_sizes(options, "mib", "units")
    for name in ("blocks", "scattered"):
        if not 0 < getattr(options, name) < 1:
            raise InputError(f"--{name} must be between 0 and 1, got {getattr(options, name)}")
    rng = np.random.default_rng(options.seed)
    table: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    blocks = rng.standard_normal((options.mib * 256, BLOCK), dtype=np.float32)
    blocks[rng.random(len(blocks)) >= options.blocks] = 0
    _measure("blocks", blocks, 4 * int(np.count_nonzero(blocks)), options, table, ratios)
    scattered = blocks[: max(len(blocks) // 4, 1)].reshape(-1)
    scattered[:] = np.where(rng.random(scattered.size) < options.scattered, 1 + rng.random(scattered.size), 0)
    share = np.count_nonzero(scattered) / scattered.size
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) * scattered.size / 8
    _measure("scattered", scattered, 4 * int(np.count_nonzero(scattered)) + int(entropy), options, table, ratios)
    _measure_rounded(rng.standard_normal((options.mib * 16, 4 * BLOCK), dtype=np.float32), options, table)
    _measure_units(options, rng, table, ratios)
    for values in ("int8", "int4"):
        for how, error in _errors(rng.normal(size=(16, 64, 256)).astype(np.float32) + 0.3, values, rng).items():
            ratios[f"{values}_{how}_error"] = error
    return {"rows": table, "ratios": ratios}


def _measure(
    title: str, array: NDArray[np.float32], bound: int, options: argparse.Namespace, table: list[dict[str, Any]],
    ratios: dict[str, float],
) -> None:  # fmt: skip
    blob = encode(array)
    out, buffer = np.ones_like(array), bytearray(len(blob))
    calls: dict[str, Callable[[int], object]] = {
        "copyto": lambda _: np.copyto(out, array), "encode_into": lambda _: encode_into(array, buffer),
        "decode(out=)": lambda _: decode(blob, out=out),
        "copy": lambda _: len(array.copy()), "encode": lambda _: len(encode(array)),
        "decode": lambda _: decode(blob)[1],
    }  # fmt: skip
    sizes = {"copyto": array.nbytes, "copy": array.nbytes}
    if options.peers:
        for name, save in _peers(array).items():
            sizes[name] = len(save())
            calls[name] = _length_of(save)
    timed = interleave(calls, rounds=options.rounds, clock=time.process_time)
    assert decode(blob)[0].tobytes() == array.tobytes()
    for name, own in timed.items():
        size = sizes.get(name, len(blob))
        peer = timed["copyto" if name in ("copyto", "encode_into", "decode(out=)") else "copy"]
        table.append({
            "array": title, "call": name, "median_s": own.median, "speed": peer.median / own.median, "bytes": size,
            "bytes_over_bound": size / bound,
        })  # fmt: skip
    ratios |= {
        f"{title}_encode": timed["copyto"].median / timed["encode_into"].median,
        f"{title}_decode": timed["copyto"].median / timed["decode(out=)"].median,
        f"{title}_fresh_encode": timed["copy"].median / timed["encode"].median,
        f"{title}_fresh_decode": timed["copy"].median / timed["decode"].median,
        f"{title}_bytes": len(blob) / bound,
    }  # fmt: skip


def _measure_rounded(array: NDArray[np.float32], options: argparse.Namespace, table: list[dict[str, Any]]) -> None:
    blobs = {values: encode(array, values=values) for values in ("bf16", "int8", "int4")}
    calls: dict[str, Any] = {"copy": lambda _: len(array.copy())}
    for values, blob in blobs.items():
        calls[f"encode {values}"] = lambda _, values=values: len(encode(array, values=values))
        calls[f"decode {values}"] = lambda _, blob=blob: decode(blob)[1]
    timed = interleave(calls, rounds=options.rounds, clock=time.process_time)
    for name, own in timed.items():
        size = len(blobs[name.split()[1]]) if " " in name else array.nbytes
        table.append({
            "array": "dense", "call": name, "median_s": own.median, "speed": timed["copy"].median / own.median,
            "bytes": size, "bytes_over_bound": size / array.nbytes,
        })  # fmt: skip


def _length_of(save: Callable[[], bytes]) -> Callable[[int], int]:
    return lambda _: len(save())


def _peers(array: NDArray[np.float32]) -> dict[str, Callable[[], bytes]]:
    import torch
    import zstandard
    from safetensors.numpy import save
    from scipy.sparse import coo_array

    def npz() -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(stream, array)
        return stream.getvalue()

    def saved() -> bytes:
        stream = io.BytesIO()
        torch.save(torch.from_numpy(array), stream)
        return stream.getvalue()

    def coo() -> bytes:
        found = coo_array(array.reshape(len(array), -1))
        return b"".join(part.tobytes() for part in (*found.coords, found.data))

    return {
        "zstd level 1": lambda: zstandard.ZstdCompressor(level=1).compress(array.data),
        "safetensors": lambda: save({"array": array}), "torch.save": saved, "npz, compressed": npz,
        "scipy COO": coo,
    }  # fmt: skip


def _measure_units(
    options: argparse.Namespace, rng: np.random.Generator, table: list[dict[str, Any]], ratios: dict[str, float]
) -> None:
    values = rng.standard_normal((options.units, 4, 16), dtype=np.float32)
    units: dict[Unit, NDArray[np.float32]] = {
        ExpertUnit(k // 100, k % 100, "down.lora_A"): value for k, value in enumerate(values)
    }
    shapes = {unit: value.shape for unit, value in units.items()}
    blobs = encode_units(units, base_round=1)
    timed = interleave({
        "copy": lambda _: len([value.copy() for value in units.values()]),
        "encode_units": lambda _: len(encode_units(units, base_round=1)),
        "decode_units": lambda _: len(decode_units(blobs, expected=shapes, base_round=1)),
    }, rounds=options.rounds, clock=time.process_time)  # fmt: skip
    sizes = {"copy": values.nbytes}
    for name, own in timed.items():
        size = sizes.get(name, sum(map(len, blobs.values())))
        table.append({
            "array": "units", "call": name, "median_s": own.median, "speed": timed["copy"].median / own.median,
            "bytes": size, "bytes_over_bound": size / values.nbytes,
        })  # fmt: skip
    ratios |= {
        f"units_{name}_us": 1e6 * timed[f"{name}_units"].median / options.units for name in ("encode", "decode")
    }


def _errors(updates: NDArray[np.float32], values: str, rng: np.random.Generator) -> dict[str, float]:
    residual = np.zeros_like(updates[0])
    left = {how: np.zeros(updates.shape[1:]) for how in ("nearest", "stochastic", "feedback")}
    for update in updates:
        corrected = update + residual
        sent = decode(encode(corrected, values=values))[0]
        residual = corrected - sent
        left["feedback"] += update - sent
        left["nearest"] += update - decode(encode(update, values=values))[0]
        left["stochastic"] += update - decode(encode(update, values=values, rng=rng))[0]
    length = float(np.linalg.norm(updates.sum(0, dtype=np.float64)))
    return {how: float(np.linalg.norm(error)) / length for how, error in left.items()}
