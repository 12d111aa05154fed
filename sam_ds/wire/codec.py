"""One array as bytes: the shortest of four encodings, behind a header checked before any allocation.

Layout, little endian:

| offset        | bytes   | field                                                             |
|---------------|---------|-------------------------------------------------------------------|
| 0             | 4       | magic `SAMc`                                                      |
| 4             | 4       | checksum: CRC32C of everything after it, header and body          |
| 8             | 1       | version, 2                                                        |
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

The version is raised whenever bytes that were written before would no longer be read as the same array, and a decoder
reads its own version only: both ends of a federation run one release, and nothing is kept on disk in this form.
Version 2 has another checksum than version 1. `tests/golden/` holds a blob of every encoding and kind of values, which
must be written and read bit for bit as long as the version stays.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.errors import InputError, nearest
from sam_ds.wire.checksum import crc32c
from sam_ds.wire.values import (
    STEPS,
    Values,
    allowed,
    code_dtype,
    fixed_size,
    from_codes,
    pack_values,
    row_count,
    to_codes,
    unpack_values,
    values_size,
)
from sam_ds.wire.varint import CodecError
from sam_ds.wire.zeros import (
    Encoding,
    count_nonzeros,
    find_edges,
    gather,
    gather_bytes,
    pack_positions,
    scatter,
    sparse_sizes,
    unpack_positions,
)

__all__ = ["DTYPES", "CodecError", "Header", "decode", "decode_body", "encode", "encode_into", "read_header"]

MAGIC = b"SAMc"
VERSION = 2
MAX_NDIM = 32
DTYPES = tuple(
    np.dtype(name) for name in ("float32", "float64", "float16", "int32", "int64", "uint32", "uint8", "bool")
)
"""What can be sent; the position in the tuple is the code in the header."""

_HEAD = struct.Struct("<4sIBBBBBBIQ")
_CHECKED_FROM = 8
_CACHED = 1 << 18
"""Bytes that are still in the cache when the checksum reads what was just copied."""
_ENCODINGS = {encoding.value: encoding for encoding in Encoding}
_KINDS = {kind.value: kind for kind in Values}
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A blob but for its checksum, in pieces: what is behind the header is not copied until it is written."""

    head: bytes
    sections: list[memoryview]

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return len(self.head) + sum(section.nbytes for section in self.sections)

    def write(self, view: memoryview) -> None:
        """The blob into the first `nbytes` of the view, which is writeable bytes."""
        view[: len(self.head)] = self.head
        checksum, checked, at = 0, _CHECKED_FROM, len(self.head)
        for section in self.sections:
            view[at : at + section.nbytes] = section
            at += section.nbytes
            if at - checked >= _CACHED:
                checksum, checked = crc32c(view[checked:at], checksum), at
        struct.pack_into("<I", view, len(MAGIC), crc32c(view[checked:at], checksum))

    def to_bytes(self) -> bytes:
        """The blob."""
        stream = BytesIO()
        stream.seek(self.nbytes - 1)
        stream.write(b"\0")
        with stream.getbuffer() as view:
            self.write(view)
        # Not a copy: the buffer itself, now that nobody can write to it.
        return stream.getvalue()


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
    return _draft(array, values, base_round, compress, rng).to_bytes()


def encode_into(
    array: NDArray[Any],
    out: bytearray | memoryview,
    *,
    values: str = "raw",
    base_round: int = 0,
    compress: bool = False,
    rng: np.random.Generator | None = None,
) -> int:
    """As `encode`, into the first bytes of `out`; their number.

    Raises:
        InputError: as `encode`, or `out` is too small.
    """
    draft = _draft(array, values, base_round, compress, rng)
    view = memoryview(out).cast("B")
    if len(view) < draft.nbytes:
        raise InputError(f"out has {len(view)} bytes: the blob needs {draft.nbytes}")
    draft.write(view)
    return draft.nbytes


def make_draft(
    sections: list[memoryview], encoding: Encoding, kind: Values, dtype: np.dtype[Any], shape: tuple[int, ...],
    base_round: int, compress: bool,
) -> Draft:  # fmt: skip
    """The header for these sections of a body.

    Raises:
        InputError: a shape or base round that cannot be sent, or `compress` without zstandard.
    """
    if len(shape) > MAX_NDIM:
        raise InputError(f"array.ndim is {len(shape)}: at most {MAX_NDIM}")
    if not 0 <= base_round < 1 << 32:
        raise InputError(f"base_round is {base_round}: must be in 0..2^32 - 1")
    flags, length = 0, sum(section.nbytes for section in sections)
    if compress:
        squeezed = _compress(b"".join(sections))
        if len(squeezed) < length:
            sections, flags, length = [memoryview(squeezed)], _ZSTD, len(squeezed)
    head = _HEAD.pack(
        MAGIC, 0, VERSION, encoding, kind, DTYPES.index(dtype), flags, len(shape), base_round, length
    )
    return Draft(head=head + struct.pack(f"<{len(shape)}Q", *shape), sections=sections)


def value_kinds(values: str, dtype: np.dtype[Any]) -> tuple[Values, ...]:
    """The kinds to choose from; all share their codes.

    Raises:
        InputError: a dtype or value kind that cannot be sent.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(dtype) for dtype in DTYPES)
        raise InputError(f"array.dtype is {dtype}: convert it to one of {known}")
    names = {"raw": Values.RAW, "bf16": Values.BF16, "int8": Values.INT8, "int4": Values.INT4}
    if values not in names:
        raise InputError(f"values is {values!r}: must be one of {', '.join(names)}{nearest(values, names)}")
    if dtype.kind in "iu":
        return tuple(kind for kind in (Values.RAW, Values.VARINT) if allowed(kind, dtype))
    if dtype.kind == "b":
        return (Values.RAW,)
    if not allowed(names[values], dtype):
        raise InputError(f"values is {values!r}: it saves nothing on {dtype}, send it raw")
    return (names[values],)


def decode(
    blob: bytes | memoryview, *, max_bytes: int = 2**31, out: NDArray[Any] | None = None
) -> tuple[NDArray[Any], int]:
    """The array and its base round; the array owns its memory and is writeable, or is `out`.

    Args:
        blob: what `encode` gave.
        max_bytes: the largest decoded array that is accepted.
        out: a contiguous array of the shape and dtype that the blob must have, whose values do not matter; after an
            error it holds anything.

    Raises:
        CodecError: anything that `encode` would not have written, an array larger than `max_bytes`, or one of another
            shape or dtype than `out`.
        InputError: `out` is not contiguous or not writeable.
    """
    header = read_header(blob)
    return decode_body(header, max_bytes=max_bytes, out=out), header.base_round


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
    if checksum != crc32c(view[_CHECKED_FROM:]):
        raise CodecError("the checksum does not match")
    if encoding not in _ENCODINGS or kind not in _KINDS or dtype_code >= len(DTYPES):
        raise CodecError(f"unknown encoding {encoding}, values {kind} or dtype {dtype_code}")
    if flags & ~_ZSTD or ndim > MAX_NDIM:
        raise CodecError(f"unknown flags {flags:#x} or too many dimensions ({ndim})")
    dtype = DTYPES[dtype_code]
    if not allowed(_KINDS[kind], dtype) or (dtype.kind == "b" and encoding == Encoding.DENSE):
        raise CodecError(f"encoding {encoding} with values {kind} is not written for {dtype}")
    body_at = _HEAD.size + 8 * ndim
    if len(view) < body_at or length != len(view) - body_at:
        raise CodecError(f"the body should have {length} bytes; the blob has {len(view)}")
    return Header(
        encoding=_ENCODINGS[encoding],
        values=_KINDS[kind],
        dtype=dtype,
        compressed=bool(flags & _ZSTD),
        shape=struct.unpack_from(f"<{ndim}Q", view, _HEAD.size),
        base_round=base_round,
        body=view[body_at:],
    )


def decode_body(header: Header, *, max_bytes: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
    """The array behind a header; `out` as for `decode`.

    Raises:
        CodecError: the array would be larger than `max_bytes` or another than `out`, or the body is not one of
            `header`.
    """
    if header.nbytes > max_bytes:
        raise CodecError(f"an array of {header.nbytes} bytes: at most {max_bytes} are accepted")
    size, kind, dtype = header.size, header.values, header.dtype
    if out is not None:
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise InputError("out must be contiguous and writeable")
        if out.shape != header.shape or out.dtype != dtype:
            raise CodecError(f"an array of {dtype} {header.shape} where {out.dtype} {out.shape} was expected")
    rounded = kind is Values.BF16 or kind in STEPS
    rows = row_count(header.shape, size) if kind in STEPS else 0
    dense = (size + 7) // 8 if dtype.kind == "b" else 4 * rows + fixed_size(size, kind, dtype)
    if len(header.body) > dense:
        raise CodecError(f"a body of {len(header.body)} bytes where {dense} bytes always do")
    body = _decompress(header.body, at_most=dense) if header.compressed else header.body
    if len(body) < 4 * rows:
        raise CodecError(f"{len(body)} bytes are too few for {rows} scales")
    scales_R = np.frombuffer(body[: 4 * rows], dtype="<f4")
    if rows and not bool((np.isfinite(scales_R) & (scales_R >= 0)).all()):
        raise CodecError("a scale is negative or not finite")
    body = body[4 * rows :]
    index, count = None, size
    if header.encoding is not Encoding.DENSE:
        index, count, body = unpack_positions(header.encoding, body, size)
    sent_P = unpack_values(body, count, kind, dtype)
    array = out if out is not None else (np.empty if index is None else np.zeros)(header.shape, dtype)
    if rounded:
        codes_N = sent_P if index is None else np.zeros(size, code_dtype(kind, dtype))
    else:
        codes_N = array.reshape(-1).view(f"u{dtype.itemsize}")
    if index is not None:
        scatter(sent_P, index, codes_N, cleared=rounded or out is None)
    elif not rounded:
        codes_N[...] = sent_P
    if rounded:
        from_codes(codes_N, scales_R, kind, array)
    return array


def _draft(
    array: NDArray[Any], values: str, base_round: int, compress: bool, rng: np.random.Generator | None
) -> Draft:
    dtype = array.dtype.newbyteorder("=")
    kinds = value_kinds(values, dtype)
    codes_N, scales_R = to_codes(array, kinds[0], rng)
    edges_K = find_edges(codes_N)
    size = len(codes_N)
    nonzeros = int(np.count_nonzero(codes_N)) if edges_K is None else count_nonzeros(edges_K, size)
    lengths = {kind: values_size(codes_N, nonzeros, kind, dtype) for kind in kinds}
    positions = sparse_sizes(edges_K, nonzeros, size) if nonzeros < size or dtype.kind == "b" else {}
    encoding, kind = choose(positions, lengths, dtype)
    sections = [scales_R.view(np.uint8).data, memoryview(pack_positions(encoding, codes_N, edges_K))]
    if kind in (Values.VARINT, Values.INT4) or dtype.kind == "b":
        sent = codes_N if encoding is Encoding.DENSE else gather(codes_N, edges_K)
        sections.append(pack_values(sent, kind, dtype))
    elif encoding is Encoding.DENSE:
        sections.append(codes_N.view(np.uint8).data)
    else:
        sections += gather_bytes(codes_N, edges_K)
    return make_draft(sections, encoding, kind, dtype, array.shape, base_round, compress)


def choose(
    positions: dict[Encoding, int], values: dict[Values, tuple[int, int]], dtype: np.dtype[Any]
) -> tuple[Encoding, Values]:
    """Encoding and kind of the shortest body, the simpler on ties: of the bytes of the positions, nothing where no
    value is zero, and for each kind the bytes of all values and of the non-zeros."""
    # A bool's position is its value, so there is no dense one.
    sizes = {} if dtype.kind == "b" else {(Encoding.DENSE, kind): every for kind, (every, _) in values.items()}
    for encoding, section in positions.items():
        sizes |= {(encoding, kind): section + sparse for kind, (_, sparse) in values.items()}
    return min(sizes, key=sizes.__getitem__)


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
