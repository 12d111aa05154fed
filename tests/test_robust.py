"""Robust rules: the formula, in any order; what one hostile client can do; what is in memory."""

from __future__ import annotations

import statistics
import tracemalloc
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_aggregate, reference_clipped, reference_trimmed_mean

from sam_ds.errors import InputError
from sam_ds.federation.aggregation import AggregationConfig, Aggregator, weight_warnings
from sam_ds.federation.robust import RobustAggregator, new_aggregator

TOTAL = 500.0


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    """`fold(replies, **config)` -> Aggregated."""
    home, number = tmp_path_factory.mktemp("replies"), count()

    def run(replies, **config):
        folder = home / str(next(number))
        folder.mkdir()
        aggregator = new_aggregator(AggregationConfig(**config), total_weight=TOTAL, folder=folder)
        for deltas, weight, p in replies:
            aggregator.add(deltas, weight=weight, probability=p.__getitem__)
        return aggregator.result()

    return run


@st.composite
def reply_lists(draw):
    """Some coordinates and whole deltas are zero, as of an expert that saw no token."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    replies = []
    for _ in range(draw(st.integers(1, 7))):
        units = draw(st.sets(st.sampled_from("abcd")))
        deltas = {u: rng.normal(size=(2, ord(u) - 97)) * rng.integers(0, 3) for u in units}
        replies.append((deltas, float(rng.integers(1, 100)), {u: rng.uniform(0.02, 1) for u in units}))
    return replies


@settings(max_examples=40, deadline=None)
@given(replies=reply_lists(), trim=st.floats(0, 0.49), robust=st.sampled_from(["trimmed_mean", "median"]),
       random=st.randoms(use_true_random=False))  # fmt: skip
def test_means_of_the_middle_are_the_formula_whoever_comes_first(fold, replies, trim, robust, random):
    got = fold(replies, robust=robust, trim=trim, rule="ht")
    for unit in {unit for deltas, _, _ in replies for unit in deltas}:
        held = np.stack([deltas[unit] for deltas, _, _ in replies if unit in deltas])
        want = [
            statistics.median(column) if robust == "median" else reference_trimmed_mean(column, trim)
            for column in held.reshape(len(held), -1).T
        ]
        np.testing.assert_allclose(got.deltas[unit].ravel(), want, rtol=1e-12, atol=1e-15)
        assert got.received[unit] == len(held)
    random.shuffle(replies)
    again = fold(replies, robust=robust, trim=trim, rule="hajek")
    assert again.deltas.keys() == got.deltas.keys()
    assert all(again.deltas[unit].tobytes() == update.tobytes() for unit, update in got.deltas.items())


@settings(max_examples=40, deadline=None)
@given(replies=reply_lists(), rule=st.sampled_from(["ht", "hajek", "clipped", "none"]), bound=st.floats(0.1, 3),
       random=st.randoms(use_true_random=False))  # fmt: skip
def test_norm_clip_is_the_rule_on_clipped_deltas(fold, replies, rule, bound, random):
    want = reference_aggregate(reference_clipped(replies, bound), TOTAL, rule, clip=4.0)
    for _ in range(2):
        got = fold(replies, robust="norm_clip", norm_bound=bound, rule=rule, clip=4.0)
        assert got.deltas.keys() == want.keys()
        for unit, update in want.items():
            np.testing.assert_allclose(got.deltas[unit], update, rtol=1e-10, atol=1e-12)
        random.shuffle(replies)


def test_nothing_above_the_bound_is_the_rule_itself(fold):
    replies = honest(4)
    plain, clipped = fold(replies, rule="ht"), fold(replies, rule="ht", robust="norm_clip", norm_bound=1e9)
    assert clipped.deltas["a"].tobytes() == plain.deltas["a"].tobytes()
    assert (clipped.received, clipped.largest_weight) == (plain.received, plain.largest_weight)
    assert clipped.mean_effective_sample_size == plain.mean_effective_sample_size


def honest(clients):
    rng = np.random.default_rng(3)
    return [({"a": rng.normal(1, 0.3, size=(4, 5)).astype(np.float32)}, 10.0, {"a": 0.5}) for _ in range(clients)]


@pytest.mark.parametrize("scale", [1e6, -1e6])
def test_one_hostile_client_of_five(fold, scale):
    good = honest(4)
    hostile = [*good, ({"a": np.float32(scale) * good[0][0]["a"]}, 10.0, {"a": 0.5})]
    values = np.stack([deltas["a"] for deltas, _, _ in good])
    assert np.abs(fold(hostile, rule="hajek").deltas["a"]).max() > 1e4
    for config in ({"robust": "median"}, {"robust": "trimmed_mean", "trim": 0.2}):
        got = fold(hostile, **config).deltas["a"]
        assert (got >= values.min(0)).all() and (got <= values.max(0)).all()
    norms = [np.linalg.norm(value) for value in values]
    moved = fold(hostile, rule="hajek", robust="norm_clip", norm_bound=2.0).deltas["a"] - values.mean(0)
    assert np.linalg.norm(moved) <= 2 * max(norms)


def test_of_two_replies_the_long_one_is_clipped(fold):
    both = [({"a": np.full(4, size, np.float32)}, 1.0, {"a": 1.0}) for size in (1e6, 1.0)]
    got = fold(both, rule="none", robust="norm_clip", norm_bound=1.0).deltas["a"]
    np.testing.assert_allclose(got, np.ones(4), rtol=1e-6)


def test_a_refused_reply_adds_nothing(tmp_path):
    aggregator = RobustAggregator(AggregationConfig(robust="norm_clip"), total_weight=2, folder=tmp_path)
    aggregator.add({"a": np.ones(2, np.float32)}, weight=1, probability=lambda _: 0.5)
    with pytest.raises(InputError, match="probability of b is 0"):
        aggregator.add({"a": np.ones(2), "b": np.ones(1)}, weight=1, probability={"a": 1.0, "b": 0.0}.__getitem__)
    with pytest.raises(InputError, match="weight is 0"):
        aggregator.add({"a": np.ones(2)}, weight=0, probability=lambda _: 1.0)
    with pytest.raises(AssertionError, match="shape of a"):
        aggregator.add({"b": np.ones(1), "a": np.ones(3)}, weight=1, probability=lambda _: 1.0)
    result = aggregator.result()
    assert result.received == {"a": 1} and result.deltas["a"].tolist() == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_scalars_half_precision_and_nothing_at_all(fold):
    got = fold([({"a": np.float16(3) * np.ones((), np.float16)}, 1.0, {})], robust="median")
    assert got.deltas["a"].shape == () and got.deltas["a"].dtype == np.float32 and got.deltas["a"] == 3
    assert (got.effective_sample_size, got.largest_weight) == (1.0, 1.0)
    for robust in ("median", "norm_clip"):
        empty = fold([], robust=robust)
        assert (empty.deltas, empty.effective_sample_size, empty.largest_weight) == ({}, 0.0, 0.0)


@pytest.mark.parametrize("robust", ["norm_clip", "trimmed_mean", "median"])
def test_replies_are_read_back_one_unit_at_a_time(tmp_path, robust):
    """32 units x 16 replies x 64 kB are 32 MiB on disk; a unit of all replies is 1 MiB, the result 2 (4 in float64)."""
    config = AggregationConfig(robust=robust)
    aggregator = RobustAggregator(config, total_weight=16, folder=tmp_path)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(16):
            deltas = {unit: rng.random(1 << 14, dtype=np.float32) for unit in range(32)}
            aggregator.add(deltas, weight=1, probability=lambda _: 0.5)
        del deltas
        between = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        result = aggregator.result()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(result.deltas) == 32 and sum(path.stat().st_size for path in tmp_path.iterdir()) == 32 << 20
    assert between < 1 << 20 and peak < 10 << 20


def test_bad_values_are_refused():
    for wrong in ({"robust": "medain"}, {"trim": 0.5}, {"trim": -0.1}, {"norm_bound": 0.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AggregationConfig(**wrong)


def test_weights_that_degenerate_are_named(fold):
    even = [({"a": np.ones(1)}, 1.0, {"a": 0.5}) for _ in range(4)]
    uneven = [*even[1:], ({"a": np.ones(1)}, 1.0, {"a": 0.02})]

    def found(replies, **config):
        return weight_warnings(fold(replies, **config), AggregationConfig(**config))

    assert found(even) == found([]) == found(uneven, rule="none") == {}
    assert found(uneven, robust="median") == found(uneven, robust="trimmed_mean", trim=0.25) == {}
    ht = found(uneven)
    # Weights 2, 2, 2 and 50: 56^2 / (12 + 2500) = 1.25.
    assert set(ht) == {"sample", "weight"}
    assert "effective sample size of a unit is 1.25 of 4 replies" in ht["sample"]
    assert "largest 1/p is 50, federation.clip is 10" in ht["weight"]
    assert all("raise federation.floor" in text and "= hajek or clipped" in text for text in ht.values())
    assert "= clipped" in found(uneven, rule="hajek")["weight"]
    # 2, 2, 2 and 10: 256 / 112 = 2.29 of 4.
    assert found(uneven, rule="clipped") == {}
    assert set(found(uneven, robust="norm_clip")) == {"sample", "weight"}
    assert "1 of 1 units have too few replies for federation.robust = trimmed_mean" in found(
        even, robust="trimmed_mean", trim=0.2)["replies"]  # fmt: skip
    assert set(found(even[:2], robust="median")) == set(found(even[:1], robust="norm_clip")) == {"replies"}


def test_one_place_chooses(tmp_path):
    assert isinstance(new_aggregator(AggregationConfig(), total_weight=1, folder=tmp_path), Aggregator)
    chosen = new_aggregator(AggregationConfig(robust="median"), total_weight=1, folder=tmp_path)
    assert isinstance(chosen, RobustAggregator)
