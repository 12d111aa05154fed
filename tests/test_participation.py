from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_design, inclusion, reference_inclusion

from sam_ds.errors import InputError
from sam_ds.federation.participation import (
    Member,
    inclusion_probabilities,
    plan_round,
    sample_clients,
    systematic_sample,
)

GRAIN = 1 << 50


@st.composite
def bounded_problems(draw):
    """scores, budget, roots, floor that have a solution."""
    experts = draw(st.integers(1, 40))
    roots = draw(st.integers(0, experts))
    budget = draw(st.integers(roots, experts))
    rest = experts - roots
    floor = draw(st.floats(0, 1)) * ((budget - roots) / rest if rest else 1)
    score = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 1.7e308))
    scores = np.array(draw(st.lists(score, min_size=experts, max_size=experts)))
    return scores, budget, roots, floor


@given(bounded_problems())
def test_inclusion_keeps_its_bounds_and_its_sum(problem):
    scores, budget, roots, floor = problem
    h = inclusion_probabilities(scores, budget=budget, roots=roots, floor=floor)
    assert (h[:roots] == 1).all()
    assert (h <= 1).all() and (h[roots:] >= floor - 1e-12).all()
    assert math.fsum(h) == pytest.approx(budget, abs=1e-15 * max(budget, 1))
    by_score = np.argsort(scores[roots:], kind="stable")
    assert (np.diff(h[roots:][by_score]) >= -1e-12).all(), "a higher score never has a lower h"


@settings(max_examples=50)
@given(st.lists(st.floats(0.01, 1), min_size=4, max_size=20), st.integers(0, 2), st.floats(0, 1))
def test_inclusion_is_the_water_filling(scores, roots, share):
    scores = np.array(scores)
    for budget in range(roots + 1, len(scores)):
        floor = share * (budget - roots) / (len(scores) - roots)
        h = inclusion_probabilities(scores, budget=budget, roots=roots, floor=floor)
        np.testing.assert_allclose(h, reference_inclusion(scores, budget, roots, floor), atol=1e-9)


def test_inclusion_by_hand():
    def h(scores, **bounds):
        return inclusion_probabilities(np.array(scores, dtype=float), **bounds).tolist()

    assert h([9, 1, 2, 3], budget=2, roots=1, floor=0.0) == pytest.approx([1, 1 / 6, 1 / 3, 1 / 2])
    assert h([0, 0, 0, 0], budget=2, roots=1, floor=0.1) == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert h([7, 7, 7, 7], budget=3, roots=0, floor=0.1) == pytest.approx([3 / 4] * 4)
    assert h([1, 2, 3], budget=3, roots=1, floor=0.2) == [1, 1, 1]
    # 10 would get more than 1; the floor lifts the zero; 1 and 2 share what is left.
    assert h([0, 1, 2, 10], budget=2, roots=0, floor=0.1) == pytest.approx([0.1, 0.3, 0.6, 1])
    # One positive score cannot hold three places: the others share two.
    assert h([5, 0, 0, 0], budget=3, roots=0, floor=0.1) == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])
    assert h([3, 2, 1], budget=1, roots=1, floor=0.0) == [1, 0, 0]


@pytest.mark.parametrize(
    ("scores", "bounds", "message"),
    [
        ([1, 1, 1], {"budget": 1, "roots": 2, "floor": 0.0}, "budget is 1"),
        ([1, 1, 1], {"budget": 4, "roots": 1, "floor": 0.0}, "budget is 4"),
        ([1, 1, 1], {"budget": 2, "roots": 1, "floor": 0.6}, "floor is 0.6"),
        ([1, 1, 1], {"budget": 2, "roots": 1, "floor": -0.1}, "floor is -0.1"),
        ([1, -1, 1], {"budget": 2, "roots": 1, "floor": 0.1}, "scores are"),
        ([1, math.nan, 1], {"budget": 2, "roots": 1, "floor": 0.1}, "scores are"),
    ],
)
def test_inclusion_refuses_what_has_no_solution(scores, bounds, message):
    with pytest.raises(InputError, match=message):
        inclusion_probabilities(np.array(scores, dtype=float), **bounds)


@pytest.mark.parametrize(
    ("scores", "budget", "roots"),
    [([1, 1, 1, 1], 2, 1), ([0, 1, 2, 4], 2, 0), ([0, 1, 2, 3, 9], 3, 1), ([5, 4, 3, 2, 1], 4, 1)],
)
def test_systematic_inclusion_is_exactly_h(scores, budget, roots):
    h = inclusion_probabilities(np.array(scores, dtype=float), budget=budget, roots=roots, floor=0.1)
    design = exact_design(systematic_sample, h, GRAIN)
    assert {len(subset) for subset in design} == {budget}
    for expert, p in inclusion(design).items():
        assert abs(p - Fraction(float(h[expert]))) <= Fraction(len(h), GRAIN)


def test_every_pair_can_meet_with_equal_h():
    design = exact_design(systematic_sample, np.array([1.0, 0.5, 0.5, 0.5, 0.5]), GRAIN)
    met = {pair for subset in design for pair in itertools.combinations(subset, 2)}
    assert met == set(itertools.combinations(range(5), 2))


def test_a_pair_of_unequal_h_need_not_meet():
    """What the module docstring says of systematic sampling; the aggregation never needs the p of a pair."""
    design = exact_design(systematic_sample, np.array([0.1, 0.1, 0.6, 0.6, 0.6]), GRAIN)
    assert not any({0, 1} <= set(subset) and p > Fraction(1, 10**9) for subset, p in design.items())


def test_systematic_frequencies_and_pairs_of_a_larger_case():
    rng = np.random.default_rng(0)
    h = inclusion_probabilities(rng.random(16) ** 2, budget=5, roots=1, floor=0.05)
    draws, counts, together = 40_000, np.zeros(16), np.zeros((16, 16), dtype=bool)
    for _ in range(draws):
        held = systematic_sample(h, rng)
        counts[held] += 1
        together[np.ix_(held, held)] = True
    assert counts.sum() == 5 * draws
    error = np.abs(counts / draws - h)
    assert (error <= 4.5 * np.sqrt(h * (1 - h) / draws)).all()
    assert together.all()


@given(bounded_problems(), st.integers(0, 2**32 - 1))
def test_systematic_size_is_exact_and_certain_experts_are_held(problem, seed):
    scores, budget, roots, floor = problem
    h = inclusion_probabilities(scores, budget=budget, roots=roots, floor=floor)
    held = systematic_sample(h, np.random.default_rng(seed))
    assert len(held) == budget and (np.diff(held) > 0).all()
    assert set(np.flatnonzero(h == 1)) <= set(held.tolist())
    assert (h[held] > 0).all()


def test_systematic_refuses_h_without_an_integer_sum():
    with pytest.raises(InputError, match="integer sum"):
        systematic_sample(np.array([0.5, 0.7]), np.random.default_rng(0))


def test_clients_without_replacement_and_poisson():
    rounds = 4_000
    for scheme in ("without_replacement", "poisson"):
        counts, sizes = np.zeros(10), []
        for r in range(rounds):
            ids, pi = sample_clients(3, r, clients=10, per_round=3, scheme=scheme)
            assert (np.diff(ids) > 0).all() and (pi == 0.3).all()
            counts[ids] += 1
            sizes.append(len(ids))
        assert (np.abs(counts / rounds - 0.3) < 4.5 * math.sqrt(0.21 / rounds)).all()
        assert (set(sizes) == {3}) == (scheme == "without_replacement")
    for wrong in ({"per_round": 0}, {"per_round": 11}, {"scheme": "possion"}, {"seed": -1}):
        arguments = {"seed": 0, "round": 1, "clients": 10, "per_round": 3, "scheme": "poisson"} | wrong
        with pytest.raises(InputError):
            sample_clients(**arguments)


POPULATION = [Member(30, "small", 5), Member(10, "large", 50), Member(20, "small", 7), Member(5, "large", 1)]
BUDGETS = {"small": (2, 3), "large": (4, 4)}


def make_plan(r, population=POPULATION, scores=None, **changes):
    arguments = {"layers": 2, "num_experts": 6, "roots": 1, "per_round": 3} | changes
    return plan_round(7, r, population, BUDGETS, scores_NLE=scores, **arguments)


def as_value(plan):
    return [(c.client, c.tier, c.experts, c.h.tolist(), c.pi) for c in plan.clients]


def test_plan_is_pure_and_does_not_depend_on_the_order_of_the_population():
    scores = np.random.default_rng(1).random((4, 2, 6))
    alone = as_value(make_plan(9, scores=scores))
    for r in range(9):
        make_plan(r, scores=scores)
    assert as_value(make_plan(9, scores=scores)) == alone
    assert as_value(make_plan(9, population=POPULATION[::-1], scores=scores[::-1])) == alone
    assert as_value(make_plan(8, scores=scores)) != alone


def test_plan_holds_budgets_roots_and_probabilities():
    seen = set()
    for r in range(50):
        plan = make_plan(r)
        ids = [c.client for c in plan.clients]
        assert ids == sorted(ids) and len(ids) == 3 and (plan.seed, plan.round) == (7, r)
        for c in plan.clients:
            assert tuple(map(len, c.experts)) == BUDGETS[c.tier]
            assert all(0 in held and list(held) == sorted(held) for held in c.experts)
            assert c.probability(0, 0) == c.pi == 0.75
            assert c.probability(1, 3) == 0.75 * c.h[1, 3]
            assert c.h.sum(axis=1) == pytest.approx(BUDGETS[c.tier])
            assert not c.h.flags.writeable
            seen.add((c.client, c.experts))
    assert len(seen) > 100, "subsets differ between clients and rounds"


def test_every_draw_has_its_own_generator(monkeypatch):
    """numpy pads seeds with zeros: [s, r] and [s, r, 0, 0] would tie who is drawn to what client 0 holds."""
    states, make = [], np.random.default_rng

    def recording(entropy):
        states.append(tuple(np.random.SeedSequence(entropy).generate_state(4)))
        return make(entropy)

    monkeypatch.setattr(np.random, "default_rng", recording)
    members = [Member(i, "one", 1) for i in range(3)]
    for seed, r in itertools.product(range(3), range(5)):
        plan_round(seed, r, members, {"one": (1, 1)}, layers=2, num_experts=4, roots=1, per_round=3, floor=0)
    assert len(states) == 15 * (1 + 3 * 2) == len(set(states))


def test_plan_follows_scores_of_the_right_client():
    scores = np.zeros((4, 2, 6))
    scores[2, :, 5] = 1.0
    plan = make_plan(1, scores=scores, per_round=4, floor=0.0)
    h = {c.client: c.h for c in plan.clients}
    assert h[20][0, 5] == 1 and h[30][0, 5] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"population": [*POPULATION, Member(10, "small", 1)]},
        {"population": [*POPULATION, Member(11, "smal", 1)]},
        {"layers": 3},
        {"scores": np.zeros((4, 2, 5))},
        {"floor": 0.9},
    ],
)
def test_plan_refuses_bad_input(wrong):
    with pytest.raises(InputError):
        make_plan(0, **wrong)


def test_member_needs_examples():
    with pytest.raises(InputError, match="0 examples"):
        Member(1, "small", 0)


def test_sending_fewer_than_held_has_the_probability_it_says():
    """Over many rounds an expert is sent as often as `probability` claims, whatever was held; sizes are exact."""
    members = [Member(i, "one", 1) for i in range(2)]
    sent_count, claimed = np.zeros((2, 6)), np.zeros((2, 6))
    rounds = 4000
    for r in range(rounds):
        plan = plan_round(
            0, r, members, {"one": (4,)}, layers=1, num_experts=6, roots=1, per_round=1, floor=0.2, sends={"one": 3}
        )
        for client in plan.clients:
            assert len(client.sent[0]) == 3 and set(client.sent[0]) <= set(client.experts[0])
            sent_count[client.client, list(client.sent[0])] += 1
            claimed[client.client] = [client.probability(0, e) for e in range(6)]
    np.testing.assert_allclose(sent_count / rounds, claimed, atol=4 * (0.25 / rounds) ** 0.5)
    assert claimed[0, 0] == 0.5 * 3 / 4  # a root is always held, and sent by its share
