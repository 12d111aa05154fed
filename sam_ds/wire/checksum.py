"""CRC32C: the Castagnoli polynomial (RFC 3720, appendix B.4), which CPUs have an instruction for.

Nearly twice as fast as zlib's CRC32, five times on what is in the cache, and, like it, sure to find every burst of up
to 32 changed bits.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from numpy.typing import NDArray


def crc32c(data: bytes | memoryview | NDArray[np.uint8], before: int = 0) -> int:
    """The checksum of bytes that follow those whose checksum is `before`; nothing is copied."""
    # Of the types with a buffer the package takes only bytes and arrays.
    return int(google_crc32c.extend(before, np.frombuffer(data, dtype=np.uint8)))
