"""Unbiasedness is a sum over every outcome of both draws, with deltas that depend on the whole subset."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import exact_design, inclusion, reference_aggregate, reference_fedopt

from sam_ds.errors import InputError
from sam_ds.experts.lora import LoraSlices
from sam_ds.federation import participation
from sam_ds.federation.aggregation import AggregationConfig, Aggregator, ServerOptimizer
from sam_ds.federation.participation import inclusion_probabilities, sample_experts, stratified_sample

EXAMPLES = np.array([10.0, 1.0, 4.0, 25.0])
EXPERTS, PER_ROUND = 4, 2
BUDGETS = [2, 3, 2, 3]
SCORES = [[0, 5, 3, 2], [0, 9, 7, 4], [0, 2, 2, 6], [0, 6, 6, 8]]  # h is a multiple of 1/10


def delta(client, expert, subset):
    """What a client answers for an expert depends on everything it held."""
    return np.random.default_rng([client, expert, *subset]).normal(size=3) + client


@pytest.fixture(scope="module")
def designs():
    """For each client, {subset: probability} of the sampler in use, and its inclusion probabilities."""
    found = []
    for scores, budget in zip(SCORES, BUDGETS, strict=True):
        h = inclusion_probabilities(np.array(scores, dtype=float), budget=budget, roots=1, floor=0.2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(participation, "_GRAIN", 10)
            design = exact_design(lambda rng, h=h: sample_experts(h, rng))
        assert all(abs(float(p) - h[e]) < 1e-14 for e, p in inclusion(design).items())
        found.append(({s: float(p) for s, p in design.items()}, h))
    return found


def independent_design(h):
    """Every expert on its own: a design whose size varies, the empty subset included."""
    either = itertools.product([False, True], repeat=len(h))
    return {tuple(np.flatnonzero(held)): np.where(held, h, 1 - h).prod() for held in either}


def subsets_without_replacement():
    rows = list(itertools.combinations(range(len(EXAMPLES)), PER_ROUND))
    return {row: 1 / len(rows) for row in rows}


def poisson_subsets():
    return independent_design(np.full(len(EXAMPLES), PER_ROUND / len(EXAMPLES)))


def outcomes(clients, designs, rule, clip=10.0, delta=delta):
    """(probability, aggregated updates by expert) of every outcome of both draws."""
    pi = PER_ROUND / len(EXAMPLES)
    for drawn, p_drawn in clients.items():
        for held in itertools.product(*(designs[i][0].items() for i in drawn)):
            fold = Aggregator[int](AggregationConfig(rule=rule, clip=clip), total_weight=EXAMPLES.sum())
            for i, (subset, _) in zip(drawn, held, strict=True):
                h = designs[i][1]
                fold.add(
                    {e: delta(i, e, subset) for e in subset},
                    weight=EXAMPLES[i],
                    probability=lambda e, h=h: pi * h[e],
                )
            yield p_drawn * math.prod(p_subset for _, p_subset in held), fold.result().deltas


def expected_aggregate(clients, designs, rule, clip=10.0):
    """Of each expert: the expected update, absent counting as zero, and the probability that there is one."""
    mean, there = np.zeros((EXPERTS, 3)), np.zeros(EXPERTS)
    for p, deltas in outcomes(clients, designs, rule, clip):
        for e, update in deltas.items():
            mean[e] += p * update
            there[e] += p
    return mean, there


def target(designs):
    """sum_i w_i E[delta_{i,e}(S) | e in S]."""
    want = np.zeros((EXPERTS, 3))
    for i, (design, _) in enumerate(designs):
        for e in range(EXPERTS):
            p_held = sum(p for subset, p in design.items() if e in subset)
            given_held = sum(p * delta(i, e, subset) for subset, p in design.items() if e in subset) / p_held
            want[e] += EXAMPLES[i] / EXAMPLES.sum() * given_held
    return want


def stratified_subsets():
    """Of the sampler in use."""
    design = exact_design(lambda rng: stratified_sample(["a", "b", "b", "b"], PER_ROUND, rng))
    return {drawn: float(p) for drawn, p in design.items()}


@pytest.mark.parametrize("clients", [subsets_without_replacement, poisson_subsets, stratified_subsets])
def test_unbiased_ht(clients, designs):
    mean, there = expected_aggregate(clients(), designs, "ht")
    np.testing.assert_allclose(mean, target(designs), rtol=1e-12, atol=1e-12)
    assert (there[1:] < 0.999).all(), "rounds in which nobody sends an expert are part of the sum"


def low_rank(rows_by_expert, both=0.0):
    """The updates of all three matrices that expert-owned rows (2 neurons, rank 2, of up, gate and down) stand for."""
    slices = LoraSlices(hidden=5, neurons=2 * EXPERTS, gated=True, rank=2, alpha=4.0, seed=0)
    with torch.no_grad():
        for e, rows in rows_by_expert.items():
            for name, value in zip(("up_rows", "gate_rows", "down_rows"), rows.reshape(3, 2, 2), strict=True):
                getattr(slices, name)[2 * e : 2 * e + 2] = torch.from_numpy(value).float()
                getattr(slices, name.replace("rows", "out" if "down" in name else "in")).add_(both * float(value.sum()))
    return {name: value.double().numpy() for name, value in slices.deltas().items()}


def rows_of(client, expert, subset):
    return np.random.default_rng([client, expert, *subset]).normal(size=12) + client


@pytest.mark.parametrize(("both", "unbiased"), [(0.0, True), (0.1, False)])
def test_unbiased_ht_of_low_rank_updates(designs, both, unbiased):
    """What is averaged is one factor, what must be right is the product: it is where the other factor is everybody's,
    and not where it trains too."""
    got = {name: 0.0 for name in ("up", "gate", "down")}
    for p, deltas in outcomes(subsets_without_replacement(), designs, "ht", delta=rows_of):
        for name, value in low_rank(deltas, both).items():
            got[name] += p * value
    want = {name: 0.0 for name in got}
    for i, (design, h) in enumerate(designs):
        for subset, p in design.items():
            for e in subset:
                # One expert's part at a time, by how often the client holds it.
                for name, value in low_rank({e: rows_of(i, e, subset)}, both).items():
                    want[name] += EXAMPLES[i] / EXAMPLES.sum() * p / h[e] * value
    for name in got:
        assert np.allclose(got[name], want[name], rtol=1e-4, atol=1e-4) == unbiased, name


def test_unbiased_ht_with_independent_subsets():
    rng = np.random.default_rng(2)
    designs = [(independent_design(h), h) for h in rng.uniform(0.1, 1, (len(EXAMPLES), EXPERTS))]
    mean, _ = expected_aggregate(subsets_without_replacement(), designs, "ht")
    np.testing.assert_allclose(mean, target(designs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ["none", "hajek", "clipped"])
def test_unbiased_holds_for_no_other_rule(rule, designs):
    """Not even when a missing update is left out of the mean instead of counting as zero."""
    mean, there = expected_aggregate(subsets_without_replacement(), designs, rule, clip=2.5)
    want = target(designs)
    assert np.abs(mean - want).max() > 0.1
    assert np.abs(mean / there[:, None] - want).max() > 0.1


def test_unbiased_clipped_where_the_cap_does_not_bind(designs):
    mean, _ = expected_aggregate(subsets_without_replacement(), designs, "clipped", clip=1e6)
    np.testing.assert_allclose(mean, target(designs), rtol=1e-12, atol=1e-12)


def test_unbiased_hajek_and_none_when_everybody_answers_everything():
    """With p = 1 all rules are the weighted mean."""
    everything = tuple(range(EXPERTS))
    replies = [
        ({e: delta(i, e, everything) for e in everything}, EXAMPLES[i], dict.fromkeys(everything, 1.0))
        for i in range(len(EXAMPLES))
    ]
    want = sum(w / EXAMPLES.sum() * np.stack(list(d.values())) for d, w, _ in replies)
    for rule in ("ht", "hajek", "clipped", "none"):
        got = fold(replies, rule, EXAMPLES.sum()).deltas
        np.testing.assert_allclose(np.stack([got[e] for e in everything]), want, rtol=1e-12)


def fold(replies, rule, total, clip=10.0):
    aggregator = Aggregator(AggregationConfig(rule=rule, clip=clip), total_weight=total)
    for deltas, weight, p in replies:
        aggregator.add(deltas, weight=weight, probability=p.__getitem__)
    return aggregator.result()


@st.composite
def reply_lists(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    replies = []
    for _ in range(draw(st.integers(1, 6))):
        units = draw(st.sets(st.sampled_from("abcd")))
        deltas = {u: rng.normal(size=(2, ord(u) - 96)) for u in units}
        replies.append((deltas, float(rng.integers(1, 100)), {u: rng.uniform(0.02, 1) for u in units}))
    return replies


@settings(max_examples=60, deadline=None)
@given(reply_lists(), st.sampled_from(["ht", "hajek", "clipped", "none"]), st.randoms(use_true_random=False))
def test_fold_is_the_formula_in_any_order(replies, rule, random):
    total = 500.0
    want = reference_aggregate(replies, total, rule, clip=4.0)
    for _ in range(2):
        got = fold(replies, rule, total, clip=4.0).deltas
        assert got.keys() == want.keys()
        for unit, update in want.items():
            np.testing.assert_allclose(got[unit], update, rtol=1e-10, atol=1e-12)
        random.shuffle(replies)


def test_diagnostics_by_hand():
    one = np.ones(2, dtype=np.float32)
    replies = [
        ({"a": one, "b": one}, 1.0, {"a": 0.5, "b": 0.1}),
        ({"a": one}, 3.0, {"a": 0.5}),
    ]
    ht = fold(replies, "ht", 8.0)
    assert ht.deltas["a"].tolist() == [1, 1] and ht.deltas["b"].tolist() == [1.25, 1.25]
    assert ht.deltas["a"].dtype == np.float32
    assert ht.received == {"a": 2, "b": 1}
    assert ht.largest_weight == 10
    # a: weights 1/4 and 3/4, (1)^2 / (1/16 + 9/16) = 1.6; b: one reply.
    assert ht.effective_sample_size == pytest.approx(1.0)
    assert ht.mean_effective_sample_size == pytest.approx(1.3)
    assert fold(replies, "clipped", 8.0, clip=4).largest_weight == 4
    assert fold(replies, "none", 8.0).largest_weight == 1
    empty = fold([], "hajek", 8.0)
    assert (empty.deltas, empty.effective_sample_size, empty.largest_weight) == ({}, 0.0, 0.0)


def test_a_held_expert_that_saw_no_token_counts_as_zero_and_an_absent_one_is_absent():
    replies = [({"a": np.zeros(1)}, 1.0, {"a": 1.0}), ({"a": np.full(1, 4.0)}, 1.0, {"a": 1.0})]
    got = fold(replies, "hajek", 2.0)
    assert got.deltas["a"].tolist() == [2.0] and "b" not in got.deltas


def test_scalar_and_half_precision_deltas():
    got = fold([({"a": np.float16(2) * np.ones((), np.float16)}, 1.0, {"a": 0.5})], "ht", 1.0).deltas["a"]
    assert isinstance(got, np.ndarray) and got.shape == () and got.dtype == np.float32 and got == 4


def test_memory_does_not_grow_with_the_replies():
    aggregator = Aggregator(AggregationConfig(), total_weight=1000)
    sent = np.ones(1000, dtype=np.float32)
    for _ in range(50):
        aggregator.add({"a": sent}, weight=1, probability=lambda _: 1.0)
    sums = list(aggregator._sums.values())
    assert sum(s.weighted.nbytes for s in sums) == sent.nbytes
    assert aggregator.result().received == {"a": 50}
    assert (sent == 1).all()


@pytest.mark.parametrize("p", [0.0, -0.5, 1.0001, math.nan])
def test_a_probability_outside_its_range_folds_nothing(p):
    aggregator = Aggregator(AggregationConfig(), total_weight=2)
    with pytest.raises(InputError, match="probability of b is"):
        aggregator.add(
            {"a": np.ones(1), "b": np.ones(1)}, weight=1, probability=lambda u: {"a": 1.0, "b": p}[u]
        )
    assert aggregator.result().deltas == {}


def test_bad_values_are_refused():
    for wrong in (
        {"rule": "hajeck"},
        {"clip": 0.5},
        {"server_optimizer": "lamb"},
        {"server_lr": 0.0},
        {"beta_2": 1.0},
        {"tau": 0.0},
        {"server_momentum": -0.1},
        {"contribution": 0.0},
        {"contribution": 1.0, "rule": "hajek"},
        {"contribution": 1.0, "robust": "norm_clip"},
    ):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AggregationConfig(**wrong)
    with pytest.raises(InputError, match="total_weight"):
        Aggregator(AggregationConfig(), total_weight=0)
    aggregator = Aggregator(AggregationConfig(), total_weight=1)
    with pytest.raises(InputError, match="weight is 0"):
        aggregator.add({}, weight=0, probability=lambda _: 1.0)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi"])
def test_server_optimizer_is_fedopt(optimizer):
    config = AggregationConfig(server_optimizer=optimizer, server_lr=0.1, tau=0.01)
    server = ServerOptimizer(config)
    rng = np.random.default_rng(0)
    deltas = rng.normal(size=(6, 3))
    start = rng.normal(size=3)
    state, moments = {"a": start, "b": np.ones(2)}, {}
    for d in deltas:
        state, moments = server.step(state, {"a": d}, moments)
    want = [
        reference_fedopt(start[k], deltas[:, k], optimizer, 0.1, 0.9, 0.9, 0.99, 0.01) for k in range(3)
    ]
    np.testing.assert_allclose(state["a"], want, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "yogi"])
def test_server_step_is_pure_and_leaves_absent_units_alone(optimizer):
    server = ServerOptimizer(AggregationConfig(server_optimizer=optimizer))
    state = {"a": np.ones(2, np.float32), "b": np.ones((), np.float32)}
    both = {"a": np.ones(2, np.float32), "b": np.ones((), np.float32)}
    state, moments = server.step(state, both, {})
    before = {u: x.copy() for u, x in state.items()}
    kept = {u: [m.copy() for m in ms] for u, ms in moments.items()}
    after, new_moments = server.step(state, {"a": both["a"]}, moments)
    assert after["b"] is state["b"] and new_moments.get("b") is moments.get("b")
    assert (after["a"] != state["a"]).all() and after["a"].dtype == np.float32
    assert isinstance(state["b"], np.ndarray) and state["b"].shape == ()
    for u, x in before.items():
        np.testing.assert_array_equal(state[u], x)
        for m, old in zip(moments.get(u, ()), kept.get(u, ()), strict=True):
            np.testing.assert_array_equal(m, old)
    assert (moments == {}) == (optimizer == "sgd")
