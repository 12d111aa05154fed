"""One conversion measured: what `sam-ds bench convert` does for each of its cells.

Legend: B rows, S tokens a row, T tokens, m neurons, d hidden.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.surgery import FFN, find_ffns
from sam_ds.graph.route import route

SAM = "sam"
_SET_BY_CELL = ("num_experts", "top_k", "seed")
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
    """The SamConfig fields named behind `sam`; {} for a baseline. Raises InputError for a name or value unknown."""
    name, *pairs = method.split(":")
    if name != SAM and (name not in BASELINES or pairs):
        known = (SAM, *BASELINES)
        raise InputError(f"--methods has {method!r}{nearest(name, known)}; choose of {', '.join(known)}; only {SAM} "
                         f"takes settings, as in {SAM}:standin=mean")  # fmt: skip
    defaults = {field.name: field.default for field in fields(SamConfig) if field.name not in _SET_BY_CELL}
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


def active_of(cell: Cell, ffns: Sequence[FFN]) -> list[int]:
    """k of every layer: the most whose counted FLOPs fit the share. Raises InputError where none does."""
    if not cell.ours:
        return largest_k(BASELINES[cell.method], ffns, num_experts=cell.experts or 0, share=cell.share)
    for k in range(cell.experts or 0, 0, -1):
        config = _config(cell, k)
        if config is not None and sam_share(config, ffns, [k] * len(ffns)) <= cell.share:
            return [k] * len(ffns)
    raise InputError(f"share = {cell.share} is too small for {cell.method} with {cell.experts} experts: not even the "
                     "roots fit; give a larger share")  # fmt: skip


def sam_share(config: SamConfig, ffns: Sequence[FFN], k: Sequence[int]) -> float:
    """Our counted FLOPs over the dense FFNs', all layers together."""

    def flops(ffn: FFN, active: int) -> float:
        return ffn_flops(
            hidden=ffn.hidden, neurons=ffn.neurons, num_experts=config.num_experts, active=active,
            gated=ffn.gate is not None, roots=config.roots, standin_rank=config.standin_rank, standin=config.standin,
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
    cell: Cell, model: PreTrainedModel, calibration_BS: Tensor, test: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Convert a copy of the model and read the test text with it: perplexity, counted share of the FLOPs, k of every
    layer, share of the experts visited, and `mass`, the mean over layers and tokens of the share of
    sum_i h_i^2 ||w_i||^2 that the visited neurons i have, w_i their rows of the down projection."""
    if cell.ours:
        converted, flops = _convert_ours(cell, model, calibration_BS)
        layers: list[Any] = converted.sam_layers
        k, experts, visited = [layer.top_k for layer in layers], [layer.slots for layer in layers], _sam_visited
    else:
        converted = copy.deepcopy(model)
        layers = convert(
            converted, BASELINES[cell.method], calibration_BS, num_experts=cell.experts or 0,
            k=active_of(cell, find_ffns(model)), seed=cell.seed,
        )  # fmt: skip
        k, experts, visited = [layer.k for layer in layers], [layer.num_experts for layer in layers], MaskedFFN.visited
        flops = baseline_share(cell.method, layers)
    assert flops <= cell.share + 1e-9, f"{cell} costs {flops} of the dense FFNs' FLOPs"
    with _watch_mass(layers, visited) as masses:
        scores = score(converted, test)
    return {
        "perplexity": headline(scores, scores), "flops": flops, "k": k,
        "active": sum(own / of for own, of in zip(k, experts, strict=True)) / len(k),
        "mass": sum(total / tokens for total, tokens in masses) / len(masses),
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


def _config(cell: Cell, k: int) -> SamConfig | None:
    """None where there are more roots than k."""
    settings = settings_of(cell.method)
    assert cell.experts is not None
    if k < min(settings.get("roots", SamConfig.roots), cell.experts):
        return None
    return SamConfig(num_experts=cell.experts, top_k=k, seed=cell.seed, **settings)


def _convert_ours(cell: Cell, model: PreTrainedModel, calibration_BS: Tensor) -> tuple[Any, float]:
    ffns = find_ffns(model)
    k = active_of(cell, ffns)[0]
    while True:
        config = _config(cell, k)
        assert config is not None
        converted = get_sam_model(copy.deepcopy(model), config, calibration=calibration_BS, progress=False)
        flops = sam_share(config, ffns, [layer.top_k for layer in converted.sam_layers])
        if flops <= cell.share:
            return converted, flops
        # The layers were given unequal k, and where they are of unequal size that may cost more.
        k -= 1


def _sam_visited(layer: SamFFN, x_Td: Tensor) -> Tensor:
    """(T, m) bool."""
    if layer.top_k >= layer.slots:
        return torch.ones(x_Td.shape[0], layer.ffn.neurons, dtype=torch.bool, device=x_Td.device)
    routing = route(layer.scores(x_Td), layer.sam.adjacency_SS, roots=layer.roots, k=layer.top_k)
    return routing.visited_TS.repeat_interleave(layer.neurons, dim=1)


@contextmanager
def _watch_mass(layers: Sequence[nn.Module], visited: Callable[[Any, Tensor], Tensor]) -> Iterator[list[list[float]]]:
    """A list for each layer: the sum over tokens of the mass captured, and the tokens, of what runs in the block."""
    masses = [[0.0, 0.0] for _ in layers]

    def watch(index: int, layer: Any, args: tuple[Tensor, ...]) -> None:
        x_Td = args[0].reshape(-1, args[0].shape[-1])
        energy_Tm = hidden_of(layer.ffn, x_Td).square() * layer.ffn.weights()[2].float().square().sum(1)
        captured_T = (energy_Tm * visited(layer, x_Td)).sum(1) / energy_Tm.sum(1).clamp(min=1e-30)
        masses[index][0] += float(captured_T.double().sum())
        masses[index][1] += len(captured_T)

    handles = [
        layer.register_forward_pre_hook(lambda module, args, index=index: watch(index, module, args))
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            yield masses
    finally:
        for handle in handles:
            handle.remove()
