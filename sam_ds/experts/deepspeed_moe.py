"""The `deepspeed` back end: the experts beside the roots in DeepSpeed's `MoE` layers, spread over ranks.

The same routes and the same numbers as the `torch` back end. Roots and stand-ins stay outside the dispatch: an expert
inside it that every token visits would make the capacity, to which all experts are padded, the number of tokens. With
ep_size 1 nothing is dispatched, and the gate is not asked: each expert gets its own tokens.
Where ep_size does not divide the experts beside the roots, the last ranks hold one fewer.

DeepSpeed computes MoE layers under ZeRO 0 to 2; its engine refuses stage 3.

Legend: T tokens, S slots, J most experts beside the roots that a token visits, n neurons an expert, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.grouped import into, pairs_of
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import SamMixin
from sam_ds.experts.surgery import hand_back, resize


class DagMaskGate(nn.Module):
    """The gate of DeepSpeed's `MOELayer` (>= 0.19.4, seven values), for choices made over a graph.

    No token is dropped: the capacity is what the fullest expert of any rank needs. It has no parameters, and no name in
    it contains "expert", which `save_checkpoint` would take for an expert's own.
    """

    place_R: Tensor

    def __init__(self, places: Sequence[int], total: int) -> None:
        """`places`: of each of the layer's routed experts, in order, its index among the MoE layer's `total`."""
        super().__init__()
        self.register_buffer("place_R", torch.tensor(places), persistent=False)
        self.total = total
        self.group: dist.ProcessGroup | None = None
        self.weight_TR: Tensor | None = None
        self.visited_TR: Tensor | None = None
        """Which routed experts the coming tokens visit; bool."""

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def forward(
        self, x_Td: Tensor, used_token: Tensor | None, sparse_routes: bool, use_tutel: bool
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]:
        """(auxiliary loss: zero, capacity, experts, their indices (J, T), -1 for none, places in their buffers (J, T),
        weights (J, T), tokens of each)."""
        assert self.visited_TR is not None and self.weight_TR is not None and sparse_routes and not use_tutel
        visited_TR, weight_TR = self.visited_TR, self.weight_TR
        self.visited_TR = self.weight_TR = None
        if used_token is not None:
            visited_TR = visited_TR & (used_token.view(-1, 1) > 0)
        counts = torch.zeros(self.total, dtype=torch.int64, device=x_Td.device)
        counts[self.place_R] = visited_TR.sum(0)
        capacity = counts.max().clamp(min=1)
        if self.group is not None and dist.get_world_size(self.group) > 1:
            # Every rank must give the all-to-all buffers of one size.
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.group)
        token_P, routed_P = visited_TR.nonzero(as_tuple=True)
        # A token's first, second, ... of its visits.
        column_P = (visited_TR.cumsum(1) - 1)[token_P, routed_P]
        most = int(visited_TR.sum(1).max()) if len(token_P) else 1
        index_JT = torch.full((most, len(x_Td)), -1, dtype=torch.int32, device=x_Td.device)
        index_JT[column_P, token_P] = self.place_R[routed_P].int()
        location_JT = torch.zeros_like(index_JT)
        location_JT[column_P, token_P] = (visited_TR.cumsum(0) - 1)[token_P, routed_P].int()
        weight_JT = torch.zeros(index_JT.shape, dtype=torch.float32, device=x_Td.device)
        weight_JT = weight_JT.index_put((column_P, token_P), weight_TR[token_P, routed_P].float())
        return weight_JT.new_zeros(()), capacity, self.total, index_JT, location_JT, weight_JT, counts


class ExpertFFN(nn.Module):
    """One expert on its own: down(act(gate(x)) * up(x)), or down(act(up(x))). The bias of the down-projection is the
    layer's, added once."""

    def __init__(
        self, hidden: int, neurons: int, activation: Callable[[Tensor], Tensor], *, biases: tuple[bool, bool | None],
        like: Tensor,
    ) -> None:  # fmt: skip
        """`biases`: whether up and gate have one; None for no gate."""
        super().__init__()
        up_bias, gate_bias = biases
        of = {"device": like.device, "dtype": like.dtype}
        self.up = nn.Linear(hidden, neurons, bias=up_bias, **of)
        self.gate = None if gate_bias is None else nn.Linear(hidden, neurons, bias=gate_bias, **of)
        self.down = nn.Linear(neurons, hidden, bias=False, **of)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Views in the orientation of `FFN.weights` and `FFN.biases`: up (d, n), gate (d, n), down (n, d), and the
        biases of up and gate (n,)."""
        gate = self.gate
        return (
            self.up.weight.t(), None if gate is None else gate.weight.t(), self.down.weight.t(),
            self.up.bias, None if gate is None else gate.bias,
        )  # fmt: skip


class _Nobody(nn.Module):
    """Fills up a rank's share; no token is sent to it."""

    def __init__(self) -> None:
        super().__init__()
        # `load_checkpoint` looks for a file of every expert, `save_checkpoint` writes one for those with a state.
        self.register_buffer("nothing", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


class MoeFFN(SamFFN):
    """A `SamFFN` whose own matrices are the roots' only; the other experts are in `moe`."""

    backend = "deepspeed"
    moe: MoE

    def _dense(self, x_Td: Tensor) -> Tensor:
        all_TS = torch.ones(len(x_Td), self.slots, dtype=torch.bool, device=x_Td.device)
        return self._visit(x_Td, all_TS, all_TS.to(x_Td.dtype), ())

    def _visit(
        self, x_Td: Tensor, visited_TS: Tensor, weight_TS: Tensor, products_Tr: Sequence[Tensor]
    ) -> Tensor:
        up_dm, gate_dm, down_md = self.matrices()
        # The roots alone, whom every token visits: what the gate was given gets its gradient there.
        nobody = pairs_of(visited_TS[:, : self.roots], roots=self.roots, neurons=self.neurons)
        weights = [matrix_dm for matrix_dm in (up_dm, gate_dm) if matrix_dm is not None]
        known_Tr = [known for known, _ in into(x_Td, weights, nobody, products_Tr)]
        y_Td = self._complete(x_Td, known_Tr, 0, self.roots) @ down_md
        visited_TR, weight_TR = visited_TS[:, self.roots :], weight_TS[:, self.roots :]
        if self.moe.ep_size == 1:
            return self._add_routed(y_Td, x_Td, visited_TR, weight_TR)
        gate = self.moe.deepspeed_moe.gate
        gate.visited_TR, gate.weight_TR = visited_TR, weight_TR
        return y_Td.add_(self.moe(x_Td)[0])

    def _add_routed(self, y_Td: Tensor, x_Td: Tensor, visited_TR: Tensor, weight_TR: Tensor) -> Tensor:
        """(T, d) with what the other experts put out. Where a rank has them all nothing is exchanged, so no buffers of
        one size are needed: each gets its own tokens, where DeepSpeed's layer would fill up to the fullest."""
        routed_P, token_P = visited_TR.t().nonzero(as_tuple=True)
        rows = x_Td.index_select(0, token_P).split(visited_TR.sum(0).tolist())
        # An expert without a token computes none: its weights get a gradient of zeros, as every rank's must.
        out_Pd = torch.cat([expert(own) for expert, own in zip(_own(self.moe), rows, strict=True)])
        weight_P = weight_TR[token_P, routed_P].to(out_Pd.dtype)
        return y_Td.index_add_(0, token_P, out_Pd * weight_P[:, None])


def places_of(routed: int, ep_size: int) -> tuple[list[int], int]:
    """Where the routed experts stand among the MoE layer's, and how many those are: `ep_size` equal shares, of which
    the last may have a place that nobody takes."""
    share = -(-routed // ep_size)
    full = ep_size - (share * ep_size - routed)
    places = [rank * share + i for rank in range(ep_size) for i in range(share - (rank >= full))]
    return places, share * ep_size


def check_ep_size(num_experts: int, roots: int, ep_size: int, ranks: int) -> None:
    """Raise InputError where the experts cannot be spread over groups of `ep_size` of the ranks."""
    if ep_size < 1 or ranks % ep_size:
        raise InputError(f"ep_size={ep_size} does not divide the {ranks} ranks that train together; start a multiple "
                         "of ep_size, or give ep_size=1: every rank holds all experts")  # fmt: skip
    if num_experts % ep_size:
        raise InputError(f"ep_size={ep_size} does not divide num_experts={num_experts}; give one that does, or "
                         "convert with another number of experts")  # fmt: skip
    if num_experts - roots < ep_size:
        raise InputError(f"ep_size={ep_size} leaves a rank without an expert: of num_experts={num_experts}, "
                         f"roots={roots} are on every rank; lower one of them")  # fmt: skip


@torch.no_grad()
def to_deepspeed_moe(model: PreTrainedModel, ep_size: int = 1) -> None:
    """Move the experts of a converted model, in place, into `deepspeed.moe.layer.MoE`, each on one of `ep_size` ranks.

    Call it on every rank, after `deepspeed.init_distributed()` and before `deepspeed.initialize`. Give the optimizer
    `deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer` of the parameter groups, or let DeepSpeed
    make it. `to_views` is the inverse.

    Raises InputError, before anything is moved: the model is not converted, has low-rank updates or messages, is
    sharded (ZeRO-3) or quantized; ep_size does not divide the experts or the ranks; no process group.
    """
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    if model.sam_config.semantics == "message":
        raise InputError("semantics='message' is of the torch back end: DeepSpeed's MoE layers compute all experts at "
                         "once; convert with semantics='reach', or stay with the torch back end")  # fmt: skip
    if not deepspeed.comm.is_initialized():
        raise InputError("the deepspeed back end needs process groups: call deepspeed.init_distributed() first, or "
                         "start with the deepspeed command")  # fmt: skip
    for layer in model.sam_layers:
        if layer.backend == "deepspeed":
            raise InputError("the experts are in DeepSpeed's MoE layers already; call to_views(model) first")
        if layer.backend != "torch":
            raise InputError(f"the experts are in {layer.backend}, which DeepSpeed's MoE layers do not compute: load "
                             "the model in full or half precision, or stay with the torch back end")  # fmt: skip
        if layer.lora is not None:
            raise InputError("model has low-rank updates, which the deepspeed back end does not compute: fold_lora() "
                             "them, or stay with the torch back end")  # fmt: skip
        _check_plain(layer)
    check_ep_size(model.sam_config.num_experts, model.sam_config.roots, ep_size, dist.get_world_size())
    for layer, original in zip(model.sam_layers, model._sam_original.values(), strict=True):
        spread(layer, ep_size)
        hand_back(original, layer.ffn)


@torch.no_grad()
def to_views(model: PreTrainedModel) -> None:
    """The inverse, in place: every rank has all experts again, as slices of the FFN's matrices. Collective."""
    if not isinstance(model, SamMixin):
        raise InputError("model is not converted; call get_sam_model first")
    for layer, original in zip(model.sam_layers, model._sam_original.values(), strict=True):
        if isinstance(layer, MoeFFN):
            _gather(layer, layer.moe)
            hand_back(original, layer.ffn)


def _check_plain(layer: SamFFN) -> None:
    if layer.ffn.sharded:
        raise InputError("the model is cut into shards by ZeRO-3, which DeepSpeed's MoE layers do not know: use "
                         "ZeRO 0, 1 or 2, or stay with the torch back end")  # fmt: skip
    for weight in layer.ffn.module.parameters():
        if not weight.is_floating_point():
            raise InputError(f"{layer.ffn.path} is quantized ({weight.dtype}), which the deepspeed back end does not "
                             "compute: load it in full or half precision, or stay with the torch back end")  # fmt: skip


def _tensors(layer: SamFFN) -> tuple[Tensor | None, ...]:
    """Views of the layer's own, in the order of `ExpertFFN.tensors`."""
    return (*layer.ffn.weights(), *layer.ffn.biases()[:2])


def _block(whole: Tensor, index: int, first: int, neurons: int) -> Tensor:
    """The neurons from `first` on, of the tensor that is `index`-th in `_tensors`."""
    return whole.narrow(1 if index < 2 else 0, first, neurons)


@torch.no_grad()
def spread(layer: SamFFN, ep_size: int) -> None:
    """`to_deepspeed_moe` of one layer, unchecked."""
    whole = _tensors(layer)
    up_b, gate_b = whole[3:]
    like = layer.matrices()[0]
    expert = ExpertFFN(
        layer.ffn.hidden, layer.neurons, layer.activation, like=like,
        biases=(up_b is not None, None if whole[1] is None else gate_b is not None),
    )  # fmt: skip
    places, total = places_of(layer.slots - layer.roots, ep_size)
    moe = MoE(layer.ffn.hidden, expert, num_experts=total, ep_size=ep_size)
    moe.deepspeed_moe.gate = DagMaskGate(places, total).to(like.device)
    moe.set_deepspeed_parallelism()
    own = _own(moe)
    for local in range(len(own)):
        place = dist.get_rank(moe.deepspeed_moe.ep_group) * len(own) + local
        if place not in places:
            own[local] = _Nobody()
            continue
        first = (layer.roots + places.index(place)) * layer.neurons
        for index, (target, source) in enumerate(zip(_expert(own, local).tensors(), whole, strict=True)):
            if target is not None and source is not None:
                target.copy_(_block(source, index, first, layer.neurons))
    moe.requires_grad_(like.requires_grad)
    _resize(layer, whole, layer.roots * layer.neurons)
    moe.train(layer.training)
    layer.moe = moe
    layer.__class__ = MoeFFN


@torch.no_grad()
def _gather(layer: SamFFN, moe: MoE) -> None:
    roots = _tensors(layer)
    gate = moe.deepspeed_moe.gate
    assert isinstance(gate, DagMaskGate)
    places = gate.place_R.tolist()
    _resize(layer, roots, layer.slots * layer.neurons)
    whole, own = _tensors(layer), _own(moe)
    group, ranks = moe.deepspeed_moe.ep_group, moe.ep_size
    for routed, place in enumerate(places):
        rank, local = divmod(place, len(own))
        mine = dist.get_rank(group) == rank
        values = _expert(own, local).tensors() if mine else (None,) * len(whole)
        for index, (target, source) in enumerate(zip(whole, values, strict=True)):
            if target is None:
                continue
            target = _block(target, index, (layer.roots + routed) * layer.neurons, layer.neurons)
            if source is None:
                sent = torch.empty_like(target, memory_format=torch.contiguous_format)
            else:
                sent = source.contiguous()
            if ranks > 1:
                dist.broadcast(sent, dist.get_global_rank(group, rank), group=group)
            target.copy_(sent)
    del layer.moe
    layer.__class__ = SamFFN


def _own(moe: MoE) -> nn.ModuleList:
    """The experts that this rank holds."""
    own: nn.ModuleList = moe.deepspeed_moe.experts.deepspeed_experts
    return own


def _expert(own: nn.ModuleList, local: int) -> ExpertFFN:
    """One of them; not asked of a place that nobody takes."""
    expert = own[local]
    assert isinstance(expert, ExpertFFN)
    return expert


def _resize(layer: SamFFN, before: Sequence[Tensor | None], neurons: int) -> None:
    """Give the layer's own matrices so many neurons; the first are those of `before`."""
    resize(layer.ffn, neurons)
    for index, (target, source) in enumerate(zip(_tensors(layer), before, strict=True)):
        if target is not None and source is not None:
            kept = min(target.shape[1 if index < 2 else 0], source.shape[1 if index < 2 else 0])
            _block(target, index, 0, kept).copy_(_block(source, index, 0, kept))
