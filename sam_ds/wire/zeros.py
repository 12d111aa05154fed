"""Where the non-zeros of a flat array are: four ways to write it down, the shortest wins.

An update of a federated client is dense floats (nothing to gain), counters (mostly zeros, scattered) or
masked rows (long runs of zeros). Each of the ways below is the shortest for one of them:

| encoding       | positions section                                                            |
|----------------|------------------------------------------------------------------------------|
| `dense`        | nothing: every value is sent                                                 |
| `rle`          | varint(bytes of what follows), varint lengths of runs: zeros, non-zeros, ... |
| `bitmap`       | one bit a value, least significant first, padded with zero bits              |
| `delta-varint` | varint(bytes of what follows), varint zeros before each non-zero since the last |

Shape legend: N values of the flat array, P non-zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.wire.varint import CodecError, decode_varints, encode_varints


class Encoding(IntEnum):
    DENSE = 0
    RLE = 1
    BITMAP = 2
    DELTA_VARINT = 3


def candidate_positions(mask_N: NDArray[np.bool_]) -> Iterator[tuple[Encoding, bytes]]:
    """The sparse encodings of `mask_N` (True = non-zero) that can be the shortest, and their sections."""
    bitmap = pack_positions(Encoding.BITMAP, mask_N)
    yield Encoding.BITMAP, bitmap
    # A varint is at least one byte, which bounds the other two from below before they are built.
    if np.count_nonzero(mask_N[1:] != mask_N[:-1]) < len(bitmap):
        yield Encoding.RLE, pack_positions(Encoding.RLE, mask_N)
    if np.count_nonzero(mask_N) < len(bitmap):
        yield Encoding.DELTA_VARINT, pack_positions(Encoding.DELTA_VARINT, mask_N)


def pack_positions(encoding: Encoding, mask_N: NDArray[np.bool_]) -> bytes:
    """The positions section that says where `mask_N` is True."""
    if encoding is Encoding.DENSE:
        return b""
    if encoding is Encoding.BITMAP:
        return np.packbits(mask_N, bitorder="little").tobytes()
    numbers = _runs(mask_N) if encoding is Encoding.RLE else _gaps(mask_N)
    section = encode_varints(numbers.astype(np.uint64))
    return encode_varints(np.array([len(section)], dtype=np.uint64)) + section


def unpack_positions(
    encoding: Encoding, body: memoryview, size: int
) -> tuple[NDArray[Any], int, memoryview]:
    """The inverse of `pack_positions` for the three sparse encodings of a flat array of `size` values.

    Returns an index of the non-zeros (a mask (N,) or ascending positions (P,)), their number P, and the
    rest of `body`.

    Raises:
        CodecError: the section is cut off, its padding is not zero, or it does not describe `size` values.
    """
    assert encoding is not Encoding.DENSE
    if encoding is Encoding.BITMAP:
        used = (size + 7) // 8
        bits = np.frombuffer(body[:used], dtype=np.uint8)
        if len(bits) != used:
            raise CodecError(f"the bitmap has {len(bits)} bytes, {used} are needed for {size} values")
        if size % 8 and bits[-1] >> (size % 8):
            raise CodecError("the padding of the bitmap is not zero")
        mask_N = np.unpackbits(bits, count=size, bitorder="little").astype(np.bool_)
        return mask_N, int(np.count_nonzero(mask_N)), body[used:]
    numbers, rest = _section(body)
    if encoding is Encoding.RLE:
        mask_N = _mask_of_runs(numbers, size)
        return mask_N, int(np.count_nonzero(mask_N)), rest
    positions_P = _positions_of_gaps(numbers, size)
    return positions_P, len(positions_P), rest


def _runs(mask_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Lengths of the runs, zeros first: 0 if the array starts with a non-zero, nothing for an empty array."""
    if mask_N.size == 0:
        return np.zeros(0, dtype=np.int64)
    changes = np.flatnonzero(mask_N[1:] != mask_N[:-1]) + 1
    edges = np.concatenate([[0], changes, [mask_N.size]])
    return np.diff(edges, prepend=0)[0 if mask_N[0] else 1 :]


def _gaps(mask_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Zeros before each non-zero, counted from the non-zero before it."""
    return np.diff(np.flatnonzero(mask_N), prepend=-1) - 1


def _section(body: memoryview) -> tuple[NDArray[np.uint64], memoryview]:
    """The varints of a length-prefixed section and what follows it."""
    head = next((k for k, byte in enumerate(body[:10]) if byte < 0x80), None)
    if head is None:
        raise CodecError("the positions section has no length")
    start = head + 1
    length = int(decode_varints(body[:start])[0])
    if length > len(body) - start:
        raise CodecError(f"the positions section says {length} bytes, {len(body) - start} are left")
    return decode_varints(body[start : start + length]), body[start + length :]


def _mask_of_runs(runs: NDArray[np.uint64], size: int) -> NDArray[np.bool_]:
    ends = np.cumsum(runs)
    # A sum that wraps around 2^64 shows as an end that is not after the one before; only the first run may
    # be empty.
    if len(runs) == 0 or bool((ends[1:] <= ends[:-1]).any()) or int(ends[-1]) != size:
        raise CodecError(f"the runs do not cover {size} values")
    is_set = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_set, runs.astype(np.int64))


def _positions_of_gaps(gaps: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    if len(gaps) == 0:
        return np.zeros(0, dtype=np.int64)
    # As above: a sum that wraps around shows as a position that is not after the one before, or too large.
    positions = np.cumsum(gaps + np.uint64(1)) - np.uint64(1)
    if bool((positions[1:] <= positions[:-1]).any()) or int(positions[-1]) >= size:
        raise CodecError(f"the positions do not ascend within the {size} values")
    return positions.astype(np.int64)
