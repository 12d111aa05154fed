"""Where the non-zeros of a flat array are: four ways to write it down, the shortest wins.

An update of a federated client is dense floats (nothing to gain), counters (mostly zeros, scattered) or
masked rows (long runs of zeros). Each of the ways below is the shortest for one of them:

| encoding       | positions section                                                            |
|----------------|------------------------------------------------------------------------------|
| `dense`        | nothing: every value is sent                                                 |
| `rle`          | varint(bytes of what follows), varint lengths of runs: zeros, non-zeros, ... |
| `bitmap`       | one bit a value, least significant first, padded with zero bits              |
| `delta-varint` | varint(bytes of what follows), varint zeros before each non-zero since the last |

All four follow from the *edges*: the positions at which zeros turn into non-zeros or back, in order, the first of them
the start of the first non-zero. They are found in one pass over the array, and every size is known before a section is
written.

Shape legend: N values of the flat array, P non-zeros, R runs of non-zeros, K edges (2 R, or 2 R - 1 where the last run
ends with the array).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sam_ds.wire.varint import CodecError, decode_varints, encode_varints, varint_bytes


class Encoding(IntEnum):
    DENSE = 0
    RLE = 1
    BITMAP = 2
    DELTA_VARINT = 3


_CHUNK = 1 << 18
"""Values looked at together: what the second look at them needs is still in the cache."""
_PROBED = 1 << 10
"""Values that are taken for zeros or not by the first of them, then checked."""
_LONG_RUN = 512
"""Mean bytes from which on runs are copied one by one; shorter ones are faster by a mask."""
_ZEROS = memoryview(bytes(1 << 18))


@dataclass(frozen=True, slots=True)
class Runs:
    """Starts and ends (R,) int64 of the runs of non-zeros."""

    starts_R: NDArray[np.int64]
    ends_R: NDArray[np.int64]

    def are_long(self, itemsize: int) -> bool:
        """Whether copying run by run pays."""
        return self.count * itemsize >= _LONG_RUN * len(self.starts_R)

    @property
    def count(self) -> int:
        """P."""
        return int(self.ends_R.sum() - self.starts_R.sum())

    def mask(self, size: int) -> NDArray[np.bool_]:
        """(N,) True in the runs."""
        edges = np.stack([self.starts_R, self.ends_R], axis=1).reshape(-1)
        is_set = np.arange(len(edges) + 1) % 2 == 1
        return np.repeat(is_set, np.diff(edges, prepend=0, append=size))


Index: TypeAlias = NDArray[Any] | Runs
"""Where the values go: a mask (N,), ascending positions (P,), or runs."""


def find_edges(codes_N: NDArray[Any]) -> NDArray[np.int64] | None:
    """The edges (K,) int64 of an array of unsigned integers; None if they are more than a quarter of its values, for
    then only a bitmap can be shorter than all the values."""
    found_K: list[NDArray[np.int64]] = []
    count, before = 0, False
    for start in range(0, len(codes_N), _CHUNK):
        chunk = codes_N[start : start + _CHUNK]
        edges = _edges_of_chunk(chunk)
        if bool(chunk[0]) == before:
            edges = edges[1:]
        before = bool(chunk[-1])
        count += len(edges)
        if count > len(codes_N) // 4:
            return None
        found_K.append(edges + start)
    return np.concatenate(found_K) if found_K else np.zeros(0, dtype=np.int64)


def count_nonzeros(edges_K: NDArray[np.int64], size: int) -> int:
    """P."""
    return int(edges_K[1::2].sum() - edges_K[::2].sum()) + (size if len(edges_K) % 2 else 0)


def sparse_sizes(edges_K: NDArray[np.int64] | None, nonzeros: int, size: int) -> dict[Encoding, int]:
    """Bytes of the positions section of each sparse encoding that can be the shortest."""
    bitmap = (size + 7) // 8
    sizes = {Encoding.BITMAP: bitmap}
    # A varint is at least one byte, which bounds the other two from below.
    if edges_K is not None and len(edges_K) < bitmap:
        sizes[Encoding.RLE] = section_bytes(varint_bytes(_runs(edges_K, size)))
    if edges_K is not None and nonzeros < bitmap:
        gaps_R, rest_R = _gaps(edges_K, size)
        # The gaps inside the runs are 0: a byte each.
        sizes[Encoding.DELTA_VARINT] = section_bytes(varint_bytes(gaps_R) + int(rest_R.sum()))
    return sizes


def section_bytes(length: int) -> int:
    """Of a section that holds `length` bytes of varints, its own length included."""
    return varint_bytes(np.array([length])) + length


def pack_positions(encoding: Encoding, codes_N: NDArray[Any], edges_K: NDArray[np.int64] | None) -> bytes:
    """The positions section of the non-zeros of `codes_N`; the edges are not needed for a bitmap."""
    if encoding is Encoding.DENSE:
        return b""
    if encoding is Encoding.BITMAP:
        return np.packbits(codes_N != 0, bitorder="little").tobytes()
    assert edges_K is not None
    size = len(codes_N)
    numbers = _runs(edges_K, size) if encoding is Encoding.RLE else _all_gaps(edges_K, size)
    section = encode_varints(numbers.astype(np.uint64))
    return encode_varints(np.array([len(section)], dtype=np.uint64)) + section


def gather(codes_N: NDArray[Any], edges_K: NDArray[np.int64] | None) -> NDArray[Any]:
    """The non-zeros (P,) in order."""
    if edges_K is None or count_nonzeros(edges_K, len(codes_N)) > len(codes_N) // 16:
        dense: NDArray[Any] = codes_N[codes_N != 0]
        return dense
    return codes_N[np.cumsum(_all_gaps(edges_K, len(codes_N)) + 1) - 1]


def gather_bytes(codes_N: NDArray[Any], edges_K: NDArray[np.int64] | None) -> list[memoryview]:
    """The bytes of the non-zeros in order: where the runs are long, without a copy."""
    if edges_K is not None and (runs := _runs_of_edges(edges_K, len(codes_N))).are_long(codes_N.itemsize):
        width, view = codes_N.itemsize, codes_N.view(np.uint8).data
        bounds = zip((runs.starts_R * width).tolist(), (runs.ends_R * width).tolist(), strict=True)
        return [view[start:end] for start, end in bounds]
    return [gather(codes_N, edges_K).view(np.uint8).data]


def unpack_positions(encoding: Encoding, body: memoryview, size: int) -> tuple[Index, int, memoryview]:
    """The inverse of `pack_positions` for the three sparse encodings of a flat array of `size` values.

    Returns where the non-zeros are, their number P, and the rest of `body`.

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
        mask_N = np.unpackbits(bits, count=size, bitorder="little").view(np.bool_)
        return mask_N, int(np.count_nonzero(mask_N)), body[used:]
    numbers, rest = _section(body)
    if encoding is Encoding.RLE:
        runs = _runs_of_lengths(numbers, size)
        return runs, runs.count, rest
    positions_P = _positions_of_gaps(numbers, size)
    return positions_P, len(positions_P), rest


def scatter(sent_P: NDArray[Any], index: Index, out_N: NDArray[Any], *, cleared: bool) -> None:
    """Values into their places in `out_N` and zeros everywhere else; `cleared` if these are there."""
    if isinstance(index, Runs):
        if index.are_long(out_N.itemsize) and sent_P.dtype == out_N.dtype:
            _copy_runs(sent_P, index, out_N, cleared=cleared)
            return
        index = index.mask(len(out_N))
    if not cleared:
        out_N.fill(0)
    out_N[index] = sent_P


def _copy_runs(sent_P: NDArray[Any], runs: Runs, out_N: NDArray[Any], *, cleared: bool) -> None:
    # A slice of a memoryview takes half as long to make as one of an array, and there may be one every 512 bytes.
    width = out_N.itemsize
    source, target = sent_P.view(np.uint8).data, out_N.view(np.uint8).data
    taken = done = 0
    for start, end in zip((runs.starts_R * width).tolist(), (runs.ends_R * width).tolist(), strict=True):
        if not cleared:
            _clear(target, done, start)
        until = taken + end - start
        target[start:end] = source[taken:until]
        taken, done = until, end
    if not cleared:
        _clear(target, done, len(target))


def _clear(target: memoryview, start: int, end: int) -> None:
    # Copying zeros from the cache is faster than numpy's fill, which reads the target's lines first.
    while end - start > len(_ZEROS):
        target[start : start + len(_ZEROS)] = _ZEROS
        start += len(_ZEROS)
    target[start:end] = _ZEROS[: end - start]


def _edges_of_chunk(chunk: NDArray[Any]) -> NDArray[np.int64]:
    """As if zero-ness changed at the first value."""
    if len(chunk) > _PROBED:
        probed = chunk[::_PROBED] != 0
        starts = np.flatnonzero(probed[1:] != probed[:-1]) * _PROBED + _PROBED
        starts = np.concatenate([[0], starts])
        # Most often a stretch is all zeros or has none: two reductions cost two thirds of a mask.
        none_zero, all_zero = np.minimum.reduceat(chunk, starts) > 0, np.maximum.reduceat(chunk, starts) == 0
        if bool((none_zero | all_zero).all()):
            return starts
    mask = chunk != 0
    return np.concatenate([[0], np.flatnonzero(mask[1:] != mask[:-1]) + 1])


def _runs_of_edges(edges_K: NDArray[np.int64], size: int) -> Runs:
    ends_R = edges_K[1::2]
    return Runs(edges_K[::2], np.append(ends_R, size) if len(edges_K) % 2 else ends_R)


def _runs(edges_K: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Lengths of the runs, zeros first: 0 if the array starts with a non-zero, nothing for an empty array."""
    return np.diff(edges_K, prepend=0, append=size) if size else edges_K


def _gaps(edges_K: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each run: the zeros before it, and the values after its first."""
    runs = _runs_of_edges(edges_K, size)
    before_R = runs.starts_R - np.concatenate([[0], runs.ends_R])[:-1]
    return before_R, runs.ends_R - runs.starts_R - 1


def _all_gaps(edges_K: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Zeros before each non-zero (P,), counted from the non-zero before it."""
    gaps_R, rest_R = _gaps(edges_K, size)
    gaps_P = np.zeros(len(gaps_R) + int(rest_R.sum()), dtype=np.int64)
    gaps_P[np.cumsum(rest_R + 1) - rest_R - 1] = gaps_R
    return gaps_P


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


def _runs_of_lengths(lengths: NDArray[np.uint64], size: int) -> Runs:
    ends = np.cumsum(lengths)
    # A sum that wraps around 2^64 shows as an end that is not after the one before; only the first run may
    # be empty.
    if len(lengths) == 0 or bool((ends[1:] <= ends[:-1]).any()) or int(ends[-1]) != size:
        raise CodecError(f"the runs do not cover {size} values")
    edges = ends.astype(np.int64)
    stops_R = edges[1::2]
    return Runs(edges[: 2 * len(stops_R) : 2], stops_R)


def _positions_of_gaps(gaps: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    if len(gaps) == 0:
        return np.zeros(0, dtype=np.int64)
    # As above: a sum that wraps around shows as a position that is not after the one before, or too large.
    positions = gaps + np.uint64(1)
    np.cumsum(positions, out=positions)
    positions -= np.uint64(1)
    if bool((positions[1:] <= positions[:-1]).any()) or int(positions[-1]) >= size:
        raise CodecError(f"the positions do not ascend within the {size} values")
    return positions.view(np.int64)
