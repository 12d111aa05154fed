from __future__ import annotations

import numpy as np
import pytest

from sam_ds.errors import InputError
from sam_ds.graph.bounds import corrected_bound, fit_rate, uncorrected_bound

ETA, GAMMA = 0.05, 1.0


def gap_after_edit(T_m: int, lip: float = 1.0, periods: int = 400) -> float:
    """Gradient descent on L = lip / 2 (theta - optimum)^2; every T_m rounds the optimum moves away, L rises
    by gamma.

    mu = lip here, and L* stays 0. The gap right after the last edit.
    """
    theta, optimum = 0.0, 0.0
    for _ in range(periods):
        away = np.sqrt((theta - optimum) ** 2 + 2 * GAMMA / lip)
        optimum = theta + away if theta < optimum else theta - away
        gap = lip / 2 * (theta - optimum) ** 2
        for _ in range(T_m):
            theta -= ETA * lip * (theta - optimum)
    return float(gap)


def test_edits_on_a_pl_quadratic_rarer_edits_mean_a_smaller_gap() -> None:
    periods = (1, 5, 20, 100)
    terms = {"eta": ETA, "mu": 1.0, "sigma2": 0.0, "rho_max": 1, "gamma": GAMMA, "gap0": 0.0}
    measured = [gap_after_edit(T_m) for T_m in periods]
    corrected = [corrected_bound(10**6, T_m=T_m, lip=1.0, **terms) for T_m in periods]
    printed = [uncorrected_bound(10**6, T_m=T_m, **terms) for T_m in periods]
    # closed form: G = gamma / (1 - (1 - eta lip)^(2 T_m))
    np.testing.assert_allclose(measured, [GAMMA / (1 - 0.95 ** (2 * T_m)) for T_m in periods], rtol=1e-6)
    assert all(a > b for a, b in zip(measured, measured[1:], strict=False))
    assert all(a > b for a, b in zip(corrected, corrected[1:], strict=False))
    assert all(m <= c for m, c in zip(measured, corrected, strict=True))
    assert printed == [1.0, 5.0, 20.0, 100.0]
    assert measured[0] > printed[0]
    np.testing.assert_allclose(corrected, [40.0, 8.84, 3.12, 2.01], rtol=2e-3)


def test_the_noise_term_needs_the_smoothness_constant() -> None:
    lip, sigma2 = 10.0, 4.0
    rng = np.random.default_rng(0)
    theta = np.zeros(20_000)
    for _ in range(100):
        theta -= ETA * (lip * theta + rng.normal(scale=np.sqrt(sigma2), size=theta.shape))
    gap = float((lip / 2 * theta**2).mean())
    terms = {"eta": ETA, "mu": lip, "sigma2": sigma2, "rho_max": 0, "gamma": 0.0, "T_m": 1, "gap0": 0.0}
    assert uncorrected_bound(100, **terms) < 0.5 * gap
    assert gap <= corrected_bound(100, lip=lip, **terms)


def test_bounds_start_from_the_first_gap_and_check_their_conditions() -> None:
    terms = {"eta": 0.1, "mu": 0.5, "sigma2": 0.2, "rho_max": 2, "gamma": 0.3, "T_m": 4, "gap0": 7.0}
    assert uncorrected_bound(0, **terms) == pytest.approx(7.0 + 0.1 * 0.2 / 1.0 + 2 * 0.3 * 4)
    assert corrected_bound(3, lip=2.0, **terms) == pytest.approx(
        0.95**3 * 7.0 + 2.0 * 0.1 * 0.2 / 1.0 + 2 * 2 * 0.3 / (1 - 0.95**4)
    )
    with pytest.raises(InputError, match="mu <= lip"):
        corrected_bound(3, lip=0.4, **terms)
    with pytest.raises(InputError, match="eta <= 1 / lip"):
        corrected_bound(3, lip=11.0, **terms)
    with pytest.raises(InputError, match="eta \\* mu <= 1"):
        uncorrected_bound(3, **{**terms, "mu": 20.0})
    with pytest.raises(InputError, match="T_m"):
        uncorrected_bound(3, **{**terms, "T_m": 0})


@pytest.mark.parametrize("rate", [0.03, 0.3, 0.9])
def test_fit_recovers_a_decay(rate: float) -> None:
    fit = fit_rate((2.5 + 1.5 * (1 - rate) ** np.arange(40)).tolist())
    assert fit is not None
    assert (fit.rate, fit.floor, fit.gap0) == pytest.approx((rate, 2.5, 1.5), rel=1e-4)
    assert fit.residual_variance < 1e-9


def test_fit_of_a_noisy_run_estimates_the_noise() -> None:
    noise = np.random.default_rng(1).normal(scale=0.02, size=300)
    fit = fit_rate((3.0 + 0.9 ** np.arange(300) + noise).tolist())
    assert fit is not None
    assert fit.rate == pytest.approx(0.1, rel=0.1)
    assert fit.residual_variance == pytest.approx(4e-4, rel=0.2)


def test_fit_says_nothing_where_there_is_nothing_to_fit() -> None:
    assert fit_rate([3.0, 2.0, 1.5]) is None
    assert fit_rate([2.0] * 10) is None
    assert fit_rate([1.0, 1.5, 1.75, 1.875]) is None
    with pytest.raises(InputError, match="finite"):
        fit_rate([1.0, float("nan"), 1.0, 1.0])
