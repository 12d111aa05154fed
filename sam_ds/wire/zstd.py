"""A body as one zstd frame; the package is an extra."""

from __future__ import annotations

from sam_ds.errors import InputError
from sam_ds.wire.varint import CodecError

_MISSING = "needs the package zstandard: pip install 'sam-ds[zstd]'"


def compressed(body: bytes) -> bytes:
    """The frame. Raises InputError without zstandard."""
    try:
        import zstandard
    except ImportError:
        raise InputError(f"compress=True {_MISSING}") from None
    return zstandard.ZstdCompressor().compress(body)


def decompressed(body: memoryview, *, at_most: int) -> memoryview:
    """The body of a frame. Raises CodecError where it is none, is longer than `at_most` bytes, or without zstandard."""
    try:
        import zstandard
    except ImportError:
        # A peer decides what it sends: its choice must not look like a configuration error of the receiver.
        raise CodecError(f"a compressed blob {_MISSING}") from None
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= at_most:
            raise CodecError(f"a frame of {size} bytes (-1: unknown): at most {at_most} are accepted")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"the frame cannot be decompressed: {error}") from None
    return memoryview(plain)
