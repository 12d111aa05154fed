"""Blobs that were written once: they must be read and written again bit for bit (`sam_ds/wire/header.py`, version)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam_ds.wire.codec import decode, encode, read_header
from sam_ds.wire.values import Values
from sam_ds.wire.zeros import Encoding

FOLDER = Path(__file__).parent / "golden"


def arrays():
    """What each file holds, made without a generator: numpy does not promise the same numbers for ever."""
    ramp = (np.arange(96, dtype=np.float32) - 40.5).reshape(6, 16) * np.float32(0.37)
    run, few, half = np.zeros_like(ramp), np.zeros(400, np.float32), np.zeros_like(ramp)
    run[2:4], few[[3, 150, 399]], half[:, ::2] = ramp[2:4], (1.5, -2.25, 1e-30), ramp[:, ::2]
    counts = np.zeros((3, 8, 8), np.int64)
    counts[1, 2:4], counts[2, 7, 7] = 1000, -3
    patterns = {"dense": ramp, "rle": run, "delta-varint": few, "bitmap": half}
    found = {f"{encoding}-{values}": (array, {"values": values, "base_round": 7})
             for encoding, array in patterns.items() for values in ("raw", "bf16", "int8", "int4")}
    for dtype in ("float64", "float16", "int32", "int64", "uint32", "uint8"):
        # Large enough that a varint would be longer than the bits themselves.
        scale = {"float16": 1, "uint8": 1, "int64": 2**52}.get(dtype, 2**23)
        found[f"raw-{dtype}"] = (np.abs(ramp * 700 % 251).astype(dtype) * np.array(scale, dtype), {})
    return found | {
        "varint-dense": (np.arange(-60, 60, dtype=np.int64), {}), "varint-rle": (counts, {"base_round": 2**32 - 1}),
        "varint-bitmap": (np.where(np.arange(90) % 2, np.arange(90), 0).astype(np.int32), {}),
        "varint-delta": (np.where(np.arange(300) % 97 == 5, 300, 0).astype(np.uint32), {}),
        "bool-bitmap": (np.arange(77) % 3 == 1, {}), "bool-rle": (np.arange(900) > 300, {}),
        "bool-delta": (np.arange(900) % 300 == 1, {}),
        "scalar": (np.array(-0.0, np.float32), {}), "empty": (np.zeros((0, 4), np.float32), {}),
        "zstd": (np.tile(np.arange(1, 9, dtype=np.float32), 40), {"compress": True}),
    }  # fmt: skip


def test_every_encoding_and_kind_of_values_has_a_file():
    files = {path.stem for path in FOLDER.glob("*.bin")}
    assert files == set(arrays())
    headers = [read_header((FOLDER / f"{name}.bin").read_bytes()) for name in files]
    found = {(header.encoding, header.values) for header in headers}
    assert found == {(encoding, kind) for encoding in Encoding for kind in Values}


@pytest.mark.parametrize("name", arrays())
def test_golden_blobs_are_read_and_written_bit_for_bit(name):
    array, options = arrays()[name]
    blob = (FOLDER / f"{name}.bin").read_bytes()
    if name == "zstd":
        # Releases of zstd may compress to other bytes; all must be read.
        pytest.importorskip("zstandard")
    else:
        assert encode(array, **options) == blob
    got, base_round = decode(blob)
    assert base_round == options.get("base_round", 0)
    assert got.shape == array.shape and got.dtype == array.dtype
    if options.get("values", "raw") == "raw":
        assert got.tobytes() == array.tobytes()
    else:
        # What a rounded kind is read as, is in a file too: this release's arithmetic is not the oracle of itself.
        assert got.tobytes() == (FOLDER / f"{name}.array").read_bytes()
