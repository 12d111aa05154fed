"""One array as bytes, and back: the shortest of four encodings of its zeros (`zeros.py`) and the chosen kind of values
(`values.py`), behind the header of `header.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.errors import InputError, nearest
from sam_ds.wire.header import DTYPES, MAX_NDIM, Draft, Header, make_draft, read_header
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
from sam_ds.wire.zstd import decompressed

__all__ = ["DTYPES", "CodecError", "Header", "decode", "decode_body", "encode", "encode_into", "read_header"]


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
        InputError: as `encode`, or `out` is too small or not writeable.
    """
    view = memoryview(out).cast("B")
    draft = _draft(array, values, base_round, compress, rng)
    if len(view) < draft.nbytes or view.readonly:
        raise InputError(f"out has {len(view)} bytes{' that are fixed' * view.readonly}: the blob needs {draft.nbytes}")
    draft.write(view)
    return draft.nbytes


def value_kinds(values: str, dtype: np.dtype[Any], ndim: int, base_round: int) -> tuple[Values, ...]:
    """The kinds to choose from; all share their codes.

    Raises:
        InputError: a dtype, value kind, number of dimensions or base round that cannot be sent.
    """
    if ndim > MAX_NDIM:
        raise InputError(f"array.ndim is {ndim}: at most {MAX_NDIM}")
    if not 0 <= base_round < 1 << 32:
        raise InputError(f"base_round is {base_round}: must be in 0..2^32 - 1")
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


def decode_body(
    header: Header, *, max_bytes: int, out: NDArray[Any] | None = None, copy: bool = True
) -> NDArray[Any]:
    """The array behind a header; `out` as for `decode`. Without `copy` it is a read-only view of the blob where the
    blob holds the array as it is.

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
    as_it_is = header.encoding is Encoding.DENSE and kind is Values.RAW and not header.compressed
    if as_it_is and not copy and out is None and len(header.body) == header.nbytes:
        view: NDArray[Any] = np.frombuffer(header.body, dtype)
        if view.flags.aligned:
            return view.reshape(header.shape)
    rounded = kind is Values.BF16 or kind in STEPS
    rows = row_count(header.shape, size) if kind in STEPS else 0
    dense = (size + 7) // 8 if dtype.kind == "b" else 4 * rows + fixed_size(size, kind, dtype)
    if len(header.body) > dense:
        raise CodecError(f"a body of {len(header.body)} bytes where {dense} bytes always do")
    body = decompressed(header.body, at_most=dense) if header.compressed else header.body
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
    kinds = value_kinds(values, dtype, array.ndim, base_round)
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
