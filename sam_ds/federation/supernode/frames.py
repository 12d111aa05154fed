"""Byte strings over a local socket, one after the other: what a ClientApp's process and its node's worker say.

A part is its length in 8 bytes, big-endian, and itself. Nobody's word on a length is taken: memory grows with the bytes
that have come, up to what one serialised message can have.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

_LENGTH = struct.Struct(">Q")
LIMIT = (1 << 31) - 1
"""Bytes of a part: protobuf serialises no more."""
_STEP = 1 << 20


class BrokenFrame(ConnectionError):
    """The other side has gone, or does not speak as it should."""


def pack(*parts: bytes) -> bytes:
    """The parts as they are sent."""
    return b"".join(piece for part in parts for piece in (_LENGTH.pack(len(part)), part))


def unpack(data: bytes, count: int) -> list[bytes]:
    """The inverse of `pack` for this many parts. Raises BrokenFrame."""
    at = 0

    def read(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    parts = [_part(read) for _ in range(count)]
    if at != len(data):
        raise BrokenFrame(f"{len(data) - at} bytes after the last of {count} parts")
    return parts


def send(connection: socket.socket, *parts: bytes) -> None:
    """Write the parts, each without a copy."""
    for part in parts:
        connection.sendall(_LENGTH.pack(len(part)))
        connection.sendall(part)


def receive(connection: socket.socket, count: int) -> list[bytes]:
    """Read this many parts. Raises BrokenFrame."""
    return [_part(connection.recv) for _ in range(count)]


def _part(read: Callable[[int], bytes]) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(read, _LENGTH.size))
    if length > LIMIT:
        raise BrokenFrame(f"a part of {length} bytes is announced; the most is {LIMIT}")
    return _exactly(read, length)


def _exactly(read: Callable[[int], bytes], size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = read(min(_STEP, size - len(data)))
        if not piece:
            raise BrokenFrame(f"the other side ended after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)
