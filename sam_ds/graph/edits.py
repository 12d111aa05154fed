"""Topology edits as values: propose, apply, invert, and try them on a loss one by one.

The server prunes and promotes edges every T_m rounds, at most rho_max over all layers. An edit names an edge,
so a list of them is small enough to send to every client, and has an inverse.

An edge can be pruned while its head keeps another incoming edge; in a strictly upper graph that is exactly
what keeps every expert reachable (see `dag`), so no edit needs to know how many roots there are.

Letters: L layers, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from sam_ds.errors import InputError, NotFinite
from sam_ds.graph.dag import BoolArray, FloatArray, full_graph

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True, kw_only=True, slots=True)
class Edit:
    """Remove (`prune`) or add (`promote`) the edge tail -> head of one layer."""

    layer: int
    tail: int
    head: int
    kind: Literal["prune", "promote"]

    def __post_init__(self) -> None:
        if self.kind not in ("prune", "promote"):
            raise InputError(f"edit kind must be 'prune' or 'promote', got {self.kind!r}")
        if self.layer < 0 or not 0 <= self.tail < self.head:
            raise InputError(f"an edit needs layer >= 0 and 0 <= tail < head, got {self._edge()}")

    def _edge(self) -> str:
        return f"{self.tail} -> {self.head} in layer {self.layer}"


def apply(graph_LEE: BoolArray, edits: Iterable[Edit]) -> BoolArray:
    """The (L, E, E) graph after the edits, in sequence; the input is not changed.

    Raises InputError, naming the edit, if it lies outside the graph, prunes an absent edge, promotes an
    existing one, prunes the last edge into an expert, or promotes an edge into an expert that has none (such
    an expert is a root). Lists of several periods can be concatenated.
    """
    graph_LEE = graph_LEE.copy()
    layers, num_experts, _ = graph_LEE.shape
    for edit in edits:
        if edit.layer >= layers or edit.head >= num_experts:
            raise InputError(f"{edit} lies outside a graph of {layers} layers and {num_experts} experts")
        at = (edit.layer, edit.tail, edit.head)
        in_edges = int(graph_LEE[edit.layer, :, edit.head].sum())
        if edit.kind == "prune":
            if not graph_LEE[at]:
                raise InputError(
                    f"{edit} prunes an edge that is not there: apply earlier edits first, or drop it"
                )
            if in_edges == 1:
                raise InputError(
                    f"{edit} takes the last edge into expert {edit.head}: promote another one first"
                )
        else:
            if graph_LEE[at]:
                raise InputError(f"{edit} promotes an edge that is already there: drop it")
            if in_edges == 0:
                raise InputError(f"{edit} leads into a root, which every token visits anyway: drop it")
        graph_LEE[at] = edit.kind == "promote"
    return graph_LEE


def inverse(edits: Sequence[Edit]) -> list[Edit]:
    """The edits that undo these: apply(apply(graph, edits), inverse(edits)) == graph."""
    return [replace(e, kind="prune" if e.kind == "promote" else "promote") for e in reversed(edits)]


def propose(
    graph_LEE: BoolArray,
    used_LEE: IntArray,
    offered_LEE: IntArray,
    together_LEE: IntArray,
    *,
    roots: int,
    max_edits: int,
    min_offered: int,
) -> list[Edit]:
    """At most `max_edits` edits over all layers, prune and promote in turn while both kinds last.

    Prune: existing edges offered at least `min_offered` times, lowest used / offered first. Promote: missing
    edges whose ends met at least `min_offered` times, highest lift first, lift = P(p, e) / (P(p) P(e)): a
    plain count would only ever ask for edges out of the experts that everybody visits. Ties go to the lower
    (layer, tail, head). Any subset of the list, in any order, can be applied: what `trial` rolls back
    endangers nothing after it.
    """
    num_experts = graph_LEE.shape[1]
    possible_LEE = np.broadcast_to(full_graph(num_experts, roots), graph_LEE.shape)
    rate_LEE = used_LEE / np.maximum(offered_LEE, 1)
    prunable_LEE = graph_LEE & possible_LEE & (offered_LEE >= min_offered)
    promotable_LEE = ~graph_LEE & possible_LEE & (together_LEE >= min_offered)

    in_edges_LE = graph_LEE.sum(axis=1)
    prunes: list[Edit] = []
    for layer, tail, head in _ascending(rate_LEE, prunable_LEE):
        if in_edges_LE[layer, head] > 1:  # promotions are not counted: they may be rolled back
            in_edges_LE[layer, head] -= 1
            prunes.append(Edit(layer=layer, tail=tail, head=head, kind="prune"))
    promotes = [
        Edit(layer=layer, tail=tail, head=head, kind="promote")
        for layer, tail, head in _ascending(-_lift(offered_LEE, together_LEE, roots), promotable_LEE)
    ]
    pairs = itertools.zip_longest(prunes, promotes)
    return [edit for pair in pairs for edit in pair if edit is not None][:max_edits]


def _lift(offered_LEE: IntArray, together_LEE: IntArray, roots: int) -> FloatArray:
    """(L, E, E) co-visits over those expected of independent ends, visits of tail * visits of head / tokens.

    Root 0 is visited by every token, so its row of `together` counts the visits of the others; the number of
    tokens of a layer is the largest count in it (an edge out of a root is offered to every token).
    """
    tokens_L = np.maximum(offered_LEE.max(axis=(1, 2)), together_LEE.max(axis=(1, 2)))
    visits_LE = together_LEE[:, 0, :].astype(np.float64)
    visits_LE[:, :roots] = tokens_L[:, None]
    expected_LEE = visits_LE[:, :, None] * visits_LE[:, None, :] / np.maximum(tokens_L, 1)[:, None, None]
    lift_LEE: FloatArray = together_LEE / np.maximum(expected_LEE, 1e-9)
    return lift_LEE


def _ascending(score_LEE: FloatArray, candidates_LEE: BoolArray) -> list[tuple[int, int, int]]:
    # argwhere lists edges in the order of (layer, tail, head), which the stable sort keeps on ties
    edges = np.argwhere(candidates_LEE)
    order = np.argsort(score_LEE[candidates_LEE], kind="stable")
    return [(int(layer), int(tail), int(head)) for layer, tail, head in edges[order]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What came of a list of edits on one validation batch."""

    graph_LEE: BoolArray
    """The graph with the kept edits."""
    kept: list[Edit]
    rolled_back: list[Edit]
    changes: list[float]
    """Loss after minus loss before, one for each edit in the order tried; inf where the loss was not a
    number."""
    gamma: float
    """gamma_hat = max |change|: a lower estimate of the gamma that bounds every single edit. 0 without
    edits."""


def trial(
    graph_LEE: BoolArray, edits: Sequence[Edit], loss: Callable[[BoolArray], float], tolerance: float
) -> TrialResult:
    """Apply the edits one by one, measure the loss after each, roll back those that raise it above the
    tolerance.

    `loss` maps an (L, E, E) graph to nats per token on a fixed batch. Raises NotFinite if the loss before
    the first edit is not.
    """
    before = loss(graph_LEE)
    if not math.isfinite(before):
        raise NotFinite(f"the validation loss before any edit must be finite, got {before}: check the batch")
    kept: list[Edit] = []
    rolled_back: list[Edit] = []
    changes: list[float] = []
    for edit in edits:
        candidate_LEE = apply(graph_LEE, [edit])
        after = loss(candidate_LEE)
        change = math.inf if math.isnan(after) else after - before
        changes.append(change)
        if change > tolerance:
            rolled_back.append(edit)
        else:
            kept.append(edit)
            graph_LEE, before = candidate_LEE, after
    return TrialResult(
        graph_LEE=graph_LEE,
        kept=kept,
        rolled_back=rolled_back,
        changes=changes,
        gamma=max((abs(change) for change in changes), default=0.0),
    )
