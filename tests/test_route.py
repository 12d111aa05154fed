from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import counts, graphs, walk

from sam_ds.graph import route as route_module
from sam_ds.graph.dag import full_graph, random_graph
from sam_ds.graph.route import UNVISITED, count, gate_values, route, straight_through

seeds = st.integers(0, 2**32 - 1)


def scores(seed: int, num_tokens: int, num_held: int, distinct: int | None = None) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    if distinct:
        return torch.from_numpy(rng.integers(0, distinct, size=(num_tokens, num_held)).astype(np.float32))
    return torch.from_numpy(rng.normal(size=(num_tokens, num_held)).astype(np.float32))


@given(graphs(), seeds, st.sampled_from([None, 1, 3]), st.data())
@settings(max_examples=200, deadline=None)
def test_route_and_counters_equal_a_walk_with_a_heap(
    graph: tuple[np.ndarray, int], seed: int, distinct: int | None, data: st.DataObject
) -> None:
    adjacency_SS, roots = graph
    num_held = len(adjacency_SS)
    k = data.draw(st.integers(roots, num_held + 2))
    scores_TS = scores(seed, 7, num_held, distinct)
    threshold = data.draw(st.none() | st.sampled_from(scores_TS.flatten().tolist()))
    stop = None if threshold is None else torch.tensor(threshold)
    routing = route(scores_TS, torch.from_numpy(adjacency_SS), roots=roots, k=k, threshold=stop)
    decisions = min(k, num_held) - roots
    assert routing.order_TS.dtype == torch.int16
    assert routing.chosen_TJ.shape == (7, decisions)

    lowest = -np.inf if threshold is None else threshold
    walks = [walk(row, adjacency_SS, roots, k, lowest) for row in scores_TS.numpy()]
    for t, w in enumerate(walks):
        none = [-1] * (decisions - len(w.parents))
        assert routing.chosen_TJ[t].tolist() == w.visited[roots:] + none
        assert routing.parent_TJ[t].tolist() == w.parents + none
        for j in range(decisions):
            eligible = w.eligible[j] if j < len(w.eligible) else w.left
            assert set(routing.eligible_TJS[t, j].nonzero()[:, 0].tolist()) == eligible
        order = [UNVISITED] * num_held
        for step, expert in enumerate(w.visited):
            order[expert] = max(0, step - roots + 1)
        assert routing.order_TS[t].tolist() == order
        assert set(routing.visited_TS[t].nonzero()[:, 0].tolist()) == set(w.visited)
        assert bool(routing.choice_T[t]) == bool(w.left)

    counters = count(routing, torch.from_numpy(adjacency_SS))
    expected = counts(walks, adjacency_SS, roots)
    for name, value in expected.items():
        counted = getattr(counters, f"{name}_SS")
        assert counted.dtype == torch.int64
        assert counted.tolist() == value.tolist(), name


def test_full_graph_is_roots_and_top_k() -> None:
    scores_TS = scores(0, 64, 16)
    visited_TS = route(scores_TS, torch.from_numpy(full_graph(16)), roots=2, k=6).visited_TS
    top = scores_TS[:, 2:].topk(4, dim=1).indices + 2
    expected_TS = torch.zeros(64, 16, dtype=torch.bool).scatter_(1, top, True)
    expected_TS[:, :2] = True
    assert torch.equal(visited_TS, expected_TS)


def test_k_of_s_or_more_visits_everything() -> None:
    adjacency_SS = torch.from_numpy(random_graph(12, 20, 1, np.random.default_rng(0)))
    for k in (12, 40):
        assert route(scores(1, 32, 12), adjacency_SS, roots=1, k=k).visited_TS.all()


def test_counters_add_up_over_batches_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    adjacency_SS = torch.from_numpy(random_graph(8, 14, 1, np.random.default_rng(2)))
    scores_TS = scores(3, 101, 8)
    whole = count(route(scores_TS, adjacency_SS, roots=1, k=5), adjacency_SS)
    monkeypatch.setattr(route_module, "COUNT_CHUNK", 7 * 64)
    parts = [count(route(part, adjacency_SS, roots=1, k=5), adjacency_SS) for part in scores_TS.split(40)]
    total = parts[0] + parts[1] + parts[2]
    for name in ("used_SS", "offered_SS", "together_SS"):
        assert torch.equal(getattr(total, name), getattr(whole, name))
    assert whole.used_SS.sum() == 101 * 4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = count(route(scores_TS.repeat(9, 1), adjacency_SS, roots=1, k=5), adjacency_SS)
    assert torch.equal(under_autocast.together_SS, 9 * whole.together_SS)


def formula(scores_TS: torch.Tensor, routing, edge_logits_SS: torch.Tensor | None) -> torch.Tensor:
    """g one chosen expert at a time, with the plain softmax."""
    g_TJ = torch.zeros(routing.chosen_TJ.shape, dtype=scores_TS.dtype)
    for t, j in np.ndindex(*routing.chosen_TJ.shape):
        chosen, parent = int(routing.chosen_TJ[t, j]), int(routing.parent_TJ[t, j])
        if chosen < 0:
            continue
        ids = routing.eligible_TJS[t, j].nonzero()[:, 0]
        g = torch.softmax(scores_TS[t, ids], dim=0)[ids.tolist().index(chosen)]
        if edge_logits_SS is not None:
            g = g * torch.sigmoid(edge_logits_SS[parent, chosen])
        g_TJ[t, j] = g
    return g_TJ


@pytest.mark.parametrize("with_logits", [False, True])
def test_gate_values_and_gradients_equal_the_formula(with_logits: bool) -> None:
    # two chains out of the root and a shortcut: at k = 3 some expert always stays eligible
    adjacency_SS = torch.from_numpy(random_graph(7, 9, 1, np.random.default_rng(4)))
    scores_TS = scores(5, 6, 7).double().requires_grad_()
    logits_SS = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_SS = logits_SS.masked_fill(~torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    edge_logits = logits_SS.requires_grad_() if with_logits else None
    routing = route(scores_TS, adjacency_SS, roots=1, k=3)
    assert routing.choice_T.all()
    weights = torch.randn(6, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = [scores_TS] + ([edge_logits] if edge_logits is not None else [])
    fast, slow = gate_values(scores_TS, routing, edge_logits), formula(scores_TS, routing, edge_logits)
    torch.testing.assert_close(fast, slow)
    gradients = torch.autograd.grad((fast * weights).sum(), leaves)
    for got, expected in zip(gradients, torch.autograd.grad((slow * weights).sum(), leaves), strict=True):
        assert got.abs().sum() > 0
        torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(lambda s: gate_values(s, routing, edge_logits), (scores_TS,))


def test_weights_are_exactly_one_and_a_route_without_choice_has_no_gradient() -> None:
    # 0 -> 1 -> 2 -> 3: a token with k = 3 leaves expert 3 out, with k = 4 nothing; 1 and 2 are never a choice
    chain_SS = torch.eye(4, dtype=torch.bool).roll(1, dims=1).triu(1)
    scores_TS = (100 * scores(6, 5, 4)).requires_grad_()
    edge_logits_SS = torch.zeros(4, 4, requires_grad=True)
    for k, moves in ((3, True), (4, False)):
        g_TJ = gate_values(scores_TS, route(scores_TS, chain_SS, roots=1, k=k), edge_logits_SS)
        weights_TJ = straight_through(g_TJ)
        assert (weights_TJ == 1.0).all()
        _, by_logits = torch.autograd.grad(weights_TJ.sum(), [scores_TS, edge_logits_SS])
        assert bool(by_logits.abs().sum() > 0) == moves
    full_SS = torch.from_numpy(full_graph(4))
    weights_TJ = straight_through(gate_values(scores_TS, route(scores_TS, full_SS, roots=1, k=4)))
    assert (weights_TJ == 1.0).all()
    assert (torch.autograd.grad(weights_TJ.sum(), scores_TS)[0] == 0).all()


def test_a_token_that_stops_early_has_zero_gates_and_finite_gradients() -> None:
    # expert 2 hangs on nothing that a token can visit
    adjacency_SS = torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    scores_TS = scores(7, 4, 3).requires_grad_()
    routing = route(scores_TS, adjacency_SS, roots=1, k=3)
    assert routing.chosen_TJ.tolist() == [[1, -1]] * 4
    g_TJ = gate_values(scores_TS, routing, torch.full((3, 3), float("-inf"), requires_grad=True))
    assert (g_TJ[:, 1] == 0).all()
    assert torch.autograd.grad(g_TJ.sum(), scores_TS)[0].isfinite().all()
