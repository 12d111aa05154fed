"""What is sent for a value: its own bits, 16 of them, 8 or 4 of them with a scale per row, or a varint.

Every array is first turned into flat integer *codes* in which 0 stands for the all-zero bit pattern, so
that the zero encodings (`zeros.py`) work on floats, quantised floats and counters alike, and -0.0 and NaN
payloads survive `raw`.

- `raw`: the bits, little endian; a bool needs no bytes at all, its position is its value.
- `bf16`: the upper half of the float32 (a float64 is rounded to float32 first), round to nearest, ties to
  even.
- `int8`: x ~ code * scale, one float32 scale = absmax / 127 per row (`row_count`). With a generator the
  rounding is stochastic, floor(x / scale + u), u ~ U[0, 1): E[decoded] = x (as QSGD, 1610.02132).
- `int4`: the same with absmax / 7, two codes a byte, the first in the low half.
- `varint`: integers only; signed ones zigzag-folded (0, -1, 1, -2 -> 0, 1, 2, 3) as in Protocol Buffers.

Shape legend: N values of the flat array, R rows.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sam_ds.errors import InputError
from sam_ds.wire.varint import CodecError, decode_varints, encode_varints, varint_bytes


class Values(IntEnum):
    RAW = 0
    BF16 = 1
    INT8 = 2
    VARINT = 3
    INT4 = 4


STEPS = {Values.INT8: 127, Values.INT4: 7}
"""The largest code of the kinds with a scale per row."""
_ROW = 64
"""Values that a scale is at least for, where the shape allows it."""
_TOGETHER = 1 << 15
"""Values rounded together."""


def allowed(kind: Values, dtype: np.dtype[Any]) -> bool:
    """Whether an array of `dtype` may be sent as `kind`: not where that saves nothing, as a varint of one byte or bf16
    of a float16."""
    if kind is Values.RAW:
        return True
    if kind is Values.VARINT:
        return dtype.kind in "iu" and dtype.itemsize > 1
    return dtype.kind == "f" and not (kind is Values.BF16 and dtype.itemsize == 2)


def code_dtype(kind: Values, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of the codes of an array of `dtype` sent as `kind`."""
    if kind is Values.BF16:
        return np.dtype("<u2")
    if kind in STEPS:
        return np.dtype("i1")
    return np.dtype(f"<u{dtype.itemsize}")


def row_count(shape: tuple[int, ...], size: int) -> int:
    """R: scales of an `int8` or `int4` array of `shape` and `size` values; 1 for a scalar, 0 for an empty array.

    A row is one of the last axis, or as many together as have 64 values: beside 16 values of 4 bits, a scale of their
    own would be a third of all.
    """
    if not shape or not size:
        return min(size, 1)
    together = 1
    if len(shape) > 1:
        divisors = [count for count in range(1, 65) if shape[-2] % count == 0]
        together = next((count for count in divisors if count * shape[-1] >= _ROW), divisors[-1])
    return size // (shape[-1] * together)


def to_codes(
    array: NDArray[Any], kind: Values, rng: np.random.Generator | None
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Codes (N,), contiguous and unsigned, and scales (R,), the latter empty unless `kind` has scales.

    Raises:
        InputError: INT8 or INT4 of a value that is not finite or too large for a float32 scale.
    """
    no_scales = np.zeros(0, dtype=np.float32)
    flat = np.ascontiguousarray(array).reshape(-1)
    if kind is Values.BF16:
        return _to_halves(flat), no_scales
    if kind in STEPS:
        codes_N, scales_R = _to_steps(flat, row_count(array.shape, array.size), kind, rng)
        return codes_N.view(np.uint8), scales_R
    little = flat.astype(array.dtype.newbyteorder("<"), copy=False)
    return little.view(code_dtype(kind, array.dtype)), no_scales


def from_codes(codes_N: NDArray[Any], scales_R: NDArray[np.float32], kind: Values, out: NDArray[Any]) -> None:
    """The inverse of `to_codes` (up to its rounding) for the kinds that round, into a contiguous array."""
    if not out.size:
        return
    if kind is Values.BF16:
        bits = codes_N.astype("<u4")
        bits <<= 16
        with np.errstate(invalid="ignore"):
            out[...] = bits.view("<f4").reshape(out.shape)
        return
    rows = max(len(scales_R), 1)
    # A code times a float32 is exact in float64; rounded to float32 at once it is the same, in half the memory.
    exact = out if out.dtype == np.float32 else np.empty(out.shape)
    with np.errstate(over="ignore"):
        np.multiply(codes_N.reshape(rows, -1), scales_R[:, None], dtype=exact.dtype, out=exact.reshape(rows, -1))
    # A scale is rounded up, so the row's maximum may land just above the largest finite number.
    largest = float(np.finfo(out.dtype).max)
    np.clip(exact, -largest, largest, out=exact)
    if exact is not out:
        out[...] = exact


def values_size(codes_N: NDArray[Any], nonzeros: int, kind: Values, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Bytes of the values section: of all codes, and of those that are not 0."""
    if dtype.kind == "b":
        return 0, 0
    if kind is Values.VARINT:
        every = varint_bytes(_fold(codes_N, dtype))
        return every, every - (len(codes_N) - nonzeros)
    return fixed_size(len(codes_N), kind, dtype), fixed_size(nonzeros, kind, dtype)


def fixed_size(count: int, kind: Values, dtype: np.dtype[Any]) -> int:
    """Bytes of `count` codes of a kind whose codes are all as long; of a varint, those of the bits it stands for."""
    return (count + 1) // 2 if kind is Values.INT4 else count * code_dtype(kind, dtype).itemsize


def pack_values(codes: NDArray[Any], kind: Values, dtype: np.dtype[Any]) -> memoryview:
    """The values section of a kind whose bytes are not the codes' own: the codes that are sent, one after the other."""
    if dtype.kind == "b":
        return memoryview(b"")
    if kind is Values.VARINT:
        return memoryview(encode_varints(_fold(codes, dtype)))
    assert kind is Values.INT4
    return _nibbles(codes).data


def unpack_values(data: memoryview, count: int, kind: Values, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The `count` codes of a values section that must hold exactly these; where it can be, a view of it.

    Raises:
        CodecError: another number of values than `count`, or one outside the range of `dtype`.
    """
    codes_as = code_dtype(kind, dtype)
    if dtype.kind == "b":
        if len(data):
            raise CodecError(f"{len(data)} bytes follow the positions of a bool array")
        return np.ones(count, dtype=codes_as)
    if kind is Values.VARINT:
        folded = decode_varints(data)
        if len(folded) != count:
            raise CodecError(f"{len(folded)} values, {count} were announced")
        if int(folded.max(initial=0)) >= 1 << (8 * dtype.itemsize):
            raise CodecError(f"a value does not fit {dtype}")
        return _unfold(folded, dtype).astype(codes_as)
    if len(data) != fixed_size(count, kind, dtype):
        raise CodecError(f"{len(data)} bytes of values, {fixed_size(count, kind, dtype)} were announced")
    if kind is Values.INT4:
        return _from_nibbles(np.frombuffer(data, dtype=np.uint8), count)
    codes = np.frombuffer(data, dtype=codes_as)
    if kind is Values.INT8 and bool((codes == -128).any()):
        raise CodecError("a byte that no code is written as")
    return codes


def _nibbles(codes: NDArray[Any]) -> NDArray[np.uint8]:
    halves = np.zeros(codes.size + codes.size % 2, dtype=np.uint8)
    halves[: codes.size] = codes & np.uint8(0xF)
    packed: NDArray[np.uint8] = halves[::2] | (halves[1::2] << np.uint8(4))
    return packed


def _from_nibbles(packed: NDArray[np.uint8], count: int) -> NDArray[np.int8]:
    halves = np.stack([packed & 0xF, packed >> 4], axis=1).reshape(-1)
    if halves[count:].any() or (halves == 8).any():
        raise CodecError("a half byte that no code is written as")
    codes: NDArray[np.int8] = (halves[:count] ^ np.uint8(8)).astype(np.int8) - np.int8(8)
    return codes


def _to_halves(flat: NDArray[Any]) -> NDArray[np.uint16]:
    halves_N = np.empty(flat.size, dtype="<u2")
    for start in range(0, flat.size, _TOGETHER):
        some = slice(start, start + _TOGETHER)
        # What is too large becomes infinity; a signalling NaN is cast with a warning.
        with np.errstate(over="ignore", invalid="ignore"):
            bits = flat[some].astype("<f4", copy=False).view("<u4")
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
        # Rounding could carry a NaN's payload into infinity or zero: keep it a (quiet) NaN instead.
        is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
        halves_N[some] = np.where(is_nan, (bits >> 16) | 0x0040, rounded)
    return halves_N


def _to_steps(
    flat: NDArray[Any], rows: int, kind: Values, rng: np.random.Generator | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    codes_N, scales_R = np.empty(flat.size, dtype=np.int8), np.empty(rows, dtype="<f4")
    if not flat.size:
        return codes_N, scales_R
    wide, codes = flat.reshape(rows, -1), codes_N.reshape(rows, -1)
    # A few rows at a time: the steps between are in float64, and stay in the cache.
    together = max(1, _TOGETHER // wide.shape[1])
    for start in range(0, rows, together):
        some = slice(start, start + together)
        codes[some], scales_R[some] = _round_rows(wide[some].astype(np.float64), kind, rng)
    return codes_N, scales_R


def _round_rows(
    exact: NDArray[np.float64], kind: Values, rng: np.random.Generator | None
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    steps = STEPS[kind]
    absmax_R = np.abs(exact).max(axis=1)
    if not bool((absmax_R <= float(np.finfo(np.float32).max)).all()):
        raise InputError(f"values={kind.name.lower()!r} needs finite values that fit float32: send the array raw")
    scales_R = (absmax_R / steps).astype("<f4")
    # Rounded down, |x| / scale could exceed the largest code and be cut, which would bias the largest value of a row.
    short_R = scales_R.astype(np.float64) * steps < absmax_R
    scales_R[short_R] = np.nextafter(scales_R[short_R], np.float32(np.inf))
    exact /= np.where(scales_R > 0, scales_R, 1).astype(np.float64)[:, None]
    rounded = np.rint(exact, out=exact) if rng is None else np.floor(exact + rng.random(exact.shape), out=exact)
    return np.clip(rounded, -steps, steps, out=rounded), scales_R


def _fold(codes: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[np.uint64]:
    if dtype.kind == "u":
        return codes.astype(np.uint64)
    signed: NDArray[np.int64] = codes.view(_signed(dtype)).astype(np.int64)
    return ((signed << 1) ^ (signed >> 63)).view(np.uint64)


def _unfold(folded: NDArray[np.uint64], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "u":
        return folded
    magnitude: NDArray[Any] = (folded >> np.uint64(1)).view(np.int64)
    return magnitude ^ -(folded & np.uint64(1)).view(np.int64)


def _signed(dtype: np.dtype[Any]) -> DTypeLike:
    return f"<i{dtype.itemsize}"
