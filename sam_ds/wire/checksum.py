"""CRC32C: the Castagnoli polynomial (RFC 3720, appendix B.4), sure to find every burst of up to 32 changed bits.

The package folds with carry-less multiplications: as fast as memory is read, where the CRC32 instruction alone takes
three times as long.
"""

from __future__ import annotations

from fastcrc import crc32


def crc32c(data: bytes | bytearray | memoryview, before: int = 0) -> int:
    """The checksum of bytes that follow those whose checksum is `before`; nothing is copied."""
    return crc32.iscsi(data, before)
