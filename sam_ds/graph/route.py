"""The route of a token through the expert graph, its differentiable gate values, and what is counted on the
way.

Greedy best-first expansion (ours; with the full graph it is the top-k of EMoE, arXiv 2310.10908, beside
always-on roots as in CMoE, arXiv 2502.04416): visited = roots; then k - roots times the unvisited expert with
the highest gate score among those with an edge from a visited one; stop when there is none. Ties go to the
lower index.

Weights are 1 in value, so that all experts visited is exactly the dense layer; the gate learns through the
straight-through term 1 + g - stopgrad(g), g being the softmax over the experts that were eligible at that
decision.

Everything is dense masked arithmetic on (T, S): no Python over tokens, no host synchronisation, static
shapes.

Letters: T tokens, S experts held (ids 0..S-1, roots first), J = k - roots decisions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNVISITED = torch.iinfo(torch.int16).max
"""The order of an expert that a token does not visit."""

COUNT_CHUNK = 1 << 22
"""Entries of the (tokens, S, S) comparison held at a time while counting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """What a batch of tokens visited, and why."""

    order_TS: Tensor
    """int16: 0 for roots, j + 1 for the expert visited at decision j, UNVISITED otherwise."""
    chosen_TJ: Tensor
    """int64: the expert visited at decision j, -1 for none."""
    parent_TJ: Tensor
    """int64: tail of the credited edge, the visited parent with the highest score; -1 for none."""
    eligible_TJS: Tensor
    """bool: unvisited experts with an edge from a visited one, when decision j was taken."""
    choice_T: Tensor
    """bool: some eligible expert stayed unvisited, so the scores mattered for what this token computes."""

    @property
    def visited_TS(self) -> Tensor:
        """bool: roots and chosen experts."""
        return self.order_TS != UNVISITED


@torch.no_grad()
def route(scores_TS: Tensor, adjacency_SS: Tensor, *, roots: int, k: int, threshold: Tensor | None = None) -> Routing:
    """Visit up to `k` experts (roots included) for each token.

    scores_TS: (T, S) finite gate scores. adjacency_SS: (S, S) bool, strictly upper triangular, [p, e] is p ->
    e. k >= S visits everything reachable; with a `threshold` (0-dim), no expert that scores less (`graph.widest`).
    The credited parent is the visited one with the highest score at the moment of the decision; roots count as
    highest, lowest index first.
    """
    num_tokens, num_held = scores_TS.shape
    assert adjacency_SS.shape == (num_held, num_held) and adjacency_SS.dtype == torch.bool
    assert 1 <= roots <= num_held and roots <= k
    decisions = min(k, num_held) - roots
    device = scores_TS.device
    index_S = torch.arange(num_held, device=device)
    order_TS = torch.full((num_tokens, num_held), UNVISITED, dtype=torch.int16, device=device)
    visited_TS = (index_S < roots).repeat(num_tokens, 1)
    eligible_TS = adjacency_SS[:roots].any(0) & ~visited_TS
    eligible_TJS = torch.empty((num_tokens, decisions, num_held), dtype=torch.bool, device=device)
    chosen_TJ = torch.empty((num_tokens, decisions), dtype=torch.int64, device=device)
    parent_TJ = torch.empty_like(chosen_TJ)
    minus_inf = torch.full((), float("-inf"), dtype=scores_TS.dtype, device=device)
    credit_TS = scores_TS.masked_fill(index_S < roots, float("inf"))
    tails_SS = adjacency_SS.T.contiguous()
    worth_TS = scores_TS if threshold is None else scores_TS.masked_fill(scores_TS < threshold, float("-inf"))

    for j in range(decisions):
        eligible_TJS[:, j] = eligible_TS
        best_T, chosen_T = torch.where(eligible_TS, worth_TS, minus_inf).max(dim=1)  # first index on ties
        found_T = best_T != minus_inf
        parent_TS = tails_SS.index_select(0, chosen_T) & visited_TS
        parent_T = torch.where(parent_TS, credit_TS, minus_inf).argmax(dim=1)
        chosen_TJ[:, j] = torch.where(found_T, chosen_T, -1)
        parent_TJ[:, j] = torch.where(found_T, parent_T, -1)
        # a token with nothing left to visit has chosen_T = 0, a root: visited already, and its heads are too
        order_TS.scatter_(1, chosen_T[:, None], j + 1)
        visited_TS.scatter_(1, chosen_T[:, None], True)
        eligible_TS = (eligible_TS | adjacency_SS.index_select(0, chosen_T)) & ~visited_TS
    order_TS[:, :roots] = 0

    return Routing(
        order_TS=order_TS,
        chosen_TJ=chosen_TJ,
        parent_TJ=parent_TJ,
        eligible_TJS=eligible_TJS,
        choice_T=eligible_TS.any(dim=1),
    )


def gate_values(scores_TS: Tensor, routing: Routing, edge_logits_SS: Tensor | None = None) -> Tensor:
    """(T, J) g of every chosen expert; 0 where none was chosen.

        g = softmax(scores over the eligible)[chosen] * sigmoid(edge_logits[parent, chosen])

    Differentiable in the scores and the edge logits, except for tokens that visited everything they could
    reach: there the route had no choice, g is a constant, and the gradients stay those of the dense layer.
    """
    found_TJ = routing.chosen_TJ >= 0
    chosen_TJ = routing.chosen_TJ.clamp(min=0)
    # rows without a choice keep all scores: an empty softmax would put NaN into the gradient
    excluded_TJS = ~routing.eligible_TJS & found_TJ[..., None]
    logits_TJS = scores_TS[:, None, :].masked_fill(excluded_TJS, float("-inf"))
    g_TJ = (scores_TS.gather(1, chosen_TJ) - logits_TJS.logsumexp(dim=2)).exp()
    if edge_logits_SS is not None:
        g_TJ = g_TJ * edge_logits_SS[routing.parent_TJ.clamp(min=0), chosen_TJ].sigmoid()
    g_TJ = torch.where(found_TJ, g_TJ, 0.0)
    return torch.where(routing.choice_T[:, None], g_TJ, g_TJ.detach())


def straight_through(g_TJ: Tensor) -> Tensor:
    """Weights that are exactly 1 in value and carry the gradient of g."""
    return 1.0 + (g_TJ - g_TJ.detach())


@dataclass(frozen=True, kw_only=True, slots=True)
class Counters:
    """Token counts per edge of one layer, int64 (S, S), [tail, head]; they add up over batches and
    clients."""

    used_SS: Tensor
    """Credited edges."""
    offered_SS: Tensor
    """Tokens for which the head was eligible through this edge at some decision."""
    together_SS: Tensor
    """Tokens that visited both, strictly upper; row 0 is the visit count of every other expert."""

    def __add__(self, other: Counters) -> Counters:
        return Counters(
            used_SS=self.used_SS + other.used_SS,
            offered_SS=self.offered_SS + other.offered_SS,
            together_SS=self.together_SS + other.together_SS,
        )


@torch.no_grad()
def count(routing: Routing, adjacency_SS: Tensor) -> Counters:
    """Counters of one batch. Decision j sees the experts of order <= j, so e was offered through p if

    order_p < min(order_e, J)   and   p -> e is an edge
    """
    num_held = adjacency_SS.shape[0]
    decisions = routing.chosen_TJ.shape[1]
    device = adjacency_SS.device
    # the credited edges as flat indices; "none" goes to one slot past the end
    edge_TJ = torch.where(
        routing.chosen_TJ >= 0, routing.parent_TJ * num_held + routing.chosen_TJ, num_held * num_held
    )
    used = torch.zeros(num_held * num_held + 1, dtype=torch.int64, device=device)
    used.scatter_add_(0, edge_TJ.reshape(-1), torch.ones_like(edge_TJ).reshape(-1))

    offered_SS = torch.zeros((num_held, num_held), dtype=torch.int64, device=device)
    for order_CS in torch.split(routing.order_TS, max(1, COUNT_CHUNK // (num_held * num_held))):
        deadline_CS = order_CS.clamp(max=decisions)
        offered_SS += (order_CS[:, :, None] < deadline_CS[:, None, :]).sum(dim=0)
    # float64: exact, and the one type that autocast leaves alone
    visited_TS = routing.visited_TS.double()
    together_SS = (visited_TS.T @ visited_TS).long()
    return Counters(
        used_SS=used[:-1].view(num_held, num_held),
        offered_SS=offered_SS * adjacency_SS,
        together_SS=together_SS.triu(diagonal=1),
    )
