"""A tensor encoded where it lies: of a tensor on a GPU, what crosses the bus is the blob and not the array.

The same bytes as `codec.encode` of the same values; the steps are those of `zeros.py` and `varint.py`, in torch. What
must draw or scale (int8, int4) and the few integers of a message are encoded on the host. A client's update comes from
its engine on the host, in fp32, so `sam_ds.federation` does not pass here.

Shape legend as in `zeros.py` and `varint.py`: N values, P non-zeros, R runs, K edges, V varints, B bytes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sam_ds.errors import InputError
from sam_ds.wire.codec import choose, encode, value_kinds
from sam_ds.wire.header import DTYPES, make_draft
from sam_ds.wire.values import Values, fixed_size
from sam_ds.wire.varint import MAX_VARINT_BYTES
from sam_ds.wire.zeros import Encoding, section_bytes

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def encode_tensor(
    tensor: Tensor,
    *,
    values: str = "raw",
    base_round: int = 0,
    compress: bool = False,
    rng: np.random.Generator | None = None,
) -> bytes:
    """As `codec.encode` of `tensor.cpu().numpy()`: the same arguments, bytes and errors.

    Raises:
        InputError: as `codec.encode`; a bfloat16 tensor is refused, send it as float32 with values="bf16".
    """
    name = str(tensor.dtype).removeprefix("torch.")
    dtypes = {str(dtype): dtype for dtype in DTYPES}
    if name not in dtypes:
        raise InputError(f"tensor.dtype is {name}: convert it to one of {', '.join(dtypes)}")
    dtype = dtypes[name]
    kind = value_kinds(values, dtype, tensor.ndim, base_round)[0]
    if dtype.kind in "iu" or kind not in (Values.RAW, Values.BF16):
        return encode(tensor.cpu().numpy(), values=values, base_round=base_round, compress=compress, rng=rng)
    codes_N = _codes(tensor.detach().contiguous().view(-1), kind)
    mask_N = codes_N != 0
    size, nonzeros = len(mask_N), int(mask_N.sum())
    positions: dict[Encoding, int] = {}
    if nonzeros < size or dtype.kind == "b":
        positions[Encoding.BITMAP] = bitmap = (size + 7) // 8
        if len(edges_K := _edges(mask_N)) < bitmap:
            runs = _runs(edges_K, size)
            positions[Encoding.RLE] = section_bytes(_varint_bytes(runs))
        if nonzeros < bitmap:
            gaps = _gaps(mask_N)
            positions[Encoding.DELTA_VARINT] = section_bytes(_varint_bytes(gaps))
    lengths = (0, 0) if dtype.kind == "b" else tuple(fixed_size(n, kind, dtype) for n in (size, nonzeros))
    encoding, _ = choose(positions, {kind: (lengths[0], lengths[1])}, dtype)
    sections = []
    if encoding is Encoding.BITMAP:
        sections.append(_packed_bits(mask_N))
    elif encoding is not Encoding.DENSE:
        body_B = _varints(runs if encoding is Encoding.RLE else gaps)
        sections += [_varints(torch.tensor([len(body_B)])), body_B]
    if dtype.kind != "b" and size:
        sections.append((codes_N if encoding is Encoding.DENSE else codes_N[mask_N]).view(torch.uint8))
    views = [section.cpu().numpy().data for section in sections]
    return make_draft(views, encoding, kind, dtype, tuple(tensor.shape), base_round, compress).to_bytes()


def _codes(flat_N: Tensor, kind: Values) -> Tensor:
    """As `values.to_codes`, in signed integers."""
    if kind is Values.RAW:
        return flat_N.view(_BITS[flat_N.element_size()])
    bits = flat_N.float().view(torch.int32)
    halves = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(is_nan, (bits >> 16) | 0x0040, halves).to(torch.int16)


def _edges(mask_N: Tensor) -> Tensor:
    changed = mask_N.clone()
    changed[1:] ^= mask_N[:-1]
    return changed.nonzero().view(-1)


def _runs(edges_K: Tensor, size: int) -> Tensor:
    ends = edges_K.new_tensor([size] if size else [])
    return torch.diff(torch.cat([edges_K.new_zeros(1 if size else 0), edges_K, ends]))


def _gaps(mask_N: Tensor) -> Tensor:
    positions_P = mask_N.nonzero().view(-1)
    return torch.diff(positions_P, prepend=positions_P.new_tensor([-1])) - 1


def _packed_bits(mask_N: Tensor) -> Tensor:
    bits = torch.nn.functional.pad(mask_N.to(torch.uint8), (0, -len(mask_N) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits * weights).sum(1, dtype=torch.uint8)


def _varint_bytes(values_V: Tensor) -> int:
    return len(values_V) + sum(int((values_V >= 1 << 7 * k).sum()) for k in range(1, MAX_VARINT_BYTES - 1))


def _varints(values_V: Tensor) -> Tensor:
    """(B,) uint8."""
    lengths_V = torch.ones_like(values_V)
    for k in range(1, MAX_VARINT_BYTES - 1):
        lengths_V += values_V >= 1 << 7 * k
    starts_V = torch.cumsum(lengths_V, 0) - lengths_V
    out_B = torch.empty(int(lengths_V.sum()), dtype=torch.uint8, device=values_V.device)
    for k in range(int(lengths_V.max()) if len(values_V) else 0):
        has_V = lengths_V > k
        more = (lengths_V[has_V] > k + 1) * 0x80
        out_B[starts_V[has_V] + k] = ((values_V[has_V] >> 7 * k) & 0x7F | more).to(torch.uint8)
    return out_B
