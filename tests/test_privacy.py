"""The Gaussian mechanism's exact privacy, and what is noised."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from sam_ds.errors import InputError
from sam_ds.graph.privacy import clip_counters, gaussian_delta, gaussian_epsilon, noised_counters

sigmas = st.floats(0.05, 50)
deltas = st.floats(1e-10, 0.5)


@pytest.mark.parametrize(("sigma", "epsilon"), [(1.0, 0.5), (0.5, 3.0), (3.0, 0.1), (0.7, 0.0)])
def test_delta_is_the_hockey_stick_divergence(sigma: float, epsilon: float) -> None:
    """sup over events of P(A) - e^epsilon Q(A) is the integral of the positive part of p - e^epsilon q."""

    def density(x: float, mean: float) -> float:
        return math.exp(-(((x - mean) / sigma) ** 2) / 2) / (sigma * math.sqrt(2 * math.pi))

    # p / q grows with x: positive from where it is e^epsilon.
    start = epsilon * sigma**2 + 0.5
    want, _ = quad(lambda x: density(x, 1.0) - math.exp(epsilon) * density(x, 0.0), start, start + 40 * sigma)
    assert gaussian_delta(epsilon, sigma) == pytest.approx(want, rel=1e-6)


def test_known_values() -> None:
    # 1-GDP at 1e-5, Dong et al.; the noise that DP-SGD papers quote for one full-batch step.
    assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3775, abs=1e-3)
    assert gaussian_epsilon(1.0, 0.5) == 0.0
    assert gaussian_delta(0.0, 1.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)))
    assert gaussian_epsilon(0.01, 1e-5) == pytest.approx(5000 + 426.5, rel=0.01)


@given(sigmas, deltas)
def test_epsilon_and_delta_are_inverses(sigma: float, delta: float) -> None:
    epsilon = gaussian_epsilon(sigma, delta)
    assert gaussian_delta(epsilon, sigma) <= delta
    if epsilon > 1e-3:
        assert gaussian_delta(epsilon, sigma) == pytest.approx(delta, rel=1e-3)
        assert gaussian_delta(0.999 * epsilon, sigma) > delta


@given(sigmas, deltas, st.integers(1, 50))
def test_more_noise_less_epsilon_more_periods_more(sigma: float, delta: float, releases: int) -> None:
    epsilon = gaussian_epsilon(sigma, delta, releases=releases)
    assert gaussian_epsilon(1.1 * sigma, delta, releases=releases) <= epsilon
    assert gaussian_epsilon(sigma, 1.1 * delta, releases=releases) <= epsilon
    assert gaussian_epsilon(sigma, delta, releases=releases + 1) >= epsilon
    assert epsilon == pytest.approx(gaussian_epsilon(sigma / math.sqrt(releases), delta), rel=1e-6)
    # Sharper than adding up the periods.
    assert epsilon <= releases * gaussian_epsilon(sigma, delta / releases) * (1 + 1e-6)


@given(st.floats(0.01, 0.99), st.floats(1e-10, 0.1))
def test_the_classic_bound_is_larger(epsilon: float, delta: float) -> None:
    """Dwork and Roth, theorem A.1: sigma = sqrt(2 ln(1.25 / delta)) / epsilon for epsilon < 1."""
    assert gaussian_epsilon(math.sqrt(2 * math.log(1.25 / delta)) / epsilon, delta) < epsilon


@pytest.mark.parametrize(("sigma", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_bad_values_are_refused(sigma: float, delta: float) -> None:
    with pytest.raises(InputError, match="sigma must be positive and delta in"):
        gaussian_epsilon(sigma, delta)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1e5))
def test_clipped_counters_keep_their_bound(seed: int, bound: float) -> None:
    rng = np.random.default_rng(seed)
    counters = [rng.integers(0, 1000, size=(3, slots, slots)) for slots in (2, 4)]
    clipped = clip_counters(counters, bound)
    norm, after = (math.sqrt(sum(int((v**2).sum()) for v in each)) for each in (counters, clipped))
    assert after <= bound or norm <= bound
    for value, kept in zip(counters, clipped, strict=True):
        assert kept.dtype == np.int64 and kept.shape == value.shape
        np.testing.assert_allclose(kept, value * min(1.0, bound / norm), atol=1.0)
    assert clip_counters([], bound) == []


def test_noise_is_of_its_seed_round_and_deviation() -> None:
    tables = [np.triu(np.full((2, 64, 64), 10_000), 1)] * 3
    one = noised_counters(tables, 100.0, 3, 6)
    again, other, another = (noised_counters(tables, 100.0, *key) for key in ((3, 6), (3, 9), (4, 6)))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    assert not (one[0] == other[0]).all() and not (one[0] == another[0]).all() and not (one[0] == one[1]).all()
    upper = np.concatenate([table[:, *np.triu_indices(64, 1)].ravel() for table in one])
    assert upper.mean() == pytest.approx(10_000, abs=5) and upper.std() == pytest.approx(100, rel=0.03)
    assert all(table.dtype == np.int64 and not np.tril(table).any() for table in one)
    assert min(table.min() for table in noised_counters(tables, 1e6, 0, 1)) == 0
