"""The scores that experts are drawn by: each against its formula or every alternative there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_ds.federation.participation import Member, inclusion_probabilities, plan_round
from sam_ds.federation.scores import anchored, desirability, greedy, heard, load_shares, running_mean
from sam_ds.graph.dag import random_graph
from sam_ds.graph.route import count, route


def rates(clients, layers, experts, seed=0):
    return np.random.default_rng(seed).random((clients, layers, experts))


@pytest.mark.parametrize("roots", [1, 2, 3])
def test_feedback_is_the_visits_of_the_route(roots):
    adjacency = torch.from_numpy(random_graph(5, 4, roots, np.random.default_rng(1)))
    routing = route(torch.randn(50, 5), adjacency, roots=roots, k=roots + 1)
    counted, before = count(routing, adjacency), rates(1, 1, 5)[0, 0]
    offered, together = counted.offered_SS.numpy(), counted.together_SS.numpy()
    visited = routing.visited_TS.double().mean(0).numpy()
    np.testing.assert_allclose(heard(before, offered, together, 0.75), 0.75 * before + 0.25 * visited)
    assert (heard(before, offered, 1000 * together, 0.0) <= 1).all(), "a client cannot claim more than every token"
    nothing = np.zeros_like(offered)
    np.testing.assert_array_equal(heard(before, nothing, nothing, 0.75), before)


def test_load_shares_are_places_over_clients():
    members = [Member(i, tier, 1) for i, tier in enumerate("aab")]
    budgets = {"a": [2, 3], "b": [4, 4]}
    clients = plan_round(0, 0, members, budgets, layers=2, num_experts=4, roots=1, per_round=3).clients
    load = load_shares(clients, 4)
    for layer, expert in itertools.product(range(2), range(4)):
        assert load[layer, expert] == sum(expert in c.experts[layer] for c in clients) / 3
    assert load.sum(1).tolist() == pytest.approx([(2 + 2 + 4) / 3, (3 + 3 + 4) / 3])
    assert (load[:, 0] == 1).all()


def test_running_mean_forgets_by_its_decay():
    value = np.array([0.5, 0.0])
    for now in ([1.0, 1.0], [0.0, 1.0], [1.0, 0.0]):
        value = running_mean(value, np.array(now), 0.8)
    np.testing.assert_allclose(value, [0.8**3 * 0.5 + 0.2 * (0.8**2 + 1), 0.2 * (0.8**2 + 0.8)])


@given(st.integers(0, 99), st.integers(1, 4), st.floats(0, 3), st.floats(0, 3))
def test_desirability_is_fitness_minus_load(seed, roots, fitness_weight, load_weight):
    fitness, load = rates(3, 2, 4, seed), rates(1, 2, 4, seed + 1)[0]
    scores = desirability(fitness, load, roots=roots, fitness_weight=fitness_weight, load_weight=load_weight)
    assert (scores >= 0).all() and (scores[..., :roots] == 0).all()
    plain = fitness_weight * fitness - load_weight * load
    raised = (scores - plain)[..., roots:]
    for client, layer in itertools.product(range(3), range(2)):
        if roots < 4:
            least = plain[client, layer, roots:].min()
            np.testing.assert_allclose(raised[client, layer], max(-least, 0.0), atol=1e-12)


def test_of_two_that_fit_alike_the_one_with_less_load_is_drawn_more():
    scores = desirability(
        np.full((1, 1, 4), 0.6), np.array([[1.0, 0.1, 0.9, 0.5]]), roots=1, fitness_weight=1.0, load_weight=0.5
    )[0, 0]  # fmt: skip
    h = inclusion_probabilities(scores, budget=2, roots=1, floor=0.0)
    np.testing.assert_allclose(h, [1, 0.55 / 1.05, 0.15 / 1.05, 0.35 / 1.05])


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(0, 3))
def test_greedy_takes_the_fittest_that_fit(seed, roots, more):
    fitness = np.round(rates(2, 2, 6, seed), 1)
    budgets = [roots, roots + more]
    scores = greedy(fitness, budgets, roots)
    for client, layer in itertools.product(range(2), range(2)):
        places = budgets[client] - roots
        h = inclusion_probabilities(scores[client, layer], budget=budgets[client], roots=roots, floor=0.0)
        assert set(h.tolist()) <= {0.0, 1.0} and (h[:roots] == 1).all()
        # Of all choices the fittest; of equal ones the first.
        best = max(itertools.combinations(range(roots, 6), places),
                   key=lambda held: round(fitness[client, layer, list(held)].sum(), 6))  # fmt: skip
        assert tuple(np.flatnonzero(h)) == (*range(roots), *best)


@settings(max_examples=30)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 4))
def test_anchors_are_the_best_one_to_one_assignment(seed, clients, roots):
    given_rates = rates(clients, 2, 5, seed)
    found = anchored(given_rates, roots)
    assert not found[..., :roots].any()
    pairs = min(clients, 5 - roots)
    for layer in range(2):
        assert found[:, layer].sum(0).max() <= 1 and found[:, layer].sum(1).max() <= 1
        assert found[:, layer].sum() == pairs
        value = max(
            sum(given_rates[i, layer, e] for i, e in zip(who, what, strict=True))
            for who in itertools.combinations(range(clients), pairs)
            for what in itertools.permutations(range(roots, 5), pairs)
        )
        assert given_rates[:, layer][found[:, layer]].sum() == pytest.approx(value)


def test_an_anchor_always_holds_its_expert():
    own = rates(4, 2, 6)
    found = anchored(own, 2)
    members = [Member(i, "one", 1) for i in range(4)]
    for r in range(10):
        plan = plan_round(
            0, r, members, {"one": [3, 4]}, layers=2, num_experts=6, roots=2, per_round=3, floor=0.0,
            scores=dict(enumerate(np.where(found, np.inf, own))),
        )  # fmt: skip
        for client in plan.clients:
            assert (client.h[found[client.client]] == 1).all()
            for layer, held in enumerate(client.experts):
                assert set(np.flatnonzero(found[client.client, layer])) <= set(held)
