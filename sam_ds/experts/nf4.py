"""Experts in 4 bits (QLoRA's nf4 with double quantization, 2305.14314), each quantized on its own.

A matrix is stored neuron first, (m, d), up and gate as well as down, so that an expert is a run of whole blocks of 64
values; the scales of its blocks are quantized with an offset and scales of its own. What an expert holds is therefore
the same whichever slot it is in, and one expert is dequantized at a time, forward and backward; never a whole matrix.
The base is frozen: what trains is beside it, in LoRA slices.

Not bitsandbytes' `Linear4bit`: its forward repacks the weight in place on some CPUs, and none of it can be sliced then.

Legend: S slots, n neurons an expert, d hidden, B blocks of an expert, G groups of 256 blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sam_ds.errors import InputError
from sam_ds.experts.attention import LoraMap, Updated, add_update
from sam_ds.experts.grouped import pairs_of
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.model import SamMixin
from sam_ds.experts.surgery import LinearMap, hand_back, map_names, matrix

_BLOCK, _GROUP = 64, 256
_NAMES = ("up", "gate", "down")


class Nf4Slots(nn.Module):
    """The (n, d) matrices of S slots, packed."""

    absmax_SB: Tensor
    scale_SG: Tensor

    def __init__(self, slots: int, neurons: int, hidden: int, like: Tensor) -> None:
        """`like` gives the device and the precision that ZeRO is to take the packed bytes for: that of the model, or a
        cast of the whole model would change them."""
        super().__init__()
        self.shape = (neurons, hidden)
        self._dtype = like.dtype
        blocks = neurons * hidden // _BLOCK
        groups = -(-blocks // _GROUP)
        # A parameter, so that ZeRO-3 shards it; a view of packed bytes whatever its precision says.
        self.packed = nn.Parameter(
            like.new_zeros(slots, neurons * hidden // 2 // like.element_size()), requires_grad=False
        )
        self.register_buffer("absmax_SB", torch.zeros(slots, blocks, dtype=torch.uint8, device=like.device))
        # fp32 by its bits: an integer no cast touches. The last of each is the offset.
        self.register_buffer("scale_SG", torch.zeros(slots, groups + 1, dtype=torch.int32, device=like.device))
        code = quantize_4bit(like.new_zeros(_BLOCK).float(), compress_statistics=True, quant_type="nf4")[1]
        # By device; no buffers, for a cast would round them.
        self._codes = {like.device: (code.code, code.state2.code)}

    def _code_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The 16 values of nf4, and the 256 of the scales."""
        if device not in self._codes:
            values, scales = next(iter(self._codes.values()))
            self._codes[device] = values.to(device), scales.to(device)
        return self._codes[device]

    @torch.no_grad()
    def write(self, slot: int, rows_nd: Tensor) -> None:
        """Quantize an expert's matrix into a slot."""
        assert tuple(rows_nd.shape) == self.shape
        packed, absmax_B, scale_G = self.quantize(rows_nd)
        self.packed[slot].copy_(packed)
        self.absmax_SB[slot].copy_(absmax_B)
        self.scale_SG[slot].copy_(scale_G)

    def quantize(self, rows_nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `write` puts into the slot, without putting it there."""
        packed, state = quantize_4bit(
            rows_nd.detach().contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scale_G = torch.cat([state.state2.absmax.float(), state.offset.float().view(1)]).view(torch.int32)
        return packed.flatten().view(self.packed.dtype), state.absmax, scale_G

    def read(self, slot: int, dtype: torch.dtype) -> Tensor:
        """(n, d) the matrix of a slot, dequantized. Raises InputError where the model was cast since: the packed bytes
        went with it."""
        if self.packed.dtype != self._dtype:
            raise InputError(f"the model was cast from {self._dtype} to {self.packed.dtype} after to_nf4, which "
                             "changed the packed bytes: load it in the precision it is to train in, and quantize then")
        scale_G = self.scale_SG[slot].view(torch.float32)
        code, scale_code = self._code_on(scale_G.device)
        nested = QuantState(
            absmax=scale_G[:-1].contiguous(), code=scale_code, blocksize=_GROUP, dtype=torch.float32
        )
        state = QuantState(
            absmax=self.absmax_SB[slot], shape=self.shape, code=code, blocksize=_BLOCK,
            quant_type="nf4", dtype=dtype, offset=scale_G[-1], state2=nested,
        )  # fmt: skip
        return dequantize_4bit(self.packed.detach()[slot].view(torch.uint8).view(-1, 1), state)

    @property
    def values(self) -> int:
        """Of the matrices it stands for."""
        return len(self.absmax_SB) * self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all slots, scales included."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.absmax_SB, self.scale_SG))


class _Times(torch.autograd.Function):
    """x W' (or x W) for the matrix W of a slot: nothing is kept for the backward pass but where W is."""

    @staticmethod
    def forward(ctx: Any, x_Ti: Tensor, slots: Nf4Slots, slot: int, into: bool) -> Tensor:
        ctx.slots, ctx.slot, ctx.into, ctx.dtype = slots, slot, into, x_Ti.dtype
        rows_nd = slots.read(slot, x_Ti.dtype)
        return x_Ti @ (rows_nd.t() if into else rows_nd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        rows_nd = ctx.slots.read(ctx.slot, ctx.dtype)
        return dy.to(ctx.dtype) @ (rows_nd if ctx.into else rows_nd.t()), None, None, None


class Nf4FFN(SamFFN):
    """A `SamFFN` whose matrices are in `nf4`; its linear maps keep their biases and nothing else."""

    backend = "nf4"
    nf4: nn.ModuleDict

    @torch.no_grad()
    def pack(self, tensor: str, rows: Sequence[Tensor]) -> dict[str, Tensor]:
        """Replace a matrix, given neuron first, one for each slot; `gate_up` (n, 2, d) is both.

        The packed bytes are returned, by the parameter's name in the layer, for whoever knows where ZeRO keeps it.
        """
        names = ("gate", "up") if tensor == "gate_up" else (tensor,)
        values = {}
        for index, name in enumerate(names):
            slots = self.nf4[name]
            assert isinstance(slots, Nf4Slots)
            device = slots.scale_SG.device
            parts = [slots.quantize((own[:, index] if len(names) > 1 else own).to(device)) for own in rows]
            packed_S, absmax_SB, scale_SG = (torch.stack(own) for own in zip(*parts, strict=True))
            slots.absmax_SB.copy_(absmax_SB)
            slots.scale_SG.copy_(scale_SG)
            values[f"nf4.{name}.packed"] = packed_S
        return values

    def _hidden(self, x_Td: Tensor, slot: int) -> Tensor:
        """(T, n) what an expert's neurons put out."""
        products_Tn = [
            _Times.apply(x_Td, self.nf4[name], slot, True) for name in ("up", "gate") if name in self.nf4
        ]
        return self._complete(x_Td, products_Tn, slot, 1)

    def _expert(self, x_Td: Tensor, slot: int, weight_T: Tensor | None = None) -> Tensor:
        """(T, d) what an expert adds."""
        hidden_Tn = self._hidden(x_Td, slot)
        if weight_T is not None:
            hidden_Tn = hidden_Tn * weight_T[:, None]
        y_Td: Tensor = _Times.apply(hidden_Tn, self.nf4["down"], slot, False)
        if self.lora is None:
            return y_Td
        own_nR = self.lora.down_rows[slot * self.neurons : (slot + 1) * self.neurons].to(hidden_Tn.dtype)
        return y_Td + self.lora.scale * (hidden_Tn @ own_nR) @ self.lora.down_out.to(hidden_Tn.dtype)

    def _dense(self, x_Td: Tensor) -> Tensor:
        y_Td = self._expert(x_Td, 0)
        for slot in range(1, self.slots):
            y_Td = y_Td + self._expert(x_Td, slot)
        return y_Td

    @torch.no_grad()
    def _root_products(self, x_Td: Tensor) -> list[Tensor]:
        if self.sam.phi.router != "roots":
            return []
        return [
            torch.cat([_Times.apply(x_Td, self.nf4[name], slot, True) for slot in range(self.roots)], dim=1)
            for name in ("up", "gate") if name in self.nf4
        ]  # fmt: skip

    def _visit(
        self, x_Td: Tensor, visited_TS: Tensor, weight_TS: Tensor, products_Tr: Sequence[Tensor]
    ) -> Tensor:
        y_Td = self._expert(x_Td, 0)
        for slot in range(1, self.roots):
            y_Td = y_Td + self._expert(x_Td, slot)
        pairs = pairs_of(visited_TS, roots=self.roots, neurons=self.neurons)
        parts = []
        for _, neurons, token_t in pairs.experts():
            slot = neurons.start // self.neurons
            parts.append(self._expert(x_Td[token_t], slot, weight_TS[token_t, slot]))
        if not parts:
            return y_Td
        # Not index_add, which keeps what it adds for the backward pass.
        return y_Td.scatter_add(0, pairs.token_P[:, None].expand(-1, y_Td.shape[1]), torch.cat(parts))


@torch.no_grad()
def to_nf4(model: PreTrainedModel, *, dtype: torch.dtype | None = None) -> None:
    """Quantize a converted model in place: the experts, and every other linear map but the output embedding.

    `dtype` is what the model computes in afterwards, its own if not given: its parameters are cast one by one, its
    buffers stay, as under DeepSpeed.

    What trains afterwards are gates and low-rank updates (`units.prepare(model, "lora", ...)`). There is no way back:
    the folder has the weights. Gates, stand-ins, norms, biases and embeddings are not quantized.

    Raises InputError, before anything is changed: not converted, experts in DeepSpeed's MoE layers, messages, sharded
    weights, experts whose matrices are not whole blocks of 64 values, an adapter, or a matrix of a kind that it does
    not know.
    """
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first, or load a converted folder")
    if model.sam_config.semantics == "message":
        raise InputError("semantics='message' is of the torch back end, which 4 bits are not: convert with "
                         "semantics='reach', or load the model in full or half precision")  # fmt: skip
    for layer in model.sam_layers:
        if layer.backend != "torch":
            raise InputError(f"nf4 is of the torch back end, and the experts of {layer.ffn.path} are in the "
                             f"{layer.backend} one: load the folder anew, or call to_views(model)")  # fmt: skip
        if layer.ffn.sharded:
            raise InputError("the model is cut into shards by ZeRO-3: quantize it first, before TrainingArguments or "
                             "HfDeepSpeedConfig are made; deepspeed.initialize shards it then")  # fmt: skip
        if layer.neurons * layer.ffn.hidden % _BLOCK:
            raise InputError(f"an expert of {layer.ffn.path} has {layer.neurons} x {layer.ffn.hidden} values, which is "
                             f"no multiple of nf4's blocks of {_BLOCK}; convert with fewer experts")  # fmt: skip
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            raise InputError(f"{path} carries an adapter: quantize first, then put adapters on the attention with PEFT")
    _check_kinds(model)
    for layer, original in zip(model.sam_layers, model._sam_original.values(), strict=True):
        _quantize(layer, dtype)
        hand_back(original, layer.ffn)
    _quantize_rest(model, dtype)
    for parameter in model.parameters() if dtype is not None else ():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    check_nf4(model)


def _quantize(layer: SamFFN, dtype: torch.dtype | None) -> None:
    ffn, slots = layer.ffn, nn.ModuleDict()
    up_dm, gate_dm, down_md = ffn.weights()
    for name, rows_md in zip(_NAMES, (up_dm.t(), None if gate_dm is None else gate_dm.t(), down_md), strict=True):
        if rows_md is not None:
            slots[name] = packed = Nf4Slots(layer.slots, layer.neurons, ffn.hidden, rows_md[:0].to(dtype))
            for slot in range(layer.slots):
                packed.write(slot, rows_md[slot * layer.neurons : (slot + 1) * layer.neurons].to(dtype))
    for name in map_names(ffn):
        linear = ffn.linear(name)
        weight = linear.weight.detach()
        # Without neurons; the shape that is left is what tells the hidden size. No parameter: ZeRO-3 has no shards of
        # nothing.
        outputs_first = not isinstance(linear, Conv1D)
        neurons_first = outputs_first == (name != ffn.down)
        empty = weight.new_empty((0, weight.shape[1]) if neurons_first else (weight.shape[0], 0))
        del linear.weight
        linear.register_buffer("weight", empty, persistent=False)
    layer.nf4 = slots
    layer.__class__ = Nf4FFN


def _quantize_rest(model: SamMixin, dtype: torch.dtype | None) -> None:
    layers = model.sam_layers
    kept = {id(layer.ffn.linear(name)) for layer in layers for name in layer.ffn_names if name}
    kept.add(id(model.get_output_embeddings()))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LinearMap) and not isinstance(child, Linear4bit) and id(child) not in kept:
                packed = _packed_map(child, dtype)
                if isinstance(child, Updated):
                    add_update(packed, child.lora)
                setattr(module, name, packed)


class Nf4Map(Linear4bit):
    """Any other linear map, in nf4."""

    weight: Params4bit
    quant_state: QuantState
    transposed: bool

    def train(self, mode: bool = True) -> Nf4Map:
        """Stay in training mode: a forward pass in the other packs the weight anew on some CPUs, and no backward pass
        can read it then. There is nothing else that the mode decides here."""
        super().train(True)
        return self

    @torch.no_grad()
    def pack(self, weight: Tensor) -> Tensor:
        """Replace the matrix, given as the checkpoint has it. The packed bytes are returned, as of `Nf4FFN.pack`."""
        rows = (weight.t() if self.transposed else weight).to(self.quant_state.absmax.device, self.compute_dtype)
        packed, state = quantize_4bit(
            rows.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4",
            quant_storage=self.quant_storage,
        )  # fmt: skip
        self.quant_state = self.weight.quant_state = state
        return packed


def _packed_map(linear: LinearMap, dtype: torch.dtype | None) -> Nf4Map:
    rows = matrix(linear).t().detach().to(dtype).contiguous()
    outputs, inputs = rows.shape
    packed = Nf4Map(
        inputs, outputs, bias=linear.bias is not None, compute_dtype=rows.dtype, compress_statistics=True,
        quant_type="nf4", quant_storage=rows.dtype, device="meta",
    )  # fmt: skip
    packed.weight = Params4bit(
        rows, requires_grad=False, compress_statistics=True, quant_type="nf4", quant_storage=rows.dtype, module=packed
    ).to(rows.device)  # type: ignore[misc]  # its overloads take `self` for a module or a string
    packed.bias = linear.bias
    packed.transposed = isinstance(linear, Conv1D)
    return packed


def _check_kinds(model: PreTrainedModel) -> None:
    """Raise InputError for a matrix that `to_nf4` would leave as it is and that is none of those to leave."""
    kept = {id(own.weight) for own in (model.get_input_embeddings(), model.get_output_embeddings()) if own is not None}
    for path, module in model.named_modules():
        known = isinstance(module, LinearMap | Nf4Slots | LoraSlices | LoraMap | nn.Embedding)
        if ".sam" in f".{path}" or known:
            continue
        for name, value in module.named_parameters(recurse=False):
            if value.dim() > 1 and id(value) not in kept:
                raise InputError(f"{path}.{name} would stay in {value.dtype}: nf4 does not know "
                                 f"{type(module).__name__}; use precision fp32 or bf16 for this model")  # fmt: skip


def check_nf4(model: PreTrainedModel) -> None:
    """Raise InputError where a matrix that should be in 4 bits is not: beside embeddings and what SAM adds, none has
    more than 0.75 bytes a value, which experts of a few blocks come near."""
    kept = {id(own.weight) for own in (model.get_input_embeddings(), model.get_output_embeddings()) if own is not None}
    for path, module in model.named_modules():
        if isinstance(module, Nf4Slots) and module.nbytes > 0.75 * module.values:
            raise InputError(f"{path} takes {module.nbytes} bytes for {module.values} values: it is not in 4 bits")
        if ".sam" in f".{path}" or isinstance(module, Nf4Slots | LoraSlices | LoraMap | nn.Embedding):
            continue
        for name, value in module.named_parameters(recurse=False):
            if value.dim() > 1 and value.numel() and id(value) not in kept and not isinstance(value, Params4bit):
                raise InputError(f"{path}.{name} is still in {value.dtype}: nf4 does not know {type(module).__name__}; "
                                 "use precision fp32 or bf16 for this model")  # fmt: skip
