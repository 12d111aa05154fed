"""Device memory of a client in training, before anything is loaded.

The client's own model goes through one forward and backward pass on fake tensors, which have shapes and nothing else,
so what is counted is what the run's own code makes, whatever the architecture. What DeepSpeed adds to it is counted by
its stages. The interpreter, its libraries and their work space are not in it, nor what a client is given and answers,
which is on the host. Attention with grouped heads is counted with its keys and values repeated, which some kernels
spare themselves, and attention with dropout as a CPU computes it.

Legend: T tokens, S slots, J decisions, m neurons of the experts visited, d hidden.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sam_ds.clients.ds_config import ds_config, offloads
from sam_ds.config import RunConfig, TierSection
from sam_ds.experts.config import SamConfig
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.message import Order, exchange, mail_to_all
from sam_ds.experts.model import SamMixin, add_assembler, inject_layers, wrap_ffns
from sam_ds.experts.slots import to_slots
from sam_ds.experts.surgery import LinearMap, find_ffns
from sam_ds.experts.units import prepare
from sam_ds.graph.route import Routing

GIB = 2**30
_PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a value in 4 bits: its own, one for every 64 values, a scale for every 256 of those."""
_ALLREDUCE = 500_000_000
"""Elements that DeepSpeed's stage 0 reduces in one copy."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes per rank of one client in training."""

    weights: int
    """Compute copies; gates and stand-ins among them."""
    adapters: int
    """Compute copies of the low-rank factors."""
    optimizer: int
    """Master copies and moments; under ZeRO-3 its bucket and the rank's gradients too, which stay."""
    gradients: int
    """While the optimizer steps, beyond those."""
    activations: int
    """The most that the forward and backward pass need at a time: gradients so far, DeepSpeed's buckets and what
    ZeRO-3 has gathered are in it."""

    @property
    def kept(self) -> int:
        """What stays between steps, and between clients."""
        return self.weights + self.adapters + self.optimizer

    @property
    def peak(self) -> int:
        """When the optimizer steps, the activations are gone."""
        return self.kept + max(self.gradients, self.activations)


def slot_model(dense: PreTrainedModel, tier: TierSection, config: RunConfig) -> SamMixin:
    """A client's model, from the dense one on the meta device, with gradients for what trains."""
    plain, settings, sam = copy.deepcopy(dense), config.train, SamConfig.of_run(config)
    ffns = find_ffns(plain)
    model = inject_layers(plain, sam, ffns, wrap_ffns(ffns, sam))
    to_slots(model, tier.experts)
    add_assembler(model, seed=config.seed)
    prepare(
        model, tier.trains, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=0, dense=settings.dense,
        attention_rank=settings.attention_rank,
    )  # fmt: skip
    return model


def estimate(dense: PreTrainedModel, tier: TierSection, config: RunConfig) -> Estimate:
    """Of a client of this tier, on each of its ranks; `dense` is on the meta device.

    ZeRO keeps an fp32 master of what trains beside the compute copy, in fp32 too; it shards this from stage 1 on,
    gradients from stage 2, weights at stage 3. What is offloaded is not on the device, and with the optimizer neither
    are gradients.
    """
    model = slot_model(dense, tier, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero = ds_config(tier, config, trained)["zero_optimization"]
    stage, ranks = zero["stage"], config.ranks_of(tier)
    word, shards = (4 if tier.precision == "fp32" else 2), (ranks if stage == 3 else 1)
    adapters = word * sum(p.numel() for name, p in model.named_parameters() if ".lora." in name)
    packed = _matrices(model) if tier.precision == "nf4" else 0
    weights = word * (sum(p.numel() for p in model.parameters()) - packed) - adapters + _PACKED * packed
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    bucket = word * zero["reduce_bucket_size"]
    # Of a gradient, what stays on the device once autograd has made it.
    kept = 1.0 if stage < 2 else 1 / ranks if stage == 2 and not offloads(zero, "optimizer") else 0.0
    passes = _passes(model, tier, config, kept=kept)
    # Of what was reduced, one piece and that in fp32 if it is not: where the optimizer steps.
    stepping, held = trained / ranks * (word + (4 if word < 4 else 0)), 0.0
    if stage == 0:
        stepping = word * (trained + min(_ALLREDUCE, trained))
    elif stage == 3:
        # Its bucket and the rank's gradients stay; it steps by groups; what it gathers comes in one piece, is copied,
        # and stays while it will be needed within so many elements.
        held = bucket + word * trained / ranks
        stepping *= min(1.0, zero["sub_group_size"] / max(trained / ranks, 1))
        gathers = (zero["stage3_max_live_parameters"], zero["stage3_prefetch_bucket_size"])
        passes += sum(min(weights + adapters, word * elements) for elements in gathers)
    else:
        stepping += word * trained / (ranks if stage == 2 else 1)
        passes += bucket * (2 if zero.get("overlap_comm") else 1)
    if offloads(zero, "optimizer"):
        stepping, held = 0.0, min(held, bucket)
    return Estimate(
        weights=int(buffers + (0 if offloads(zero, "param") else weights / shards)),
        adapters=0 if offloads(zero, "param") else int(adapters / shards),
        optimizer=int(held + (0 if offloads(zero, "optimizer") else trained * (12 / ranks if stage else 8))),
        gradients=int(stepping), activations=int(passes),
    )  # fmt: skip


def _matrices(model: PreTrainedModel) -> int:
    """Elements of what `to_nf4` quantizes."""
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, LinearMap) and module is not head]
    return sum(module.weight.numel() for module in linear)


def _passes(model: SamMixin, tier: TierSection, config: RunConfig, *, kept: float) -> int:
    """Bytes at the height of a forward and backward pass, beyond the model's own; `kept` is the share of a gradient
    that stays once it is there."""
    tokens = (config.train.batch // config.ranks_of(tier), config.train.sequence)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dtype = torch.float32 if tier.precision == "fp32" else torch.bfloat16
        tied: dict[nn.Parameter, nn.Parameter] = {}
        for module in model.modules():
            for name, value in module._parameters.items():
                if value is not None and value not in tied:
                    tied[value] = nn.Parameter(torch.empty(value.shape, dtype=dtype), value.requires_grad)
                module._parameters[name] = None if value is None else tied[value]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        model.sam_condition = torch.zeros(len(model.sam_layers), config.sam.num_experts + 1)
        whole = any(config.train.whole_steps())
        for layer in model.sam_layers:
            _visit_some(layer, layer.slots if whole else layer.top_k)
        ids_BS = torch.zeros(tokens, dtype=torch.long)
        live = _Live([*model.parameters(), *model.buffers()])
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda own: live.keep(own.grad, kept))
        try:
            with live:
                model.train()(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss.backward()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            warnings.warn(f"what {type(model).__name__} computes depends on its tokens' values ({error}): its memory "
                          "is estimated without activations", stacklevel=2)  # fmt: skip
            return 0
    return live.peak


def _visit_some(layer: SamFFN, visited: int) -> None:
    """Route every token to the layer's first experts: on fake tensors no score says which."""

    def routing(scores_TS: Tensor) -> Routing:
        shape = (len(scores_TS), visited - layer.roots)
        some_TJ = torch.zeros(shape, dtype=torch.int64)
        return Routing(
            order_TS=torch.zeros(scores_TS.shape, dtype=torch.int16), chosen_TJ=some_TJ, parent_TJ=some_TJ,
            eligible_TJS=torch.zeros(*shape, layer.slots, dtype=torch.bool),
            choice_T=torch.zeros(shape[:1], dtype=torch.bool),
        )  # fmt: skip

    def visit(x_Td: Tensor, _: Tensor, weight_TS: Tensor, __: Sequence[Tensor]) -> Tensor:
        up_dm, gate_dm, down_md = layer.matrices()
        own = slice(0, visited * layer.neurons)
        products_Tm = [x_Td @ matrix_dm[:, own] for matrix_dm in (up_dm, gate_dm) if matrix_dm is not None]
        hidden_Tm = layer._complete(x_Td, products_Tm, 0, visited)
        hidden_Tm = (hidden_Tm.unflatten(1, (visited, -1)) * weight_TS[:, :visited, None]).flatten(1)
        y_Td = hidden_Tm @ down_md[own]
        if layer.lora is None:
            return y_Td
        return y_Td + (hidden_Tm @ layer.lora.down_rows[own]) @ layer.lora.down_out

    def message(x_Td: Tensor, _: Any = None, weight_TS: Tensor | None = None, __: Any = None) -> Tensor:
        return exchange(layer, x_Td, mail_to_all(x_Td, order), weight_TS)

    methods: dict[str, Callable[..., Any]] = {"routing": routing, "_visit": visit}
    if layer.semantics == "message":
        # Over all edges: a client's graph is not known, and what an edge needs is given back at once.
        order = Order(levels=tuple((slot,) for slot in range(visited)), edges=tuple(combinations(range(visited), 2)))
        methods |= {"_dense": message, "_visit": message}
    layer.top_k = visited
    vars(layer).update(methods)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that are made inside and still there, and their peak."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._bytes = {value.untyped_storage()._cdata: 0 for value in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self._bytes:
                    self._bytes[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self._now)
        return result

    def _gone(self, key: int) -> None:
        self._now -= self._bytes.pop(key)

    def keep(self, value: Tensor, share: float) -> None:
        """Count only a share of this tensor from now on."""
        key = value.untyped_storage()._cdata
        self._now -= self._bytes[key]
        self._bytes[key] = int(share * self._bytes[key])
        self._now += self._bytes[key]
