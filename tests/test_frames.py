"""Parts over a socket: any bytes come back, and nobody's word on a length is taken."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_ds.federation.supernode.frames import LIMIT, BrokenFrame, pack, receive, send, unpack


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    with one, other:
        one.settimeout(20)
        other.settimeout(20)
        yield one, other


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_unpack_inverts_pack(parts):
    assert unpack(pack(*parts), len(parts)) == parts


@given(st.lists(st.binary(max_size=10), min_size=1, max_size=3), st.data())
def test_a_cut_or_a_longer_message_is_refused(parts, data):
    packed = pack(*parts)
    with pytest.raises(BrokenFrame):
        unpack(packed[: data.draw(st.integers(0, len(packed) - 1))], len(parts))
    with pytest.raises(BrokenFrame):
        unpack(packed + b"\0", len(parts))


def test_what_is_sent_is_what_is_packed(pair):
    parts = [b"", b"a", bytes(range(256)) * 20_000]
    thread = threading.Thread(target=send, args=(pair[0], *parts))
    thread.start()
    assert receive(pair[1], 3) == parts
    thread.join(10)
    pair[0].sendall(pack(*parts[:2]))
    assert receive(pair[1], 2) == parts[:2]


def test_a_length_is_not_believed(pair):
    pair[0].sendall((LIMIT + 1).to_bytes(8, "big"))
    with pytest.raises(BrokenFrame, match="is announced"):
        receive(pair[1], 1)


def test_an_end_in_the_middle(pair):
    # A part of 2 GB is announced: only what has come is ever in memory.
    pair[0].sendall(LIMIT.to_bytes(8, "big") + b"abc")
    pair[0].close()
    with pytest.raises(BrokenFrame, match="after 3 of"):
        receive(pair[1], 1)
