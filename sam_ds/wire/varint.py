"""Unsigned LEB128 varints, whole arrays at a time.

Seven bits a byte, least significant first, the high bit set on every byte but the last: the
variable-length integer of DWARF and Protocol Buffers. One pass per byte position, so at most ten numpy
passes whatever the number of values.

Shape legend: V values, L of them longer than so many bytes, B bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_VARINT_BYTES = 10
"""Bytes that hold 64 bits, seven at a time."""


class CodecError(ValueError):
    """Bytes that are not what our encoder writes: damaged, truncated, or made up."""


def varint_bytes(values_V: NDArray[Any]) -> int:
    """Bytes that all the values, none of them negative, take."""
    total = longer = len(values_V)
    for k in range(1, MAX_VARINT_BYTES):
        if not longer:
            break
        longer = int(np.count_nonzero(values_V >= 1 << 7 * k))
        total += longer
    return total


def encode_varints(values_V: NDArray[np.uint64]) -> bytes:
    """The values (V,) uint64 one after the other, nothing before and nothing after."""
    lengths_V = np.ones(len(values_V), dtype=np.int64)
    for k in range(1, MAX_VARINT_BYTES):
        longer_V = values_V >= np.uint64(1 << 7 * k)
        if not bool(longer_V.any()):
            break
        lengths_V += longer_V
    starts_V = np.cumsum(lengths_V) - lengths_V
    out_B = np.empty(int(lengths_V.sum()), dtype=np.uint8)
    for k in range(int(lengths_V.max(initial=0))):
        has_V = lengths_V > k
        seven = (values_V[has_V] >> np.uint64(7 * k)) & np.uint64(0x7F)
        more = (lengths_V[has_V] > k + 1).astype(np.uint8) << 7
        out_B[starts_V[has_V] + k] = seven.astype(np.uint8) | more
    return out_B.tobytes()


def decode_varints(data: bytes | memoryview) -> NDArray[np.uint64]:
    """All the varints in `data`, (V,) uint64.

    Raises:
        CodecError: the last one is cut off, one does not fit 64 bits, or one is longer than it needs to be.
    """
    bytes_B = np.frombuffer(data, dtype=np.uint8)
    if bytes_B.size == 0:
        return np.zeros(0, dtype=np.uint64)
    if bytes_B[-1] >= 0x80:
        raise CodecError("the last varint is cut off")
    ends_V = np.flatnonzero(bytes_B < 0x80)
    lengths_V = np.diff(ends_V, prepend=-1)
    longest = int(lengths_V.max())
    if longest > MAX_VARINT_BYTES or bool((bytes_B[ends_V[lengths_V == MAX_VARINT_BYTES]] > 1).any()):
        raise CodecError("a varint does not fit 64 bits")
    values_V = bytes_B[ends_V].astype(np.uint64)
    if bool((values_V[lengths_V > 1] == 0).any()):
        raise CodecError("a varint is longer than it needs to be")
    # The last byte is the most significant: Horner's rule from the end.
    for k in range(1, longest):
        long_L = np.flatnonzero(lengths_V > k)
        seven_L = bytes_B[ends_V[long_L] - k] & np.uint8(0x7F)
        values_V[long_L] = (values_V[long_L] << np.uint64(7)) | seven_L
    return values_V
