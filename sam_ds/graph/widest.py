"""Routing by a threshold: a token visits every expert whose score is high enough and that it can reach through such.

The greedy expansion of `graph.route`, stopped where no eligible expert scores as much as the threshold, visits the
same set in whatever order. An expert is in it if on some path to it from a root no score is below the threshold: if
the best path's lowest score, its *width*, is at least that (the widest path: Pollack, 1960). Edges lead from lower to
higher ids, so one sweep finds all widths, and a threshold for any mean number of visits is an order statistic of them.

Letters: T tokens, S experts (roots first), K = S + 1 budgets 0..S.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def widths(scores_TS: Tensor, adjacency_SS: Tensor, *, roots: int) -> Tensor:
    """(T, S) the highest threshold at which the token visits the expert: inf for roots, -inf where none leads to it."""
    width_ST = torch.full_like(scores_TS.t(), float("-inf"))
    width_ST[:roots] = float("inf")
    for head in range(roots, scores_TS.shape[1]):
        closed_p = ~adjacency_SS[:head, head]
        widest_T = width_ST[:head].masked_fill(closed_p[:, None], float("-inf")).amax(0)
        width_ST[head] = torch.minimum(scores_TS[:, head], widest_T)
    return width_ST.t()


@torch.no_grad()
def thresholds(width_TS: Tensor, *, roots: int) -> Tensor:
    """(K,) at which these tokens visit 0..S experts on average, roots included, or as near as the paths let them."""
    tokens, slots = width_TS.shape
    falling_P = width_TS[:, roots:].flatten().sort(descending=True).values
    table_K = width_TS.new_full((slots + 1,), float("inf"))
    for budget in range(roots + 1, slots + 1):
        table_K[budget] = falling_P[tokens * (budget - roots) - 1]
    return table_K
