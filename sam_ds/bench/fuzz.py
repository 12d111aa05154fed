"""Mutated blobs against the decoder: each must be refused by `CodecError`, or decode within its bound to what it says.

Small blobs of every encoding, kind of values and dtype are mutated one to four times: bits and bytes changed, bytes
cut out, put in or copied from another blob, fields of the header set to edge values. Half are then given the checksum
of what they now hold, as a forger would; the others must all be refused. What decodes must be no larger than the
bound, be the same into a given array, and survive `encode` and `decode`; a warning is a failure. Every 50th is decoded
under tracemalloc too: `peak` is the most that was allocated at a time over bound plus blob, `slowest_s` the processor
time of the longest case.

Case K of a seed is the same in every run, so that `--start` goes on where a run ended.
"""

from __future__ import annotations

import argparse
import random
import struct
import time
import tracemalloc
import warnings
from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.bench.options import add_seed, check_sizes
from sam_ds.errors import InputError
from sam_ds.wire.checksum import crc32c
from sam_ds.wire.codec import DTYPES, CodecError, decode, encode
from sam_ds.wire.header import LENGTH_AT, SHAPE_AT

MAX_BYTES = 1 << 14
PEAK = 12
"""Times the bound plus the blob that a decode may allocate in all: a position is 8 bytes, and there are steps."""
SLOW = 5.0
"""Seconds of processor time that no case may take, on however busy a machine."""
_SAMPLED = 50
_EDGES = (0, 1, 2, 7, 31, 32, 33, 127, 128, 255)
_WIDE_EDGES = (0, 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=20_000, help="mutated blobs")
    parser.add_argument("--start", type=int, default=0, help="number of the first")
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row an outcome, and how many blobs had it. Ratios: peak memory over the bound. Raises AssertionError with the
    number of the case that broke a promise."""
    check_sizes(options, "cases")
    if options.start < 0:
        raise InputError(f"--start must not be negative, got {options.start}")
    blobs, outcomes = seeds(), Counter[str]()
    peak = slowest = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(options.start, options.start + options.cases):
            blob, sealed = mutated(blobs, random.Random(options.seed << 40 | number))
            try:
                begin = time.process_time()
                outcome = attempt(blob, sealed)
                slowest = max(slowest, time.process_time() - begin)
                if number % _SAMPLED == 0:
                    peak = max(peak, allocated(blob) / (MAX_BYTES + len(blob)))
                assert peak <= PEAK and slowest <= SLOW, f"{peak:.1f} times the bound, {slowest:.1f} s"
            except Exception as error:
                raise AssertionError(f"case {number} of seed {options.seed}: {blob[:64].hex()}...") from error
            outcomes[outcome] += 1
    rows = [{"outcome": outcome, "blobs": count} for outcome, count in outcomes.most_common()]
    return {"rows": rows, "ratios": {"peak": peak, "slowest_s": slowest, "cases": sum(outcomes.values())}}


def seeds() -> list[bytes]:
    """Small blobs that differ in every field of the header."""
    rng = np.random.default_rng(0)
    arrays: list[NDArray[Any]] = []
    for dtype in DTYPES:
        full = (rng.normal(size=(6, 20)) * 40).astype(dtype)
        run, few, half = (np.zeros_like(full) for _ in range(3))
        run[2:4], few[1, 3], half[:, ::2] = full[2:4], 9, full[:, ::2]
        arrays += [full, run, few, half, full[:0], full[0, 0].reshape(())]
    # Longer than a stretch that the encoder looks at, and runs that are copied one by one.
    long = np.zeros(4000, np.float32)
    long[1000:2500] = rng.normal(size=1500)
    blobs = [encode(array, base_round=k, compress=k % 3 == 0) for k, array in enumerate([*arrays, long])]
    for values in ("bf16", "int8", "int4"):
        blobs += [encode(array.astype(np.float32), values=values) for array in arrays[:6]]
    return blobs


def mutated(blobs: list[bytes], draw: random.Random) -> tuple[bytes, bool]:
    """One of the blobs, changed, and whether its checksum is right."""
    blob = bytearray(draw.choice(blobs))
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(blob))
        kind = draw.randrange(7)
        if kind == 0:
            blob[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            blob[at] = draw.choice(_EDGES)
        elif kind == 2:
            del blob[at : at + draw.randint(1, 9)]
        elif kind == 3:
            blob[at:at] = draw.randbytes(draw.randint(1, 9))
        elif kind == 4:
            other = draw.choice(blobs)
            begin = draw.randrange(len(other))
            blob[at : at + 16] = other[begin : begin + 16]
        elif kind == 5:
            field = draw.randint(8, 13)
            blob[field : field + 1] = bytes([draw.randrange(9)])
        else:
            where = draw.choice((LENGTH_AT, SHAPE_AT, SHAPE_AT + 8))
            blob[where : where + 8] = struct.pack("<Q", draw.choice((*_WIDE_EDGES, draw.randrange(200))))
        if not blob:
            break
    if draw.random() < 0.5 and len(blob) > 8:
        # Half of them with the length made right too, so that the body is reached.
        if draw.random() < 0.5 and len(blob) > SHAPE_AT and len(blob) >= SHAPE_AT + 8 * blob[13]:
            struct.pack_into("<Q", blob, LENGTH_AT, len(blob) - SHAPE_AT - 8 * blob[13])
        blob[4:8] = struct.pack("<I", crc32c(blob[8:]))
    # A change may also undo another, or make the header of one blob that of another.
    return bytes(blob), len(blob) > 8 and blob[4:8] == struct.pack("<I", crc32c(blob[8:]))


def allocated(blob: bytes) -> int:
    """The most bytes that a decode holds at a time."""
    tracemalloc.start()
    with suppress(CodecError):
        decode(blob, max_bytes=MAX_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def attempt(blob: bytes, sealed: bool) -> str:
    """What became of it; an AssertionError if that is not as promised."""
    try:
        array, base_round = decode(blob, max_bytes=MAX_BYTES)
    except CodecError as error:
        return "refused: " + ("checksum" if "checksum" in str(error) else "magic or version" if "magic" in str(error)
                              else "header or body")  # fmt: skip
    assert sealed, "accepted with a wrong checksum"
    assert array.nbytes <= MAX_BYTES, f"{array.nbytes} bytes, at most {MAX_BYTES} were to be accepted"
    out = np.full_like(array, 1)
    for again in (decode(blob, out=out)[0], decode(encode(array, base_round=base_round))[0]):
        assert again.shape == array.shape and again.dtype == array.dtype, "another array the second time"
        assert again.tobytes() == array.tobytes(), "other values the second time"
    return "accepted: within bounds"
