"""One conversion measured: what `sam-ds bench convert` does for each of its cells.

Legend: B rows, S tokens a row, T tokens, m neurons, d hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sam_ds.errors import InputError, nearest
from sam_ds.evaluation.baselines import BASELINES, baseline_flops, largest_k
from sam_ds.evaluation.baselines.masked import MaskedFFN, convert
from sam_ds.evaluation.costs import ffn_flops
from sam_ds.evaluation.domains import DomainScore, headline
from sam_ds.evaluation.nll import token_nll
from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.distill import DistillConfig, check_distillation, distill
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.surgery import FFN, find_ffns

SAM = "sam"
_SET_BY_CELL = ("num_experts", "top_k", "seed")
_DISTILL, _LORA = "distill", "distill_lora"
_BATCH = 8
"""Rows of test text at once."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement; `experts` is None for a method that works on single neurons."""

    method: str
    experts: int | None
    share: float
    seed: int

    @property
    def ours(self) -> bool:
        return self.method.split(":")[0] == SAM


def settings_of(method: str) -> dict[str, Any]:
    """The SamConfig fields named behind `sam`, and the steps of a distillation and the rank of its update; {} for a
    baseline. Raises InputError for a name or value unknown."""
    name, *pairs = method.split(":")
    if name != SAM and (name not in BASELINES or pairs):
        known = (SAM, *BASELINES)
        raise InputError(f"--methods has {method!r}{nearest(name, known)}; choose of {', '.join(known)}; only {SAM} "
                         f"takes settings, as in {SAM}:standin=mean")  # fmt: skip
    defaults: dict[str, Any] = {
        field.name: field.default for field in fields(SamConfig) if field.name not in _SET_BY_CELL
    }
    defaults |= {_DISTILL: 0, _LORA: 0}
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in defaults:
            raise InputError(f"--methods has {pair!r}, which sets no field of SamConfig that a cell leaves open"
                             f"{nearest(key, defaults)}; choose of {', '.join(defaults)}")  # fmt: skip
        kind = type(defaults[key])
        try:
            settings[key] = value if kind is str else kind(json.loads(value))
        except (ValueError, TypeError) as error:
            raise InputError(f"--methods has {pair!r}: {key} must be of type {kind.__name__}") from error
    return settings


def active_of(cell: Cell, ffns: Sequence[FFN]) -> list[float]:
    """k of every layer: the most whose counted FLOPs fit the share, ours in steps of one expert in one layer.

    Raises InputError where none does.
    """
    if not cell.ours:
        return list(largest_k(BASELINES[cell.method], ffns, num_experts=cell.experts or 0, share=cell.share))
    config = _config(cell, cell.experts or 0)
    gate, whole = (sam_share(config, ffns, [k] * len(ffns)) for k in (0, config.num_experts))
    k = int(len(ffns) * config.num_experts * (cell.share - gate) / whole) / len(ffns)
    # All of them need no gate.
    k = float(config.num_experts) if whole <= cell.share else k
    if k < config.roots:
        raise InputError(f"share = {cell.share} is too small for {cell.method} with {cell.experts} experts: not even "
                         "the roots fit; give a larger share")  # fmt: skip
    return [k] * len(ffns)


def distillation_of(cell: Cell) -> DistillConfig | None:
    """What the cell's method says of it. Raises InputError where it makes no sense."""
    settings = settings_of(cell.method)
    if _DISTILL not in settings:
        if _LORA in settings:
            raise InputError(f"--methods has {cell.method!r}: {_LORA} is of a distillation; give {_DISTILL}=STEPS too")
        return None
    config = DistillConfig(steps=settings[_DISTILL], lora_rank=settings.get(_LORA, 0), seed=cell.seed)
    check_distillation(config, settings.get("standin", SamConfig.standin))
    return config


def sam_share(config: SamConfig, ffns: Sequence[FFN], k: Sequence[float]) -> float:
    """Our counted FLOPs over the dense FFNs', all layers together."""

    def flops(ffn: FFN, active: float) -> float:
        return ffn_flops(
            config, hidden=ffn.hidden, neurons=ffn.neurons, gated=ffn.gate is not None, active=active
        )  # fmt: skip

    counted = sum(flops(ffn, active) for ffn, active in zip(ffns, k, strict=True))
    return counted / sum(flops(ffn, config.num_experts) for ffn in ffns)


def baseline_share(method: str, layers: Sequence[MaskedFFN]) -> float:
    """A baseline's counted FLOPs over the dense FFNs', all layers together."""
    counted = dense = 0.0
    for layer in layers:
        counted += baseline_flops(BASELINES[method], layer.ffn, num_experts=layer.num_experts, k=layer.k)
        dense += baseline_flops(BASELINES["static"], layer.ffn, num_experts=layer.ffn.neurons, k=layer.ffn.neurons)
    return counted / dense


def measure(
    cell: Cell, model: PreTrainedModel, calibration_BS: Tensor, test: Mapping[str, Tensor], *,
    distill_BS: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Convert a copy of the model and read the test text with it: perplexity, counted share of the FLOPs, k of every
    layer, share of the experts visited, and `mass`, the mean over layers and tokens of the share of
    sum_i h_i^2 ||w_i||^2 that the visited neurons i have, w_i their rows of the down projection.

    `distill_BS`: text for a cell that asks for distillation, that of the calibration if not given.
    Where tokens visit as many experts as their scores want, what is counted is what the test text visits, and k is
    lowered until that fits the share.
    """
    ffns = find_ffns(model)
    most = active_of(cell, ffns)
    converted = copy.deepcopy(model)
    if cell.ours:
        config = _config(cell, int(most[0]))
        converted = get_sam_model(converted, config, calibration=calibration_BS, progress=False)
        distillation = distillation_of(cell)
        if distillation is not None:
            distill(converted, calibration_BS if distill_BS is None else distill_BS, distillation, progress=False)
        layers: list[Any] = converted.sam_layers
        total = round(sum(most))
        while True:
            with converted.active(total / len(ffns)):
                scores, watched = _read(converted, layers, _sam_visited, test)
                k = [layer.top_k for layer in layers]
            flops = sam_share(config, ffns, [config.num_experts * own.visited for own in watched])
            if flops <= cell.share + 1e-9:
                break
            least = config.roots * len(ffns)
            if total == least:
                raise InputError(f"share = {cell.share} is too small for {cell.method}: the roots alone take "
                                 f"{flops:.3f} of the dense FFNs' FLOPs; give a larger share")  # fmt: skip
            total = max(least, total - max(1, int((flops - cell.share) * config.num_experts * len(ffns))))
    else:
        k = [int(own) for own in most]
        layers = convert(
            converted, BASELINES[cell.method], calibration_BS, num_experts=cell.experts or 0, k=k, seed=cell.seed
        )  # fmt: skip
        flops = baseline_share(cell.method, layers)
        scores, watched = _read(converted, layers, MaskedFFN.visited, test)
    assert flops <= cell.share + 1e-9, f"{cell} costs {flops} of the dense FFNs' FLOPs"
    return {
        "perplexity": headline(scores, scores), "flops": flops, "k": k,
        "active": sum(own.visited for own in watched) / len(watched),
        "mass": sum(own.mass for own in watched) / len(watched),
        "domains": {name: own.perplexity for name, own in scores.items()},
    }  # fmt: skip


def score(model: PreTrainedModel, test: Mapping[str, Tensor]) -> dict[str, DomainScore]:
    """Of every domain's rows (B, S)."""
    scores = {}
    for name, rows_BS in test.items():
        nll_sum, tokens = token_nll(
            model, list(rows_BS), window=rows_BS.shape[1], stride=rows_BS.shape[1], batch=_BATCH
        )  # fmt: skip
        scores[name] = DomainScore(nll_sum=nll_sum, tokens=tokens)
    return scores


def _config(cell: Cell, k: int) -> SamConfig:
    assert cell.experts is not None
    settings = settings_of(cell.method)
    for name in (_DISTILL, _LORA):
        settings.pop(name, None)
    return SamConfig(num_experts=cell.experts, top_k=k, seed=cell.seed, **settings)


def _sam_visited(layer: SamFFN, x_Td: Tensor) -> Tensor:
    """(T, m) bool."""
    return layer.visited(x_Td).repeat_interleave(layer.neurons, dim=1)


@dataclass
class _Watched:
    """Of one layer, means over the tokens that have passed it: the share of the neurons visited, and of the mass."""

    visited: float = 0.0
    mass: float = 0.0
    tokens: int = 0

    def add(self, layer: Any, x_Td: Tensor, visited_Tm: Tensor) -> None:
        energy_Tm = hidden_of(layer.ffn, x_Td).square() * layer.ffn.weights()[2].float().square().sum(1)
        captured_T = (energy_Tm * visited_Tm).sum(1) / energy_Tm.sum(1).clamp(min=1e-30)
        self.tokens += len(x_Td)
        part = len(x_Td) / self.tokens
        self.visited += part * (float(visited_Tm.double().mean()) - self.visited)
        self.mass += part * (float(captured_T.double().mean()) - self.mass)


def _read(
    model: PreTrainedModel, layers: Sequence[nn.Module], visited: Callable[[Any, Tensor], Tensor],
    test: Mapping[str, Tensor],
) -> tuple[dict[str, DomainScore], list[_Watched]]:  # fmt: skip
    """Scores of the domains, and what every layer did on the way."""
    watched = [_Watched() for _ in layers]

    def watch(index: int, layer: Any, args: tuple[Tensor, ...]) -> None:
        x_Td = args[0].reshape(-1, args[0].shape[-1])
        watched[index].add(layer, x_Td, visited(layer, x_Td))

    handles = [
        layer.register_forward_pre_hook(lambda module, args, index=index: watch(index, module, args))
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            return score(model, test), watched
    finally:
        for handle in handles:
            handle.remove()
