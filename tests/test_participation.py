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
from sam_ds.federation import participation
from sam_ds.federation.participation import (
    SCHEMES,
    Member,
    inclusion_probabilities,
    plan_round,
    sample_clients,
    sample_experts,
    stratified_sample,
)


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


def test_an_infinite_score_is_certain():
    def h(scores, **bounds):
        return inclusion_probabilities(np.array(scores, dtype=float), **bounds).tolist()

    assert h([0, 1, math.inf, 3], budget=3, roots=1, floor=0.1) == pytest.approx([1, 1 / 4, 1, 3 / 4])
    assert h([0, 9, math.inf, math.inf], budget=3, roots=1, floor=0.0) == [1, 0, 1, 1]
    assert h([math.inf] * 49 + [0], budget=49, roots=1, floor=0.0) == [1.0] * 49 + [0.0]
    with pytest.raises(InputError, match=r"budget is 2: must be in 3\.\.4"):
        h([0, 9, math.inf, math.inf], budget=2, roots=1, floor=0.0)
    with pytest.raises(InputError, match="floor is 0.4: .* 2 experts share 0 places"):
        h([0, 9, 9, math.inf], budget=2, roots=1, floor=0.4)


def design_of(tenths, monkeypatch, grain=10):
    """{subset: exact probability} for h in parts of `grain`, over every permutation and every start."""
    monkeypatch.setattr(participation, "_GRAIN", grain)
    return exact_design(lambda rng: sample_experts(np.array(tenths) / grain, rng))


SMALL = [
    [10, 5, 5, 5, 5], [10, 2, 3, 5], [1, 1, 6, 6, 6], [0, 4, 8, 8], [10, 9, 6, 5, 10], [10, 10, 0, 0], [3, 7, 0, 10],
    [4, 4, 4, 4, 4], [2, 2, 9, 9, 8],
]  # fmt: skip


@pytest.mark.parametrize("tenths", SMALL, ids=str)
def test_inclusion_is_exactly_h(tenths, monkeypatch):
    design = design_of(tenths, monkeypatch)
    assert {len(subset) for subset in design} == {sum(tenths) // 10}
    held = inclusion(design)
    assert [held.get(e, 0) for e in range(len(tenths))] == [Fraction(t, 10) for t in tenths]


@settings(max_examples=60)
@given(st.data())
def test_inclusion_is_exactly_h_for_any_h(data):
    grain = data.draw(st.integers(2, 12))
    grains = data.draw(st.lists(st.integers(0, grain), min_size=1, max_size=4))
    grains.append(-sum(grains) % grain)
    with pytest.MonkeyPatch.context() as patch:
        design = design_of(grains, patch, grain)
    assert {len(subset) for subset in design} == {sum(grains) // grain}
    held = inclusion(design)
    assert [held.get(e, 0) for e in range(len(grains))] == [Fraction(g, grain) for g in grains]


@pytest.mark.parametrize("percent", [[10, 10, 60, 60, 60], [100, 50, 50, 50, 50], [5, 90, 55, 50], [0, 40, 80, 80],
                                     [100, 20, 95, 85, 0, 100]], ids=str)  # fmt: skip
def test_every_pair_can_meet(percent, monkeypatch):
    """A simple random sample is drawn with the largest probability that leaves the rest an inclusion in [0, 1]."""
    design = design_of(percent, monkeypatch, 100)
    free = [e for e, p in enumerate(percent) if 0 < p < 100]
    places = Fraction(sum(percent[e] for e in free), 100)
    share = places / len(free)
    h = [Fraction(percent[e], 100) for e in free]
    simple = min(min(h) / share, (1 - max(h)) / (1 - share))
    least = simple * share * (places - 1) / (len(free) - 1)
    assert least > 0
    for pair in itertools.combinations(free, 2):
        assert sum(p for subset, p in design.items() if set(pair) <= set(subset)) >= least
    if percent == [10, 10, 60, 60, 60]:
        # What systematic sampling would keep apart meets in the simple random sample alone.
        assert sum(p for subset, p in design.items() if {0, 1} <= set(subset)) == least == Fraction(1, 40)


def test_frequencies_and_pairs_of_a_larger_case():
    rng = np.random.default_rng(0)
    h = inclusion_probabilities(rng.random(16) ** 2, budget=5, roots=1, floor=0.05)
    draws = 100_000
    held = np.zeros((draws, 16), dtype=bool)
    for row in held:
        row[sample_experts(h, rng)] = True
    assert (held.sum(1) == 5).all()
    error = np.abs(held.mean(0) - h)
    assert (error <= 4.5 * np.sqrt(h * (1 - h) / draws)).all()
    assert (held.T.astype(np.float32) @ held.astype(np.float32) > 0).all()


@given(bounded_problems(), st.integers(0, 2**32 - 1))
def test_the_size_is_exact_and_certain_experts_are_held(problem, seed):
    scores, budget, roots, floor = problem
    h = inclusion_probabilities(scores, budget=budget, roots=roots, floor=floor)
    held = sample_experts(h, np.random.default_rng(seed))
    assert len(held) == budget and (np.diff(held) > 0).all()
    assert set(np.flatnonzero(h == 1)) <= set(held.tolist())
    assert (h[held] > 0).all()


@pytest.mark.parametrize("h", [[0.5, 0.7], [1.5, 0.5], [-0.5, 0.5], [math.nan, 1.0]], ids=str)
def test_what_is_no_inclusion_probability_is_refused(h):
    with pytest.raises(InputError, match=r"h is .*: must be in \[0, 1\] with an integer sum"):
        sample_experts(np.array(h), np.random.default_rng(0))


@settings(max_examples=25)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.data())
def test_a_stratified_draw_keeps_the_shares_of_the_tiers(tiers, data):
    """Over everything that can be drawn: K clients, of each tier its share rounded, and pi = K / N exactly."""
    clients, per_round = len(tiers), data.draw(st.integers(1, len(tiers)))
    design = exact_design(lambda rng: stratified_sample(tiers, per_round, rng))
    for subset in design:
        assert len(subset) == per_round and list(subset) == sorted(subset)
        for tier in set(tiers):
            share = Fraction(tiers.count(tier) * per_round, clients)
            assert math.floor(share) <= sum(tiers[c] == tier for c in subset) <= math.ceil(share)
    assert inclusion(design) == dict.fromkeys(range(clients), Fraction(per_round, clients))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_clients_are_drawn_with_the_probability_they_are_told(scheme):
    rounds, tiers = 4_000, [*"aabbbbbbbb"]
    counts, sizes, tier_a = np.zeros(10), [], set()
    for r in range(rounds):
        ids, pi = sample_clients(3, r, tiers=tiers, per_round=3, scheme=scheme)
        assert (np.diff(ids) > 0).all() and (pi == 0.3).all()
        counts[ids] += 1
        sizes.append(len(ids))
        tier_a.add(int((ids < 2).sum()))
    assert (np.abs(counts / rounds - 0.3) < 4.5 * math.sqrt(0.21 / rounds)).all()
    assert (set(sizes) == {3}) == (scheme != "poisson")
    assert tier_a == ({0, 1} if scheme == "stratified" else {0, 1, 2})


@pytest.mark.parametrize(("wrong", "message"), [
    ({"per_round": 0}, r"per_round is 0: must be in 1\.\.10"),
    ({"per_round": 11}, r"per_round is 11: must be in 1\.\.10"),
    ({"scheme": "possion"}, "scheme is 'possion': use one of .*; did you mean 'poisson'"),
    ({"scheme": "stratify"}, "scheme is 'stratify': .*; did you mean 'stratified'"),
    ({"seed": -1}, "seed -1, round 1: must not be negative"), ({"round": -1}, "seed 0, round -1: must not be negative"),
])  # fmt: skip
def test_bad_draws_of_clients_are_named(wrong, message):
    with pytest.raises(InputError, match=message):
        sample_clients(**{"seed": 0, "round": 1, "tiers": ["one"] * 10, "per_round": 3, "scheme": "poisson"} | wrong)


POPULATION = [Member(30, "small", 5), Member(10, "large", 50), Member(20, "small", 7), Member(5, "large", 1)]
BUDGETS = {"small": (2, 3), "large": (4, 4)}


def make_plan(r, population=POPULATION, scores=None, **changes):
    arguments = {"layers": 2, "num_experts": 6, "roots": 1, "per_round": 3} | changes
    return plan_round(7, r, population, BUDGETS, scores=scores, **arguments)


def as_value(plan):
    return [(c.client, c.tier, c.experts, c.h.tolist(), c.pi) for c in plan.clients]


def test_plan_is_pure_and_does_not_depend_on_the_order_of_the_population():
    scores = {m.client: np.random.default_rng(m.client).random((2, 6)) for m in POPULATION}
    alone = as_value(make_plan(9, scores=scores))
    for r in range(9):
        make_plan(r, scores=scores)
    assert as_value(make_plan(9, scores=scores)) == alone
    assert as_value(make_plan(9, population=POPULATION[::-1], scores=scores)) == alone
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


def test_plan_asks_for_the_scores_of_who_is_drawn_alone():
    drawn, _ = sample_clients(7, 9, tiers=[m.tier for m in sorted(POPULATION, key=lambda m: m.client)], per_round=2,
                              scheme="without_replacement")  # fmt: skip
    ids = [sorted(m.client for m in POPULATION)[position] for position in drawn]
    scores = {client: np.random.default_rng(client).random((2, 6)) for client in ids}
    assert [c.client for c in make_plan(9, per_round=2, scores=scores).clients] == ids


def test_plan_follows_scores_of_the_right_client():
    scores = {m.client: np.zeros((2, 6)) for m in POPULATION}
    scores[20][:, 5] = 1.0
    plan = make_plan(1, scores=scores, per_round=4, floor=0.0)
    h = {c.client: c.h for c in plan.clients}
    assert h[20][0, 5] == 1 and h[30][0, 5] == pytest.approx(0.2)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"population": [*POPULATION, Member(10, "small", 1)]}, "population holds a client id twice"),
    ({"population": [*POPULATION, Member(11, "smal", 1)]}, "tier 'smal' has no budget; did you mean 'small'"),
    ({"layers": 3}, r"budgets\['large'\] has 2 layers: the model has 3"),
    ({"scores": {m.client: np.zeros((2, 5)) for m in POPULATION}},
     r"scores of client 5 are \(2, 5\): \(layers, experts\) is \(2, 6\)"),
    ({"floor": 0.9}, "floor is 0.9: must be in 0..1, and 5 experts share [13] places"),
    ({"num_experts": 3}, r"budget is 4: must be in 1\.\.3"),
    ({"roots": 3}, r"budget is 2: must be in 3\.\.6"),
    ({"per_round": 5}, r"per_round is 5: must be in 1\.\.4"),
    ({"scheme": "any"}, "scheme is 'any'"),
    ({"sends": {"small": 0}}, r"sends\['small'\] is 0: must be at least 1"),
])  # fmt: skip
def test_plan_refuses_bad_input(wrong, message):
    with pytest.raises(InputError, match=message):
        make_plan(0, **{"per_round": 4} | wrong)


@given(bounded_problems(), st.sampled_from(SCHEMES), st.integers(1, 3))
def test_every_p_of_what_is_held_is_a_probability(problem, scheme, sends):
    scores, budget, roots, floor = problem
    members = [Member(i, "one", 1) for i in range(3)]
    plan = plan_round(
        0, 0, members, {"one": [budget]}, layers=1, num_experts=len(scores), roots=roots, per_round=2, scheme=scheme,
        floor=floor, scores={i: scores[None] for i in range(3)}, sends={"one": sends},
    )  # fmt: skip
    for client in plan.clients:
        assert all(0 < client.probability(0, e) <= 1 for e in client.experts[0])


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
