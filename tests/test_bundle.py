"""Blobs by name as one, and back."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_ds.wire.bundle import bundle, unbundle
from sam_ds.wire.codec import CodecError

names = st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=8)


@given(st.dictionaries(names, st.binary(max_size=40), max_size=6))
def test_a_bundle_round_trips(blobs):
    data = bundle(blobs)
    assert list(unbundle(data).items()) == list(blobs.items())
    assert unbundle(memoryview(data)) == blobs
    beside = 8 + sum(8 + len(name.encode()) + 1 + 3 for name in blobs) if blobs else 0
    assert len(data) <= beside + sum(map(len, blobs.values()))


@given(st.dictionaries(names, st.binary(max_size=9), min_size=1, max_size=4), st.data())
def test_what_is_cut_or_has_more_behind_it_is_refused(blobs, data):
    whole = bundle(blobs)
    with pytest.raises(CodecError):
        unbundle(whole[: data.draw(st.integers(1, len(whole) - 1))])
    with pytest.raises(CodecError, match="1 bytes follow"):
        unbundle(whole + b"x")


@given(st.dictionaries(names, st.binary(max_size=9), min_size=1, max_size=4), st.data())
def test_a_change_is_refused_or_of_names_and_lengths_that_fit(blobs, data):
    """What is accepted is what would be written: nothing in a bundle goes unread."""
    forged = bytearray(bundle(blobs))
    forged[data.draw(st.integers(0, len(forged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = unbundle(forged)
    except CodecError:
        return
    assert bundle(found) == bytes(forged)


def test_blobs_are_views_and_aligned():
    blobs = {"a": b"1", "b": np.arange(3, dtype=np.float32).tobytes(), "": b""}
    data = bundle(blobs)
    found = unbundle(data)
    whole = np.frombuffer(data, np.uint8)
    for blob in found.values():
        view = np.frombuffer(blob, np.uint8)
        assert np.shares_memory(view, whole) or not len(view)
        assert (view.ctypes.data - whole.ctypes.data) % 4 == 0


@pytest.mark.parametrize(("forged", "message"), [
    (b"\0", "too few"),
    (bytes(8), "0 blobs"),
    (struct.pack("<II", 2**32 - 1, 0), "do not fit"),
    (struct.pack("<II", 0, 2**32 - 1), "do not fit"),
    (struct.pack("<IIQ", 1, 2, 2**63) + b"a\n", "does not lie"),
    (struct.pack("<IIQQ", 2, 4, 0, 0) + b"a\na\n", "1 names of 2"),
    (struct.pack("<IIQ", 1, 1, 0) + b"a", "0 names of 1"),
    (struct.pack("<IIQ", 1, 2, 0) + b"\xff\n", "UTF-8"),
    (struct.pack("<IIQ", 1, 2, 1) + b"a\n\0\1b", "does not lie"),
])  # fmt: skip
def test_what_nobody_would_write_is_refused(forged, message):
    with pytest.raises(CodecError, match=message):
        unbundle(forged)
