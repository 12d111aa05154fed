"""The expert DAG: masks, reachability, contraction to a held subset, hard top-B selection.

An edge p -> e means that a token which visits p may go on to e. A mask is strictly upper triangular:
edges lead from lower to higher ids, and the diagonal would be self-loops. Experts 0..roots-1 are visited by every
token, so an edge into a root says nothing and no function here ever selects one.

One fact carries this file: in a strictly upper graph every expert is reachable from the roots if and only if
every non-root expert has at least one incoming edge (induction over the index). Hence a reachable graph of B
edges with the largest sum of logits is "the best incoming edge of every expert, then the best of the rest".

Letters: E experts, L layers, S experts held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sam_ds.errors import InputError, NotFinite

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


def full_graph(num_experts: int, roots: int = 1) -> BoolArray:
    """(E, E) every strictly upper edge whose head is not a root: route = roots + top-(k - roots)."""
    mask_EE = np.triu(np.ones((num_experts, num_experts), dtype=np.bool_), k=1)
    mask_EE[:, :roots] = False
    return mask_EE


def check_graph(mask: BoolArray, roots: int) -> None:
    """Raise InputError unless `mask` (E, E) or (L, E, E) is bool, strictly upper triangular and reachable."""
    if mask.dtype != np.bool_ or mask.ndim not in (2, 3) or mask.shape[-1] != mask.shape[-2]:
        raise InputError(
            f"the graph must be a bool array of shape (E, E) or (L, E, E), got {mask.dtype} {mask.shape}"
        )
    _check_roots(roots, mask.shape[-1])
    for layer, mask_EE in enumerate(mask if mask.ndim == 3 else mask[None]):
        of_layer = f" of layer {layer}" if mask.ndim == 3 else ""
        lower = np.argwhere(np.tril(mask_EE))
        if lower.size:
            tail, head = lower[0].tolist()
            raise InputError(
                f"the graph{of_layer} holds the edge {tail} -> {head}; edges go from a lower to a higher index: remove "
                "it or swap its ends"
            )
        lost = np.flatnonzero(~reachable(mask_EE, roots))
        if lost.size:
            raise InputError(
                f"experts {lost.tolist()[:10]}{of_layer} cannot be reached from the {roots} root(s): add an edge into "
                "each, for instance with sam_ds.graph.dag.repair"
            )


def reachable(mask_EE: BoolArray, roots: int) -> BoolArray:
    """(E,) bool: which experts a token can reach from the experts 0..roots-1."""
    reach_E = np.arange(len(mask_EE)) < roots
    for e in range(roots, len(mask_EE)):
        reach_E[e] = bool((mask_EE[:e, e] & reach_E[:e]).any())
    return reach_E


def repair(
    mask_EE: BoolArray, roots: int, allowed_EE: BoolArray | None = None, prior_EE: FloatArray | None = None
) -> BoolArray:
    """Give every unreachable expert one incoming edge; returns a new (E, E) mask.

    Tail: the expert of lower index with the highest prior among the `allowed` edges (ties, and no prior: the
    lowest index); root 0 where no edge is allowed. Experts are treated in index order, so the tail is always
    reachable.
    """
    num_experts = len(mask_EE)
    _check_roots(roots, num_experts)
    allowed_EE = full_graph(num_experts) if allowed_EE is None else allowed_EE
    prior_EE = np.zeros((num_experts, num_experts)) if prior_EE is None else prior_EE
    repaired_EE = mask_EE.copy()
    for e in np.flatnonzero(~reachable(mask_EE, roots)):
        if not repaired_EE[:e, e].any():
            tails = np.flatnonzero(allowed_EE[:e, e])
            tail = tails[np.argmax(prior_EE[tails, e])] if tails.size else 0
            repaired_EE[tail, e] = True
    return repaired_EE


def contract(mask_EE: BoolArray, subset: Sequence[int] | npt.NDArray[np.int64]) -> BoolArray:
    """(S, S) mask over the ascending ids `subset`: p -> e if a path p ~> e has its interior outside the
    subset.

    With the roots in the subset, every held expert that was reachable stays reachable. Raises InputError if
    the ids are not strictly ascending experts of the graph.
    """
    ids_S = np.asarray(subset, dtype=np.int64)
    num_experts = len(mask_EE)
    if not ids_S.size or ids_S[0] < 0 or ids_S[-1] >= num_experts or (np.diff(ids_S) <= 0).any():
        raise InputError(f"subset must be strictly ascending ids in [0, {num_experts}), got {ids_S.tolist()}")
    paths_EE = mask_EE.copy()
    for outside in np.setdiff1d(np.arange(num_experts), ids_S):
        # Warshall's closure, over the absent experts only
        paths_EE |= np.outer(paths_EE[:, outside], paths_EE[outside])
    return paths_EE[np.ix_(ids_S, ids_S)]


def top_edges(logits_EE: FloatArray, allowed_EE: BoolArray, budget: int, roots: int) -> BoolArray:
    """(E, E) the reachable mask of min(budget, allowed) edges with the largest sum of logits.

    It is the plain top-B whenever that one is reachable. Ties go to the lower flat index (tail * E + head).
    Raises InputError if the budget is below one edge per non-root expert, if `allowed` leaves an expert
    without an incoming edge; NotFinite if an allowed edge has a NaN logit.
    """
    num_experts = len(allowed_EE)
    _check_roots(roots, num_experts)
    if budget < num_experts - roots:
        raise InputError(
            f"budget must be at least {num_experts - roots} edges, one into each of the {num_experts} "
            f"experts that is not one of the {roots} root(s), got {budget}"
        )
    candidates_EE = allowed_EE & full_graph(num_experts, roots)
    if not reachable(candidates_EE, roots).all():
        raise InputError("the allowed edges leave an expert unreachable: repair the graph they come from")
    if np.isnan(logits_EE[candidates_EE]).any():
        raise NotFinite("logits hold NaN on an allowed edge: check the model that produced them")
    # a stable descending sort, so that equal logits keep the order of the flat index
    ranked = np.flatnonzero(candidates_EE)
    ranked = ranked[np.argsort(-logits_EE.reshape(-1)[ranked], kind="stable")]
    _, first_into_head = np.unique(ranked % num_experts, return_index=True)
    order = np.concatenate([ranked[first_into_head], np.delete(ranked, first_into_head)])
    mask_EE = np.zeros_like(candidates_EE)
    mask_EE.reshape(-1)[order[:budget]] = True
    return mask_EE


def explore(
    mask_EE: BoolArray, allowed_EE: BoolArray, eps: float, rng: np.random.Generator, budget: int, roots: int
) -> BoolArray:
    """Flip each allowed edge with probability `eps`, then repair and trim: reachable, within allowed and
    budget.

    Which edges are added or dropped to keep those promises is drawn from `rng` too. eps = 0 returns the same
    edges.
    """
    if not 0.0 <= eps <= 1.0:
        raise InputError(f"eps must be a probability in [0, 1], got {eps}")
    if (mask_EE & ~allowed_EE).any() or not reachable(mask_EE, roots).all():
        raise InputError(
            "explore needs a reachable mask within the allowed edges: select it with top_edges first"
        )
    flips_EE = rng.random(mask_EE.shape) < eps
    priority_EE = rng.random(mask_EE.shape)
    flipped_EE = mask_EE ^ (flips_EE & allowed_EE & full_graph(len(mask_EE), roots))
    return top_edges(priority_EE, repair(flipped_EE, roots, allowed_EE, priority_EE), budget, roots)


def initial_graph(affinity_EE: FloatArray, density: float, roots: int) -> BoolArray:
    """(E, E) the share `density` in (0, 1] of the possible edges with the highest co-activation affinity,
    reachable."""
    if not 0.0 < density <= 1.0:
        raise InputError(f"density must be in (0, 1], got {density}")
    possible_EE = full_graph(len(affinity_EE), roots)
    budget = max(len(affinity_EE) - roots, round(density * int(possible_EE.sum())))
    return top_edges(affinity_EE, possible_EE, budget, roots)


def random_graph(num_experts: int, num_edges: int, roots: int, rng: np.random.Generator) -> BoolArray:
    """(E, E) the control of the same size: one random edge into each non-root expert, the rest uniform."""
    possible_EE = full_graph(num_experts, roots)
    return top_edges(rng.random((num_experts, num_experts)), possible_EE, num_edges, roots)


def reach_mass(mask_EE: BoolArray, usage_E: FloatArray, roots: int) -> FloatArray:
    """(E,) how often a text reaches each expert, edges taken as independent, in one pass in index order.

        reach_e = 1 for roots,      reach_e = usage_e * (1 - prod_p (1 - M_pe reach_p))

    `usage_E` is the share of tokens in [0, 1] that would use e were it always eligible.
    """
    if not ((usage_E >= 0.0) & (usage_E <= 1.0)).all():
        raise InputError(f"usage must be shares of tokens in [0, 1], got {usage_E.tolist()}")
    reach_E = np.ones(len(mask_EE))
    for e in range(roots, len(mask_EE)):
        reach_E[e] = usage_E[e] * (1.0 - np.prod(1.0 - mask_EE[:e, e] * reach_E[:e]))
    return reach_E


def _check_roots(roots: int, num_experts: int) -> None:
    if not 1 <= roots <= num_experts:
        raise InputError(f"roots must be between 1 and the number of experts ({num_experts}), got {roots}")
