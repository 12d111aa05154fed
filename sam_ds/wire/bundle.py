"""Blobs by name as one: Flower stores, sends and acknowledges every array of a message on its own, which takes it
milliseconds and a message has hundreds.

Layout, little endian:

| offset     | bytes | field                                                                                |
|------------|-------|--------------------------------------------------------------------------------------|
| 0          | 4     | number of blobs n                                                                    |
| 4          | 4     | length of the names N                                                                |
| 8          | 8 n   | length of each blob                                                                  |
| 8 + 8 n    | N     | the names, a line feed behind each                                                   |
|            |       | each blob, after zeros up to a multiple of 4, so that its float32 values are aligned |

Each blob has its own checksum; a name or a length that is damaged is of no blob that was asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from sam_ds.wire.varint import CodecError

_HEAD = struct.Struct("<II")


def bundle(blobs: Mapping[str, bytes | memoryview]) -> bytes:
    """The blobs, in their order; nothing where there are none. Names have no line feeds."""
    if not blobs:
        return b""
    names = "".join(f"{name}\n" for name in blobs).encode()
    assert names.count(b"\n") == len(blobs), "a line feed in a name"
    pieces: list[bytes | memoryview] = [
        _HEAD.pack(len(blobs), len(names)), struct.pack(f"<{len(blobs)}Q", *map(len, blobs.values())), names,
    ]  # fmt: skip
    at = sum(map(len, pieces))
    for blob in blobs.values():
        gap = -at % 4
        pieces += [bytes(gap), blob]
        at += gap + len(blob)
    return b"".join(pieces)


def unbundle(data: bytes | memoryview) -> dict[str, memoryview]:
    """The blobs as views of the bundle. Raises CodecError for anything that `bundle` would not have written."""
    view = memoryview(data).cast("B")
    if not len(view):
        return {}
    if len(view) < _HEAD.size:
        raise CodecError(f"{len(view)} bytes are too few for a bundle")
    count, length = _HEAD.unpack_from(view)
    at = _HEAD.size + 8 * count + length
    if count == 0 or at > len(view):
        raise CodecError(f"{count} blobs with names of {length} bytes do not fit in {len(view)} bytes")
    lengths = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
    try:
        *names, rest = str(view[at - length : at], "utf-8").split("\n")
    except UnicodeDecodeError:
        raise CodecError("the names of a bundle are not UTF-8") from None
    if rest or len(names) != count or len(set(names)) != count:
        raise CodecError(f"{len(set(names))} names of {count} blobs")
    blobs = {}
    for name, size in zip(names, lengths, strict=True):
        start = at + -at % 4
        if start + size > len(view) or any(view[at:start]):
            raise CodecError(f"the blob {name[:80]!r} of {size} bytes does not lie in the bundle")
        at = start + size
        blobs[name] = view[start:at]
    if at != len(view):
        raise CodecError(f"{len(view) - at} bytes follow the last blob of a bundle")
    return blobs
