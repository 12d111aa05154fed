"""A converted model: the same object, its feed-forward layers now graphs of experts.

It stays an instance of its own class (a subclass made on the spot with the same name), so it generates, trains under
`transformers.Trainer` and saves like the original. A saved folder holds a plain checkpoint of the original
architecture, computing the same function to rounding, and beside it `sam_config.json` and `sam.safetensors` with what
SAM adds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from inspect import signature
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from sam_ds.errors import InputError
from sam_ds.experts.allocation import allocate
from sam_ds.experts.attention import Updated, drop_update, updated_maps
from sam_ds.experts.config import CONFIG_FILE, SamConfig
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.surgery import FFN, install, matrix, uninstall
from sam_ds.graph.assembler import Assembler, AssemblerConfig
from sam_ds.graph.dag import check_graph, contract

TENSOR_FILE = "sam.safetensors"
VERSION = 1
_MARK = "transformers_weights"

if TYPE_CHECKING:
    # A converted model is one through its own class, which comes after the mixin.
    _Base = PreTrainedModel
else:
    _Base = object


class SamMixin(_Base):
    """What a converted model can do beside everything its own class does."""

    sam_config: SamConfig
    sam_layers: list[SamFFN]
    sam_affinity_LEE: Tensor
    """Co-activation of the experts on the calibration text: the assembler's prior."""
    sam_lost_LK: Tensor | None
    """(L, E + 1) what a layer costs at each budget (`experts.allocation`); None: every layer has the same."""
    sam_assembler: Assembler | None
    sam_condition: Tensor | None
    """(L, E + 1) what the assembler knows of the client or text; None: messages have the shared gains only."""
    _sam_original: dict[str, nn.Module]
    """What stood in the layers' places, by its path."""

    def assemble(self) -> None:
        """Give the layers what the assembler makes of the condition: its logits, for the gradient of the coming forward
        pass, and its gains of messages."""
        assembler, condition = self.sam_assembler, self.sam_condition
        if assembler is not None and condition is not None and torch.is_grad_enabled():
            logits_LEE = assembler(condition)
            for index, layer in enumerate(self.sam_layers):
                held = layer.held
                layer.edge_logits_SS = logits_LEE[index][held][:, held]
        if assembler is not None and assembler.config.messages:
            gains_LEE = None if condition is None else assembler.gains(condition)
            for index, layer in enumerate(self.sam_layers):
                layer.own_gain_SE = None if gains_LEE is None else gains_LEE[index].t()[layer.held]

    def graph(self) -> Tensor:
        """(L, E, E) bool: the edges of every layer. The layers must hold all experts."""
        return torch.stack([layer.sam.adjacency_SS for layer in self.sam_layers]).cpu()

    @torch.no_grad()
    def set_graph(self, mask_LEE: Tensor) -> None:
        """Route over this graph. A layer that holds only some experts gets the paths among those.

        Thresholds stay as they are: with fewer edges, tokens visit fewer experts than the budget.

        Raises InputError if the mask is not of this model's layers and experts, or a layer's is not strictly upper
        triangular or leaves an expert unreachable; before anything is changed.
        """
        wanted = (len(self.sam_layers), self.sam_config.num_experts, self.sam_config.num_experts)
        if tuple(mask_LEE.shape) != wanted:
            raise InputError(f"the graph must have shape {wanted} (layers, experts, experts), "
                             f"got {tuple(mask_LEE.shape)}")  # fmt: skip
        masks_LEE = mask_LEE.cpu().numpy()
        check_graph(masks_LEE, self.sam_config.roots)
        for layer, mask_EE in zip(self.sam_layers, masks_LEE, strict=True):
            held = contract(mask_EE, layer.held.tolist())
            layer.sam.adjacency_SS.copy_(torch.from_numpy(held))

    @contextmanager
    def over(self, mask_LEE: Tensor, condition: Tensor | None = None) -> Iterator[None]:
        """Route over this graph inside the block, on a model that holds all experts, and send messages with the gains
        that the assembler makes of this condition (None: of the model's own). Raises as `set_graph` does."""
        before_LEE, known = self.graph(), self.sam_condition
        self.set_graph(mask_LEE)
        self.sam_condition = known if condition is None else condition
        try:
            yield
        finally:
            self.set_graph(before_LEE)
            self.sam_condition = known
            self.assemble()

    def budgets(self, top_k: float) -> list[int]:
        """Experts that a token visits in each layer, together at most L `top_k` (`SamConfig.allocation`)."""
        if self.sam_lost_LK is None:
            return [int(top_k)] * len(self.sam_layers)
        # A mean of whole budgets comes back as their sum, whatever the division rounded.
        return allocate(self.sam_lost_LK, int(top_k * len(self.sam_layers) + 1e-6), self.sam_config.roots)

    def allot(self, lost_LK: Tensor | None) -> None:
        """From now on visit as many experts in each layer as `budgets` says by this loss (L, E + 1)."""
        self.sam_lost_LK = lost_LK
        for layer, budget in zip(self.sam_layers, self.budgets(self.sam_config.top_k), strict=True):
            layer.top_k = budget

    @contextmanager
    def active(self, top_k: float) -> Iterator[None]:
        """Visit `top_k` experts a token inside the block, on average over the layers; num_experts computes exactly
        the dense model, if experts send no messages (`dense`).

        Raises InputError if top_k is below the number of roots or above num_experts.
        """
        if not self.sam_config.roots <= top_k <= self.sam_config.num_experts:
            raise InputError(f"top_k must be from roots={self.sam_config.roots} to "
                             f"num_experts={self.sam_config.num_experts}, got {top_k}")  # fmt: skip
        before = [layer.top_k for layer in self.sam_layers]
        for layer, budget in zip(self.sam_layers, self.budgets(top_k), strict=True):
            layer.top_k = budget
        try:
            yield
        finally:
            for layer, k in zip(self.sam_layers, before, strict=True):
                layer.top_k = k

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Compute what the plain model of a saved folder does inside the block: all experts visited, no messages."""
        before = [layer.semantics for layer in self.sam_layers]
        for layer in self.sam_layers:
            layer.semantics = "reach"
        try:
            with self.active(self.sam_config.num_experts):
                yield
        finally:
            for layer, semantics in zip(self.sam_layers, before, strict=True):
                layer.semantics = semantics

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters, counted whole where ZeRO-3 has sharded them away."""
        counts = [(p.numel() or getattr(p, "ds_numel", 0), p.requires_grad) for p in self.parameters()]
        return sum(count for count, trains in counts if trains), sum(count for count, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, as PEFT does."""
        train, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {train:,} || all params: {total:,} || trainable%: {100 * train / total:.4f}")

    @torch.no_grad()
    def fold_lora(self, *, safe: bool = False, progress: bool = False) -> None:
        """Add the low-rank updates to the weights they belong to, and drop them.

        Raises InputError, if `safe`, for a layer whose weights would not be finite, before any is changed.
        """
        self.check_views("merged")
        adapted: dict[str, SamFFN | Updated] = {
            **{layer.ffn.path: layer for layer in self.sam_layers if layer.lora is not None}, **updated_maps(self)
        }
        for path, owner in adapted.items() if safe else ():
            for weight, delta in _updates(owner):
                if not torch.isfinite((weight + delta).to(weight.dtype)).all():
                    raise InputError(f"{path}: its low-rank update makes weights that are not finite in "
                                     f"{weight.dtype}; nothing was folded, unload() drops the updates")  # fmt: skip
        for owner in tqdm(adapted.values(), desc="fold", unit="layer", disable=not progress):
            for weight, delta in _updates(owner):
                weight += delta
            _drop(owner)

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False) -> PreTrainedModel:
        """The plain model of the original class: everything learned folded in, everything of SAM's removed.

        Raises InputError, if `safe_merge`, for a layer whose weights would not be finite, and where experts send
        messages, which no weights can hold; the model is as it was then.
        """
        gains = {
            layer.ffn.path: float((layer.sam.gain_SE.detach() * layer.sam.adjacency_SS.t()).abs().max())
            for layer in self.sam_layers if layer.sam.gain_SE is not None
        }  # fmt: skip
        if self.sam_assembler is not None and self.sam_assembler.config.messages:
            gains["the assembler"] = float(self.sam_assembler.gain_heads.detach().abs().max())
        path = max(gains, key=lambda name: gains[name], default="")
        # Not `> 0`: what is no number is sent too.
        if gains and not gains[path] == 0.0:
            raise InputError(f"experts send messages, of gains up to {gains[path]:.3g} in {path}, and no plain model "
                             "does: save_pretrained keeps them; fold_lora() and unload() leave them out, which is "
                             "another function; semantics='reach' never has any")  # fmt: skip
        self.fold_lora(safe=safe_merge, progress=progressbar)
        return self.unload()

    def unload(self) -> PreTrainedModel:
        """The plain model of the original class; low-rank updates that were not folded are dropped, and messages."""
        self.check_views("unloaded")
        for layer, (site, original) in zip(self.sam_layers, self._sam_original.items(), strict=True):
            uninstall(self, site, original, layer.ffn)
        for linear in updated_maps(self).values():
            drop_update(linear)
        for name in ("sam_layers", "sam_config", "sam_affinity_LEE", "sam_lost_LK", "sam_condition", "_sam_original"):
            delattr(self, name)
        del self.sam_assembler
        self.__class__ = type(self).__mro__[2]
        return self

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the folder; low-rank updates must be folded in before (`fold_lora`). The gains of messages are among
        what SAM adds: `sam_ds.from_pretrained` reads them, the plain model of the folder sends none (`dense`).

        Raises InputError where an unfolded update would be lost, and for `variant`: a folder has one set of weights.
        """
        self.check_views("saved")
        if any(layer.lora is not None for layer in self.sam_layers):
            raise InputError("model has low-rank updates that are not in its weights; call fold_lora() before saving")
        save = super().save_pretrained
        given = signature(save).bind(save_directory, *args, **kwargs)
        if (variant := given.arguments.get("variant")) is not None:
            raise InputError(f"variant={variant!r}: a converted model has one set of weights a folder; give "
                             "it a folder of its own instead")  # fmt: skip
        state = given.arguments.get("state_dict")
        if state is None:
            state = self.state_dict()
        added = [f"{path}.sam." for path in self._sam_original] + ["sam_assembler."]
        plain = {name: value for name, value in state.items() if not name.startswith(tuple(added))}
        given.arguments["state_dict"] = plain
        save(*given.args, **given.kwargs)
        if not given.arguments.get("is_main_process", True):
            return
        own = {name: value for name, value in state.items() if name.startswith(tuple(added))}
        own |= {"affinity_LEE": self.sam_affinity_LEE}
        if self.sam_lost_LK is not None:
            own["lost_LK"] = self.sam_lost_LK
        folder = Path(save_directory)
        save_file({name: value.detach().cpu().contiguous() for name, value in own.items()}, folder / TENSOR_FILE)
        record = {"version": VERSION, "layers": list(self._sam_original), "sam": asdict(self.sam_config)}
        (folder / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")
        mark(folder)

    def check_views(self, done: str) -> None:
        """Raise InputError where the experts are not views of the model's matrices, for what cannot be `done` to it."""
        if any(layer.backend == "deepspeed" for layer in self.sam_layers):
            raise InputError("the experts are spread over DeepSpeed's MoE layers; call to_views(model), on every rank, "
                             f"before the model is {done}")  # fmt: skip
        if any(layer.backend == "nf4" for layer in self.sam_layers):
            raise InputError(f"the model cannot be {done}: its weights are in 4 bits, which nothing can be added to "
                             "and no folder holds. save_adapter keeps what was trained, load_adapter puts it on the "
                             "model as it was")  # fmt: skip


def mark(folder: Path) -> None:
    """Say in the folder's config.json that its weights are a converted model's (`is_marked`).

    A plain model saved over them leaves SAM's files behind, and must take the mark with it. So the mark is the one
    field of a configuration that transformers reads and never writes, and says what is so without it.
    """
    file = folder / CONFIG_NAME
    single = (folder / SAFE_WEIGHTS_NAME).is_file()
    values = json.loads(file.read_text()) | {_MARK: SAFE_WEIGHTS_NAME if single else SAFE_WEIGHTS_INDEX_NAME}
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def is_marked(config_file: Path) -> bool:
    """Whether this config.json was written with a converted model, not with a plain one since."""
    return _MARK in json.loads(config_file.read_text())


def _updates(owner: SamFFN | Updated) -> Iterator[tuple[Tensor, Tensor]]:
    """The weights of a layer or map, as views, and what its low-rank update adds to each."""
    if isinstance(owner, Updated):
        yield matrix(owner), owner.lora.delta()
        return
    assert owner.lora is not None
    deltas = owner.lora.deltas()
    for name, weight in zip(("up", "gate", "down"), owner.matrices(), strict=True):
        if weight is not None:
            yield weight, deltas[name]


def _drop(owner: SamFFN | Updated) -> None:
    if isinstance(owner, Updated):
        drop_update(owner)
    else:
        owner.lora = None


def wrap_ffns(ffns: list[FFN], config: SamConfig) -> list[SamFFN]:
    """The layers that will take the FFNs' places, nothing fitted yet.

    Raises InputError: E does not divide the neurons, stand-ins of a rank above the hidden size.
    """
    layers = []
    for ffn in ffns:
        rank, outputs = config.standin_shape(ffn.hidden)
        if rank > ffn.hidden:
            raise InputError(f"standin_rank={rank} exceeds the model's hidden size {ffn.hidden}; lower it")
        layers.append(
            SamFFN(
                ffn, num_experts=config.num_experts, top_k=config.top_k, roots=config.roots, router=config.router,
                router_rank=config.router_rank, by_threshold=config.routing == "threshold", standin_rank=rank,
                standin_outputs=outputs, semantics=config.semantics,
            )
        )  # fmt: skip
    return layers


def inject_layers(
    model: PreTrainedModel, config: SamConfig, ffns: list[FFN], layers: list[SamFFN], lost_LK: Tensor | None = None
) -> SamMixin:
    """Put the layers in the FFNs' places and make the model, in place, one of `SamMixin`; returns it."""
    original = {}
    for ffn, layer in zip(ffns, layers, strict=True):
        layer.train(ffn.module.training)
        original[ffn.site] = install(model, ffn, layer)
    cls = type(model)

    # The same signature: generate() and Trainer read from it which arguments the model takes.
    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.assemble()
        return cls.forward(self, *args, **kwargs)

    # The same name, so that a saved config.json names the original architecture.
    model.__class__ = type(cls.__name__, (SamMixin, cls), {"__module__": cls.__module__, "forward": forward})
    assert isinstance(model, SamMixin)
    model.sam_config = config
    # Plain attributes: the modules are registered where they sit, once.
    object.__setattr__(model, "sam_layers", layers)
    object.__setattr__(model, "_sam_original", original)
    model.sam_assembler = None
    model.sam_condition = None
    model.sam_affinity_LEE = torch.ones(len(layers), config.num_experts, config.num_experts)
    model.allot(lost_LK)
    return model


def add_assembler(model: SamMixin, *, seed: int) -> None:
    """Give a converted model the assembler, its prior the log of the co-activation lift (0 = independent)."""
    shape = AssemblerConfig(
        layers=len(model.sam_layers), num_experts=model.sam_config.num_experts,
        messages=model.sam_config.semantics == "message",
    )  # fmt: skip
    model.sam_assembler = Assembler(shape, assembler_prior(model.sam_affinity_LEE), seed)


def assembler_prior(affinity_LEE: Tensor) -> Tensor:
    """(L, E, E) logits the assembler starts from."""
    return affinity_LEE.clamp(min=math.exp(-4), max=math.exp(4)).log()
