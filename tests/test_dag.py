from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import graphs, has_path

from sam_ds.errors import InputError
from sam_ds.graph.dag import (
    check_graph,
    contract,
    explore,
    full_graph,
    initial_graph,
    random_graph,
    reach_mass,
    reachable,
    repair,
    top_edges,
)

seeds = st.integers(0, 2**32 - 1)


def upper(num_experts: int, *edges: tuple[int, int]) -> np.ndarray:
    mask_EE = np.zeros((num_experts, num_experts), dtype=bool)
    for tail, head in edges:
        mask_EE[tail, head] = True
    return mask_EE


def test_check_graph_accepts_one_layer_or_all() -> None:
    check_graph(full_graph(5), roots=1)
    check_graph(np.stack([full_graph(5), upper(5, (0, 1), (1, 2), (2, 3), (3, 4))]), roots=1)


@pytest.mark.parametrize(
    ("mask", "roots", "words"),
    [
        (upper(3, (0, 1), (0, 2), (2, 1)), 1, "2 -> 1"),
        (upper(3, (0, 1), (1, 1), (0, 2)), 1, "1 -> 1"),
        (np.stack([full_graph(4), upper(4, (0, 1), (2, 3))]), 1, r"\[2, 3\] of layer 1"),
        (full_graph(3), 0, "roots must be"),
        (full_graph(3), 4, "roots must be"),
        (full_graph(3).astype(int), 1, "bool array"),
        (np.zeros((2, 3), dtype=bool), 1, "bool array"),
    ],
)
def test_check_graph_names_what_is_wrong(mask: np.ndarray, roots: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_graph(mask, roots)


@given(seeds, st.integers(2, 9), st.floats(0, 1), st.data())
def test_reachable_is_a_path_from_a_root(
    seed: int, num_experts: int, density: float, data: st.DataObject
) -> None:
    roots = data.draw(st.integers(1, num_experts))
    mask_EE = np.triu(np.random.default_rng(seed).random((num_experts, num_experts)) < density, 1)
    everyone = set(range(num_experts))
    expected = [e < roots or any(has_path(mask_EE, r, e, everyone) for r in range(roots)) for e in everyone]
    assert reachable(mask_EE, roots).tolist() == expected


@given(seeds, st.integers(2, 9), st.floats(0, 1), st.data())
def test_repair_adds_one_edge_to_each_orphan_only(
    seed: int, num_experts: int, density: float, data: st.DataObject
) -> None:
    roots = data.draw(st.integers(1, num_experts))
    rng = np.random.default_rng(seed)
    mask_EE = np.triu(rng.random((num_experts, num_experts)) < density, 1)
    before = mask_EE.copy()
    repaired_EE = repair(mask_EE, roots, prior_EE=rng.random((num_experts, num_experts)))
    check_graph(repaired_EE, roots)
    assert (mask_EE == before).all()
    added = repaired_EE & ~mask_EE
    orphans = ~mask_EE.any(axis=0) & (np.arange(num_experts) >= roots)
    assert (repaired_EE >= mask_EE).all()
    assert (added.sum(axis=0) == orphans).all()


def test_repair_prefers_the_prior_then_the_allowed_then_root_zero() -> None:
    prior_EE = np.zeros((4, 4))
    prior_EE[1, 3], prior_EE[2, 3] = 1.0, 2.0
    mask_EE = upper(4, (0, 1), (1, 2))
    assert repair(mask_EE, 1, prior_EE=prior_EE)[:, 3].tolist() == [False, False, True, False]
    allowed_EE = upper(4, (1, 3))
    assert repair(mask_EE, 1, allowed_EE, prior_EE)[:, 3].tolist() == [False, True, False, False]
    assert repair(mask_EE, 1, upper(4), prior_EE)[:, 3].tolist() == [True, False, False, False]
    assert repair(mask_EE, 1)[:, 3].tolist() == [True, False, False, False]


@given(graphs(), seeds)
def test_contract_is_path_search_and_keeps_reachability(graph: tuple[np.ndarray, int], seed: int) -> None:
    mask_EE, roots = graph
    num_experts = len(mask_EE)
    rng = np.random.default_rng(seed)
    subset = [e for e in range(num_experts) if e < roots or rng.random() < 0.5]
    outside = set(range(num_experts)) - set(subset)
    contracted_SS = contract(mask_EE, subset)
    expected = [[p < e and has_path(mask_EE, p, e, outside) for e in subset] for p in subset]
    assert contracted_SS.tolist() == expected
    check_graph(contracted_SS, roots)


@pytest.mark.parametrize("subset", [[], [1, 0], [0, 0], [-1, 2], [0, 4]])
def test_contract_refuses_other_ids(subset: list[int]) -> None:
    with pytest.raises(InputError, match="strictly ascending"):
        contract(full_graph(4), subset)


def test_top_edges_equals_the_best_of_all_reachable_masks() -> None:
    rng = np.random.default_rng(0)
    allowed_EE = upper(5, (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (0, 4), (2, 4), (3, 4))
    edges = np.argwhere(allowed_EE)
    for budget, roots in itertools.product((4, 5, 6), (1, 2)):
        logits_EE = rng.normal(size=(5, 5))
        best = max(
            logits_EE[tuple(edges[list(chosen)].T)].sum()
            for chosen in itertools.combinations(range(len(edges)), budget)
            if (edges[list(chosen)][:, 1] >= roots).all()
            and reachable(upper(5, *(tuple(e) for e in edges[list(chosen)])), roots).all()
        )
        mask_EE = top_edges(logits_EE, allowed_EE, budget, roots)
        assert mask_EE.sum() == budget
        assert logits_EE[mask_EE].sum() == pytest.approx(best)


@given(graphs(), seeds, st.data())
def test_top_edges_promises(graph: tuple[np.ndarray, int], seed: int, data: st.DataObject) -> None:
    allowed_EE, roots = graph
    num_experts = len(allowed_EE)
    # few distinct values, so that ties occur
    logits_EE = np.random.default_rng(seed).integers(0, 3, size=allowed_EE.shape).astype(float)
    budget = data.draw(st.integers(num_experts - roots, num_experts**2))
    mask_EE = top_edges(logits_EE, allowed_EE, budget, roots)
    useful_EE = allowed_EE & full_graph(num_experts, roots)
    check_graph(mask_EE, roots)
    assert not (mask_EE & ~useful_EE).any()
    assert mask_EE.sum() == min(budget, useful_EE.sum())
    flat = np.flatnonzero(useful_EE)
    plain = upper(num_experts)
    plain.flat[sorted(flat, key=lambda i: (-logits_EE.flat[i], i))[:budget]] = True
    if reachable(plain, roots).all():
        assert (mask_EE == plain).all()


def test_top_edges_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(InputError, match="at least 3 edges"):
        top_edges(np.zeros((4, 4)), full_graph(4), budget=2, roots=1)
    with pytest.raises(InputError, match="unreachable"):
        top_edges(np.zeros((3, 3)), upper(3, (0, 1)), budget=3, roots=1)
    with pytest.raises(InputError, match="NaN"):
        top_edges(np.full((3, 3), np.nan), full_graph(3), budget=3, roots=1)
    # what assemblers put on and below the diagonal is never read
    below = np.where(full_graph(3), 1.0, -np.inf)
    assert top_edges(below, full_graph(3), budget=9, roots=1).sum() == 3


@given(graphs(), seeds, st.floats(0, 1), st.data())
@settings(max_examples=200)
def test_explore_promises(graph: tuple[np.ndarray, int], seed: int, eps: float, data: st.DataObject) -> None:
    allowed_EE, roots = graph
    num_experts = len(allowed_EE)
    budget = data.draw(st.integers(num_experts - roots, num_experts**2))
    mask_EE = top_edges(np.random.default_rng(seed).random(allowed_EE.shape), allowed_EE, budget, roots)
    explored_EE = explore(mask_EE, allowed_EE, eps, np.random.default_rng([seed, 1]), budget, roots)
    check_graph(explored_EE, roots)
    assert explored_EE.sum() <= budget
    assert not (explored_EE & ~allowed_EE).any()
    again_EE = explore(mask_EE, allowed_EE, eps, np.random.default_rng([seed, 1]), budget, roots)
    assert (explored_EE == again_EE).all()
    assert (explore(mask_EE, allowed_EE, 0.0, np.random.default_rng(0), budget, roots) == mask_EE).all()


def test_explore_flips_with_probability_eps() -> None:
    # a chain plus nothing: reachability never binds on the other edges, nor does the budget
    chain_EE = np.eye(30, k=1, dtype=bool)
    flips = explore(chain_EE, full_graph(30), 0.2, np.random.default_rng(3), 435, 1)[np.triu_indices(30, 2)]
    assert flips.mean() == pytest.approx(0.2, abs=0.05)
    with pytest.raises(InputError, match="eps"):
        explore(chain_EE, full_graph(30), 1.2, np.random.default_rng(3), 435, 1)
    with pytest.raises(InputError, match="within the allowed"):
        explore(full_graph(30), chain_EE, 0.2, np.random.default_rng(3), 435, 1)


def test_initial_and_random_graphs_have_the_size_asked_for() -> None:
    rng = np.random.default_rng(1)
    affinity_EE = rng.random((16, 16))
    mask_EE = initial_graph(affinity_EE, 0.25, roots=2)
    check_graph(mask_EE, 2)
    assert mask_EE.sum() == round(0.25 * full_graph(16, 2).sum())
    assert affinity_EE[mask_EE].mean() > 0.7
    assert (initial_graph(affinity_EE, 1.0, 2) == full_graph(16, 2)).all()
    assert initial_graph(affinity_EE, 1e-9, 2).sum() == 14
    control_EE = random_graph(16, int(mask_EE.sum()), 2, rng)
    check_graph(control_EE, 2)
    assert control_EE.sum() == mask_EE.sum()
    assert (control_EE != mask_EE).any()
    with pytest.raises(InputError, match="density"):
        initial_graph(affinity_EE, 0.0, 2)


def test_reach_mass_by_hand() -> None:
    mask_EE = upper(4, (0, 1), (0, 2), (1, 3), (2, 3))
    usage_E = np.array([0.3, 0.5, 0.4, 0.8])
    # expert 3 is reached through 1 (0.5) or 2 (0.4): 1 - 0.5 * 0.6 = 0.7
    np.testing.assert_allclose(reach_mass(mask_EE, usage_E, roots=1), [1.0, 0.5, 0.4, 0.8 * 0.7])
    np.testing.assert_allclose(reach_mass(full_graph(4), usage_E, roots=1), [1.0, 0.5, 0.4, 0.8])
    with pytest.raises(InputError, match="usage"):
        reach_mass(mask_EE, usage_E * 2, roots=1)
