"""The fast parts of the wire: edges, the checksum, given memory, tensors, and what a decode may allocate."""

from __future__ import annotations

import tracemalloc
from argparse import Namespace
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import reference_crc32c, reference_edges

from sam_ds.bench import fuzz
from sam_ds.errors import InputError
from sam_ds.wire import zeros
from sam_ds.wire.checksum import crc32c
from sam_ds.wire.codec import DTYPES, CodecError, decode, encode, encode_into, read_header
from sam_ds.wire.device import encode_tensor
from sam_ds.wire.payload import SharedUnit, encode_units
from sam_ds.wire.zeros import Encoding, find_edges


@given(st.binary(max_size=60), st.integers(0, 60))
def test_the_checksum_is_crc32c_of_any_pieces(data, cut):
    assert crc32c(data) == reference_crc32c(data)
    view = memoryview(bytearray(data))
    assert crc32c(view[cut:], crc32c(view[:cut])) == crc32c(data)


def test_the_checksum_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


@settings(max_examples=300)
@given(hnp.arrays(np.uint8, st.integers(0, 70), elements=st.sampled_from([0, 0, 0, 1, 255])), st.integers(1, 9))
def test_edges_are_those_of_a_walk(codes, chunk):
    """With stretches so short that every border falls everywhere."""
    codes = np.sort(codes) if chunk % 2 else codes
    want = reference_edges(codes.tolist())
    with patch.object(zeros, "_CHUNK", 4 * chunk), patch.object(zeros, "_PROBED", chunk):
        found = find_edges(codes)
    assert (found is None) == (len(want) > len(codes) // 4)
    assert found is None or found.tolist() == want


def large_arrays():
    """Longer than the stretches that the encoder looks at: 262144 values, probed every 1024."""
    rng = np.random.default_rng(5)
    full = rng.standard_normal(300_000, dtype=np.float32) + 10
    blocks, odd, few, half = full.copy(), full.copy(), np.zeros_like(full), full.copy()
    blocks.reshape(-1, 1000)[rng.random(300) < 0.7] = 0
    aligned = full[: 1024 * 290].reshape(-1, 1024).copy()
    aligned[rng.random(290) < 0.7] = 0
    aligned[20, 700] = 0  # a zero where the probe says that there is none
    odd[1:262_144], odd[262_145:299_000] = 0, 0  # one value at the border of two stretches
    few[rng.integers(0, len(few), 3000)] = 1
    half[rng.random(len(half)) < 0.5] = 0
    return {"dense": full, "blocks": blocks, "aligned": aligned, "odd": odd, "few": few, "half": half,
            "bools": full > 9, "runs of bools": blocks != 0, "counts": (few * 300).astype(np.int64),
            "zeros": np.zeros((3, 70_000), np.float64)}  # fmt: skip


LARGE = large_arrays()


@pytest.mark.parametrize("name", LARGE)
def test_large_arrays_round_trip_into_any_memory(name):
    array = LARGE[name]
    blob = encode(array)
    out = np.full_like(array, 1)
    got, _ = decode(blob, out=out)
    assert got is out and out.tobytes() == array.tobytes()
    assert decode(blob)[0].tobytes() == array.tobytes()
    buffer = bytearray(b"\xff" * (len(blob) + 3))
    assert encode_into(array, buffer) == len(blob)
    assert buffer[:-3] == blob and buffer[-3:] == b"\xff" * 3
    edges = find_edges(array.reshape(-1).view(f"u{array.itemsize}"))
    mask = np.concatenate([[False], array.reshape(-1) != 0])
    want = np.flatnonzero(mask[1:] != mask[:-1])
    assert name in ("half", "bools") if edges is None else (edges == want).all()


def test_large_arrays_have_every_encoding():
    assert {read_header(encode(array)).encoding for array in LARGE.values()} == set(Encoding)


@given(st.data(), st.sampled_from(["raw", "bf16", "int8", "int4"]))
def test_out_takes_any_values(data, values):
    array = data.draw(hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=9),
                                 elements=st.floats(-9, 9, width=32)))  # fmt: skip
    blob = encode(array, values=values)
    out = np.full_like(array, 3)
    assert decode(blob, out=out)[0].tobytes() == decode(blob)[0].tobytes() == out.tobytes()


def test_what_memory_is_refused():
    x = np.ones((2, 3), np.float32)
    blob = encode(x)
    for out in (np.ones((3, 2), np.float32), np.ones((2, 3), np.int32)):
        with pytest.raises(CodecError, match="expected"):
            decode(blob, out=out)
    frozen = x.copy()
    frozen.flags.writeable = False
    for out in (np.ones((3, 2), np.float32).T, frozen):
        with pytest.raises(InputError, match="out must be"):
            decode(blob, out=out)
    for memory in (bytearray(len(blob) - 1), memoryview(blob)):
        with pytest.raises(InputError, match=f"needs {len(blob)}"):
            encode_into(x, memory)


TORCH = [dtype for dtype in DTYPES if dtype.name != "uint32"]


@settings(max_examples=200)
@given(st.data(), st.sampled_from(TORCH), st.sampled_from([0.0, 0.03, 0.3, 1.0]), st.booleans())
def test_a_tensor_gives_the_bytes_of_its_array(data, dtype, keep, ordered):
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)))
    mask = np.random.default_rng(array.size).random(array.shape) < keep
    mask = np.sort(mask.reshape(-1)).reshape(array.shape) if ordered else mask
    array = np.where(mask, array, dtype.type(0)).astype(dtype)
    tensor = torch.from_numpy(array)
    assert encode_tensor(tensor, base_round=3) == encode(array, base_round=3)
    if dtype.kind == "f" and dtype.itemsize > 2:
        assert encode_tensor(tensor, values="bf16", compress=True) == encode(array, values="bf16", compress=True)


def test_large_tensors_and_units_of_them():
    units = {SharedUnit(name.replace(" ", "_")): array for name, array in LARGE.items()}
    tensors = {unit: torch.from_numpy(array) for unit, array in units.items()}
    assert encode_units(tensors, base_round=2) == encode_units(units, base_round=2)
    x = LARGE["blocks"].reshape(300, 1000)
    assert encode_tensor(torch.from_numpy(x).t()) == encode(x.T)
    options = [{"values": "int8", "rng": np.random.default_rng(1)} for _ in range(2)]
    assert encode_tensor(torch.from_numpy(x), **options[0]) == encode(x, **options[1])
    with pytest.raises(InputError, match="bfloat16"):
        encode_tensor(torch.ones(2, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_a_tensor_on_a_gpu_gives_the_bytes_of_its_array(name):
    array = LARGE[name]
    tensor = torch.from_numpy(array).cuda()
    assert encode_tensor(tensor, base_round=3) == encode(array, base_round=3)
    if array.dtype == np.float32:
        assert encode_tensor(tensor, values="bf16") == encode(array, values="bf16")


def widest(size):
    """Blobs whose decoding takes the most memory for what they hold, by name."""
    every_eighth = np.arange(size) % 8 == 1
    return {
        "runs": np.arange(size) // 9 % 2 == 1, "gaps": every_eighth[:, None][:, 0] & (np.arange(size) % 16 == 1),
        "bytes": (np.arange(size) % 11 == 1).astype(np.uint8), "floats": every_eighth.astype(np.float32),
        "counts": (np.arange(size) % 50).astype(np.int32), "few counts": (every_eighth * 9).astype(np.int64),
    }  # fmt: skip


@pytest.mark.parametrize("name", widest(16))
def test_a_decode_allocates_a_small_multiple_of_the_array(name):
    array = widest(1 << 17)[name]
    blob = encode(array)
    tracemalloc.start()
    decode(blob)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * array.nbytes


def test_a_fuzz_of_the_decoder():
    found = fuzz.run(Namespace(cases=3000, start=0, seed=0))
    outcomes = {row["outcome"]: row["blobs"] for row in found["rows"]}
    assert found["ratios"]["cases"] == sum(outcomes.values()) == 3000
    assert len(outcomes) == 4 and min(outcomes.values()) > 50
    one, other = (fuzz.run(Namespace(cases=100, start=start, seed=0)) for start in (0, 100))
    both = fuzz.run(Namespace(cases=200, start=0, seed=0))
    parts = Counter({row["outcome"]: row["blobs"] for row in one["rows"]})
    parts.update({row["outcome"]: row["blobs"] for row in other["rows"]})
    assert parts == {row["outcome"]: row["blobs"] for row in both["rows"]}


def test_the_fuzz_would_see_what_it_looks_for():
    blob = encode(np.ones((3, 40), np.float32))
    assert fuzz.attempt(blob, sealed=True) == "accepted: within bounds"
    with pytest.raises(AssertionError, match="wrong checksum"):
        fuzz.attempt(blob, sealed=False)
    with patch.object(fuzz, "MAX_BYTES", 479):
        assert fuzz.attempt(blob, sealed=True) == "refused: header or body"
    with patch.object(fuzz, "SLOW", -1.0), pytest.raises(AssertionError, match="case 0 of seed 0"):
        fuzz.run(Namespace(cases=9, start=0, seed=0))
