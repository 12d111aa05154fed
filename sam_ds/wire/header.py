"""The header of a blob: what an array on the wire says of itself, checked before any allocation.

Layout, little endian:

| offset        | bytes   | field                                                             |
|---------------|---------|-------------------------------------------------------------------|
| 0             | 4       | magic `SAMc`                                                      |
| 4             | 4       | checksum: CRC32C of everything after it, header and body          |
| 8             | 1       | version, 3                                                        |
| 9             | 1       | encoding: 0 dense, 1 rle, 2 bitmap, 3 delta-varint (`zeros.py`)   |
| 10            | 1       | values: 0 raw, 1 bf16, 2 int8, 3 varint, 4 int4 (`values.py`)     |
| 11            | 1       | dtype: index into `DTYPES`                                        |
| 12            | 1       | flags: bit 0 = the body is one zstd frame; the others are 0       |
| 13            | 1       | ndim, at most 32                                                  |
| 14            | 4       | base round: the round whose weights an update starts from         |
| 18            | 8       | length of the body, bytes                                         |
| 26            | 2       | zero: the body of an aligned blob is aligned for float32          |
| 28            | 8 ndim  | shape                                                             |
| 28 + 8 ndim   | length  | body: [scales, float32 a row] [positions] [values]                |

The checksum sits at a fixed place and covers the whole rest, so every burst of up to 32 changed bits is
found. The encoder never writes a body longer than the dense one, so the decoder reads none: that bounds
decompression too. The checksum is against damage, not against malice: everything behind it is checked as
if it were made up.

The version is raised whenever bytes that were written before would no longer be read as the same array, and a decoder
reads its own version only: both ends of a federation run one release, and nothing is kept on disk in this form.
Version 2 has another checksum than version 1, version 3 a header of two bytes more. `tests/golden/` holds a blob of
every encoding and kind of values, which must be written and read bit for bit as long as the version stays.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from io import BytesIO
from math import prod
from typing import Any

import numpy as np

from sam_ds.wire.checksum import crc32c
from sam_ds.wire.values import Values, allowed
from sam_ds.wire.varint import CodecError
from sam_ds.wire.zeros import Encoding
from sam_ds.wire.zstd import compressed

MAGIC = b"SAMc"
VERSION = 3
MAX_NDIM = 32
DTYPES = tuple(
    np.dtype(name) for name in ("float32", "float64", "float16", "int32", "int64", "uint32", "uint8", "bool")
)
"""What can be sent; the position in the tuple is the code in the header."""

_HEAD = struct.Struct("<4sIBBBBBBIQH")
LENGTH_AT, SHAPE_AT = 18, _HEAD.size
"""Offsets of the body's length and of the shape."""
_CHECKED_FROM = 8
_CACHED = 1 << 18
"""Bytes that are still in the cache when the checksum reads what was just copied."""
_ENCODINGS = {encoding.value: encoding for encoding in Encoding}
_KINDS = {kind.value: kind for kind in Values}
_ZSTD = 1


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
    nbytes: int
    """Bytes of the blob."""

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


def read_header(blob: bytes | memoryview) -> Header:
    """What the blob says it holds, so that a receiver can refuse it before the array is allocated.

    Raises:
        CodecError: not a blob, damaged, or a combination that `encode` does not write.
    """
    view = memoryview(blob).cast("B")
    if len(view) < _HEAD.size:
        raise CodecError(f"{len(view)} bytes are too few for a header")
    fields = _HEAD.unpack_from(view)
    magic, checksum, version, encoding, kind, dtype_code, flags, ndim, base_round, length, zero = fields
    if magic != MAGIC or version != VERSION:
        raise CodecError(f"magic {magic!r} version {version}: expected {MAGIC!r} version {VERSION}")
    if checksum != crc32c(view[_CHECKED_FROM:]):
        raise CodecError("the checksum does not match")
    if encoding not in _ENCODINGS or kind not in _KINDS or dtype_code >= len(DTYPES):
        raise CodecError(f"unknown encoding {encoding}, values {kind} or dtype {dtype_code}")
    if flags & ~_ZSTD or zero or ndim > MAX_NDIM:
        raise CodecError(f"unknown flags {flags:#x}, {zero:#x} or too many dimensions ({ndim})")
    dtype = DTYPES[dtype_code]
    if not allowed(_KINDS[kind], dtype) or (dtype.kind == "b" and encoding == Encoding.DENSE):
        raise CodecError(f"encoding {encoding} with values {kind} is not written for {dtype}")
    body_at = SHAPE_AT + 8 * ndim
    if len(view) < body_at or length != len(view) - body_at:
        raise CodecError(f"the body should have {length} bytes; the blob has {len(view)}")
    return Header(
        encoding=_ENCODINGS[encoding],
        values=_KINDS[kind],
        dtype=dtype,
        compressed=bool(flags & _ZSTD),
        shape=struct.unpack_from(f"<{ndim}Q", view, SHAPE_AT),
        base_round=base_round,
        body=view[body_at:],
    )


def make_draft(
    sections: list[memoryview], encoding: Encoding, kind: Values, dtype: np.dtype[Any], shape: tuple[int, ...],
    base_round: int, compress: bool,
) -> Draft:  # fmt: skip
    """The header for these sections of a body; with `compress` they become one frame if that is shorter.

    Raises:
        InputError: `compress` without zstandard.
    """
    flags, length = 0, sum(section.nbytes for section in sections)
    if compress:
        squeezed = compressed(b"".join(sections))
        if len(squeezed) < length:
            sections, flags, length = [memoryview(squeezed)], _ZSTD, len(squeezed)
    head = _HEAD.pack(
        MAGIC, 0, VERSION, encoding, kind, DTYPES.index(dtype), flags, len(shape), base_round, length, 0
    )
    head += struct.pack(f"<{len(shape)}Q", *shape)
    return Draft(head=head, sections=sections, nbytes=len(head) + length)
