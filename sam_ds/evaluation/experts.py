"""What a converted model looks like inside: sizes, graphs, how often tokens visit an expert, how much that captures.

Mass captured is the share of the feed-forward output's energy that the visited experts hold:

    sum_t sum_{e in A(x_t)} ||f_e(x_t) - mu_e||^2 / sum_t sum_e ||f_e(x_t) - mu_e||^2

mu_e the mean of f_e over the same text: a constant is what the simplest stand-in gives for free. Stand-ins hold some
of the rest, and experts cancel each other in part, so it bounds nothing: it says what the routes choose well. f_e is of
the layer's input, without messages.

Legend: B rows, S tokens a row, T tokens, E experts, n neurons an expert, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import SamMixin
from sam_ds.graph.route import Counters, count

_BATCH = 8
"""Rows a forward pass."""
_CHUNK = 256
"""Tokens of which the outputs of all experts are held at once."""


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One layer; `usage` the share of tokens that visit each expert, `edges` its graph as (tail, head)."""

    path: str
    experts: int
    neurons: int
    roots: int
    active: int
    edges: list[tuple[int, int]]
    usage: list[float]
    mass: float | None = None
    """Of the text that was read; None without text."""
    used: list[int] | None = None
    """How many tokens took each edge; None without text."""

    def summary(self) -> str:
        """One line without usage."""
        roots = f"{self.roots} root{'' if self.roots == 1 else 's'}"
        captured = "" if self.mass is None else f", mass captured {percent(self.mass)}"
        return (f"{self.path}: {self.experts} experts of {self.neurons} neurons, {roots}, {self.active} "
                f"visited, {len(self.edges)} edges{captured}")  # fmt: skip


def percent(share: float) -> str:
    """As people read it."""
    return f"{100 * share:.1f} %"


def describe(model: PreTrainedModel, ids_BS: Tensor | None = None) -> list[LayerFacts]:
    """Every layer, in order of depth. `ids_BS`: token ids (B, S) to route through the model.

    Without them, usage is that of the calibration text when the gates were fitted, over the full graph.
    """
    assert isinstance(model, SamMixin)
    graph_LEE = model.graph()
    seen = [None] * len(model.sam_layers) if ids_BS is None else _observe(model, ids_BS)
    facts = []
    for index, (layer, path, watch) in enumerate(zip(model.sam_layers, model._sam_original, seen, strict=True)):
        edges = [(int(tail), int(head)) for tail, head in graph_LEE[index].nonzero()]
        # The affinity of an expert with itself is P(e) / P(e)^2.
        lift_E = model.sam_affinity_LEE[index].diagonal().double()
        usage_E = torch.where(lift_E > 0, 1.0 / lift_E, 0.0) if watch is None else watch.usage()
        facts.append(
            LayerFacts(
                path=path, experts=layer.num_experts, neurons=layer.neurons, roots=layer.roots,
                active=layer.top_k, edges=edges, usage=usage_E.tolist(),
                mass=None if watch is None else watch.mass(),
                used=None if watch is None else watch.used(edges),
            )
        )  # fmt: skip
    return facts


class _Watch:
    """Sums over the tokens that pass one layer, in float64: the means are known only at the end."""

    def __init__(self, layer: SamFFN) -> None:
        self.layer = layer
        self.tokens = 0
        like = layer.sam.wg.new_zeros((), dtype=torch.float64)
        self.visits_E = like.new_zeros(layer.slots)
        self.counters: Counters | None = None
        self.sums_2Ed = like.new_zeros(2, layer.slots, layer.ffn.hidden)
        """f_e, summed over all tokens and over those that visit e."""
        self.energy_2E = like.new_zeros(2, layer.slots)
        """||f_e||^2, likewise."""

    def add(self, x_Td: Tensor) -> None:
        layer = self.layer
        adjacency_EE = layer.sam.adjacency_SS
        routing = layer.routing(layer.scores(x_Td))
        counted = count(routing, adjacency_EE)
        self.counters = counted if self.counters is None else self.counters + counted
        weights_2TE = torch.stack([torch.ones_like(routing.visited_TS), routing.visited_TS]).double()
        self.tokens += x_Td.shape[0]
        self.visits_E = self.visits_E + weights_2TE[1].sum(0)
        hidden_TEn = hidden_of(layer.ffn, x_Td).unflatten(1, (layer.slots, layer.neurons))
        down_End = layer.slots_out(layer.matrices()[2]).float()
        for h_CEn, weights_2CE in zip(hidden_TEn.split(_CHUNK), weights_2TE.split(_CHUNK, dim=1), strict=True):
            out_CEd = torch.einsum("cen,end->ced", h_CEn, down_End).double()
            self.sums_2Ed = self.sums_2Ed + torch.einsum("wce,ced->wed", weights_2CE, out_CEd)
            self.energy_2E = self.energy_2E + torch.einsum("wce,ce->we", weights_2CE, out_CEd.square().sum(-1))

    def used(self, edges: Sequence[tuple[int, int]]) -> list[int]:
        """Tokens that took each edge."""
        assert self.counters is not None, "it has seen a token"
        return [int(self.counters.used_SS[edge]) for edge in edges]

    def usage(self) -> Tensor:
        """(E,) share of the tokens that visit each expert."""
        return self.visits_E / self.tokens

    def mass(self) -> float:
        """The file's formula; 1 where no expert's output varies."""
        mean_Ed = self.sums_2Ed[0] / self.tokens
        count_2E = torch.stack([torch.full_like(self.visits_E, self.tokens), self.visits_E])
        deviation_2E = self.energy_2E - 2 * (self.sums_2Ed * mean_Ed).sum(-1) + count_2E * mean_Ed.square().sum(-1)
        every, visited = deviation_2E.clamp(min=0).sum(-1).tolist()
        return visited / every if every > 0 else 1.0


@torch.no_grad()
def _observe(model: PreTrainedModel, ids_BS: Tensor) -> Sequence[_Watch]:
    """Route the text through the model as it is and watch every layer."""
    assert isinstance(model, SamMixin)
    watches = [_Watch(layer) for layer in model.sam_layers]
    handles = [
        layer.register_forward_pre_hook(lambda _, args, watch=watch: watch.add(args[0].flatten(0, -2)))
        for layer, watch in zip(model.sam_layers, watches, strict=True)
    ]
    training = model.training
    model.eval()
    try:
        for rows_BS in ids_BS.split(_BATCH):
            model(input_ids=rows_BS.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return watches
