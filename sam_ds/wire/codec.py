"""One array as bytes: the shortest of four encodings, behind a header checked before any allocation.

Layout, little endian:

| offset        | bytes   | field                                                             |
|---------------|---------|-------------------------------------------------------------------|
| 0             | 4       | magic `SAMc`                                                      |
| 4             | 4       | checksum: zlib.crc32 of everything after it, header and body      |
| 8             | 1       | version, 1                                                        |
| 9             | 1       | encoding: 0 dense, 1 rle, 2 bitmap, 3 delta-varint (`zeros.py`)   |
| 10            | 1       | values: 0 raw, 1 bf16, 2 int8, 3 varint, 4 int4 (`values.py`)     |
| 11            | 1       | dtype: index into `DTYPES`                                        |
| 12            | 1       | flags: bit 0 = the body is one zstd frame; the others are 0       |
| 13            | 1       | ndim, at most 32                                                  |
| 14            | 4       | base round: the round whose weights an update starts from         |
| 18            | 8       | length of the body, bytes                                         |
| 26            | 8 ndim  | shape                                                             |
| 26 + 8 ndim   | length  | body: [scales, float32 a row] [positions] [values]                |

The checksum sits at a fixed place and covers the whole rest, so every burst of up to 32 changed bits is
found. The encoder never writes a body longer than the dense one, so the decoder reads none: that bounds
decompression too. The checksum is against damage, not against malice: everything behind it is checked as
if it were made up.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.errors import InputError, nearest
from sam_ds.wire.values import (
    STEPS,
    Values,
    allowed,
    fixed_size,
    from_codes,
    pack_values,
    row_count,
    to_codes,
    unpack_values,
    values_size,
)
from sam_ds.wire.varint import CodecError
from sam_ds.wire.zeros import Encoding, candidate_positions, unpack_positions

__all__ = ["DTYPES", "CodecError", "Header", "decode", "decode_body", "encode", "read_header"]

MAGIC = b"SAMc"
VERSION = 1
MAX_NDIM = 32
DTYPES = tuple(
    np.dtype(name) for name in ("float32", "float64", "float16", "int32", "int64", "uint32", "uint8", "bool")
)
"""What can be sent; the position in the tuple is the code in the header."""

_HEAD = struct.Struct("<4sIBBBBBBIQ")
_CHECKED_FROM = 8
_ZSTD = 1
_ZSTD_MISSING = "needs the package zstandard: pip install 'sam-ds[zstd]'"


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What a blob says of itself, checked for sense, and its body, not yet looked at."""

    encoding: Encoding
    values: Values
    dtype: np.dtype[Any]
    compressed: bool
    shape: tuple[int, ...]
    base_round: int
    body: memoryview

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded array; an empty dimension counts as 1: numpy refuses a huge one beside it."""
        return prod(max(n, 1) for n in self.shape) * self.dtype.itemsize


def encode(
    array: NDArray[Any],
    *,
    values: str = "raw",
    base_round: int = 0,
    compress: bool = False,
    rng: np.random.Generator | None = None,
) -> bytes:
    """The array as bytes, in whichever encoding is the shortest.

    Zero means all bits zero. A mask applied as a product leaves -0.0, which is sent: mask with `np.where`.

    Args:
        array: any shape, a dtype of `DTYPES`.
        values: "raw" (lossless), "bf16", "int8" or "int4"; for float arrays. Integers and bools are always lossless.
        base_round: stored beside the array, 0..2^32 - 1.
        compress: zstd the body, and keep the result if it is shorter.
        rng: makes the rounding of "int8" and "int4" stochastic, hence unbiased.

    Raises:
        InputError: a dtype, value kind or base round that cannot be sent, these two of values that are not
            finite, or `compress` without zstandard.
    """
    if array.dtype.newbyteorder("=") not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise InputError(f"array.dtype is {array.dtype}: convert it to one of {known}")
    if array.ndim > MAX_NDIM:
        raise InputError(f"array.ndim is {array.ndim}: at most {MAX_NDIM}")
    if not 0 <= base_round < 1 << 32:
        raise InputError(f"base_round is {base_round}: must be in 0..2^32 - 1")
    dtype = array.dtype.newbyteorder("=")
    kinds = _value_kinds(values, dtype)
    codes_N, scales_R = to_codes(array, kinds[0], rng)
    encoding, kind, positions, sent = _smallest(codes_N, kinds, dtype)
    body = scales_R.tobytes() + positions + pack_values(sent, kind, dtype)
    flags = 0
    if compress:
        squeezed = _compress(body)
        if len(squeezed) < len(body):
            body, flags = squeezed, _ZSTD
    head = _HEAD.pack(
        MAGIC, 0, VERSION, encoding, kind, DTYPES.index(dtype), flags, array.ndim, base_round, len(body)
    )
    checked = head[_CHECKED_FROM:] + struct.pack(f"<{array.ndim}Q", *array.shape) + body
    return MAGIC + struct.pack("<I", zlib.crc32(checked)) + checked


def decode(blob: bytes | memoryview, *, max_bytes: int = 2**31) -> tuple[NDArray[Any], int]:
    """The array and its base round; the array owns its memory and is writeable.

    Args:
        blob: what `encode` gave.
        max_bytes: the largest decoded array that is accepted.

    Raises:
        CodecError: anything that `encode` would not have written, or an array larger than `max_bytes`.
    """
    header = read_header(blob)
    return decode_body(header, max_bytes=max_bytes), header.base_round


def read_header(blob: bytes | memoryview) -> Header:
    """What the blob says it holds, so that a receiver can refuse it before the array is allocated.

    Raises:
        CodecError: not a blob, damaged, or a combination that `encode` does not write.
    """
    view = memoryview(blob).cast("B")
    if len(view) < _HEAD.size:
        raise CodecError(f"{len(view)} bytes are too few for a header")
    fields = _HEAD.unpack_from(view)
    magic, checksum, version, encoding, kind, dtype_code, flags, ndim, base_round, length = fields
    if magic != MAGIC or version != VERSION:
        raise CodecError(f"magic {magic!r} version {version}: expected {MAGIC!r} version {VERSION}")
    if checksum != zlib.crc32(view[_CHECKED_FROM:]):
        raise CodecError("the checksum does not match")
    if encoding not in set(Encoding) or kind not in set(Values) or dtype_code >= len(DTYPES):
        raise CodecError(f"unknown encoding {encoding}, values {kind} or dtype {dtype_code}")
    if flags & ~_ZSTD or ndim > MAX_NDIM:
        raise CodecError(f"unknown flags {flags:#x} or too many dimensions ({ndim})")
    dtype = DTYPES[dtype_code]
    if not allowed(Values(kind), dtype) or (dtype.kind == "b" and encoding == Encoding.DENSE):
        raise CodecError(f"encoding {encoding} with values {kind} is not written for {dtype}")
    body_at = _HEAD.size + 8 * ndim
    if len(view) < body_at or length != len(view) - body_at:
        raise CodecError(f"the body should have {length} bytes; the blob has {len(view)}")
    return Header(
        encoding=Encoding(encoding),
        values=Values(kind),
        dtype=dtype,
        compressed=bool(flags & _ZSTD),
        shape=struct.unpack_from(f"<{ndim}Q", view, _HEAD.size),
        base_round=base_round,
        body=view[body_at:],
    )


def decode_body(header: Header, *, max_bytes: int) -> NDArray[Any]:
    """The array behind a header.

    Raises:
        CodecError: the array would be larger than `max_bytes`, or the body is not one of `header`.
    """
    if header.nbytes > max_bytes:
        raise CodecError(f"an array of {header.nbytes} bytes: at most {max_bytes} are accepted")
    size, kind, dtype = header.size, header.values, header.dtype
    rows = row_count(header.shape, size) if kind in STEPS else 0
    dense = (size + 7) // 8 if dtype.kind == "b" else 4 * rows + fixed_size(size, kind, dtype)
    if len(header.body) > dense:
        raise CodecError(f"a body of {len(header.body)} bytes where {dense} bytes always do")
    body = _decompress(header.body, at_most=dense) if header.compressed else header.body
    if len(body) < 4 * rows:
        raise CodecError(f"{len(body)} bytes are too few for {rows} scales")
    scales_R = np.frombuffer(body[: 4 * rows], dtype="<f4")
    if not bool((np.isfinite(scales_R) & (scales_R >= 0)).all()):
        raise CodecError("a scale is negative or not finite")
    body = body[4 * rows :]
    if header.encoding is Encoding.DENSE:
        codes_N = unpack_values(body, size, kind, dtype)
    else:
        index, count, body = unpack_positions(header.encoding, body, size)
        sent = unpack_values(body, count, kind, dtype)
        codes_N = np.zeros(size, dtype=sent.dtype)
        codes_N[index] = sent
    return from_codes(codes_N, scales_R, kind, dtype, header.shape)


def _value_kinds(values: str, dtype: np.dtype[Any]) -> tuple[Values, ...]:
    """The kinds to choose from; all share their codes."""
    names = {"raw": Values.RAW, "bf16": Values.BF16, "int8": Values.INT8, "int4": Values.INT4}
    if values not in names:
        raise InputError(f"values is {values!r}: must be one of {', '.join(names)}{nearest(values, names)}")
    if dtype.kind in "iu":
        return Values.RAW, Values.VARINT
    if dtype.kind == "b":
        return (Values.RAW,)
    if not allowed(names[values], dtype):
        raise InputError(f"values is {values!r}: it saves nothing on {dtype}, send it raw")
    return (names[values],)


def _smallest(
    codes_N: NDArray[Any], kinds: tuple[Values, ...], dtype: np.dtype[Any]
) -> tuple[Encoding, Values, bytes, NDArray[Any]]:
    """Encoding, value kind, positions section and codes to send of the shortest body; the simpler on ties."""
    mask_N = codes_N != 0
    sent_P = codes_N[mask_N]
    options: list[tuple[Encoding, Values, bytes, NDArray[Any]]] = []
    if dtype.kind != "b":
        options += [(Encoding.DENSE, kind, b"", codes_N) for kind in kinds]
    if dtype.kind == "b" or len(sent_P) < len(codes_N):
        for encoding, positions in candidate_positions(mask_N):
            options += [(encoding, kind, positions, sent_P) for kind in kinds]
    return min(options, key=lambda option: len(option[2]) + values_size(option[3], option[1], dtype))


def _compress(body: bytes) -> bytes:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"compress=True {_ZSTD_MISSING}") from None
    return zstandard.ZstdCompressor().compress(body)


def _decompress(body: memoryview, *, at_most: int) -> memoryview:
    try:
        import zstandard
    except ImportError:
        # A peer decides what it sends: its choice must not look like a configuration error of the receiver.
        raise CodecError(f"a compressed blob {_ZSTD_MISSING}") from None
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= at_most:
            raise CodecError(f"a frame of {size} bytes (-1: unknown): at most {at_most} are accepted")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"the frame cannot be decompressed: {error}") from None
    return memoryview(plain)
