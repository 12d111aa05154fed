"""Convergence bounds beside a measured gap: one that adds up three terms, and a corrected one.

The first is   E[L_T - L*] <= (1 - eta mu)^T gap0 + eta sigma2 / (2 mu) + rho_max gamma T_m.

With an Lip-smooth loss that satisfies the PL inequality, eta <= 1 / Lip and gradient noise of variance
sigma2, one step gives gap' <= (1 - eta mu) gap + Lip eta^2 sigma2 / 2, so the noise term is Lip eta sigma2 /
(2 mu). An edit period changes the loss by at most rho_max gamma and the optimum L* of the graph by as much,
so right after the edits G <= (1 - eta mu)^T_m G + 2 rho_max gamma: the graph term is 2 rho_max gamma / (1 -
(1 - eta mu)^T_m). It shrinks with T_m, where the first one grows.

Units: losses, gaps and gamma in nats per token, T and T_m in rounds. L* is the optimum of the current graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam_ds.errors import InputError


def uncorrected_bound(
    T: int, *, eta: float, mu: float, sigma2: float, rho_max: int, gamma: float, T_m: int, gap0: float
) -> float:
    """The three terms added up, for comparison: it does not hold in general."""
    _check_rate(eta, mu, T_m)
    return float((1 - eta * mu) ** T * gap0 + eta * sigma2 / (2 * mu) + rho_max * gamma * T_m)


def corrected_bound(
    T: int,
    *,
    eta: float,
    mu: float,
    sigma2: float,
    rho_max: int,
    gamma: float,
    T_m: int,
    gap0: float,
    lip: float,
) -> float:
    """Bound on the expected gap after T rounds, edits every T_m rounds included; worst right after an edit.

    Raises InputError unless 0 < mu <= lip and eta <= 1 / lip, without which nothing is proven.
    """
    _check_rate(eta, mu, T_m)
    if not (mu <= lip and eta * lip <= 1.0):
        raise InputError(f"the bound needs mu <= lip and eta <= 1 / lip, got eta={eta}, mu={mu}, lip={lip}")
    noise = lip * eta * sigma2 / (2 * mu)
    edits = 2 * rho_max * gamma / (1 - (1 - eta * mu) ** T_m)
    return float((1 - eta * mu) ** T * gap0 + noise + edits)


def _check_rate(eta: float, mu: float, T_m: int) -> None:
    if not (eta > 0.0 and mu > 0.0 and eta * mu <= 1.0):
        raise InputError(f"eta and mu must be positive with eta * mu <= 1, got eta={eta}, mu={mu}")
    if T_m < 1:
        raise InputError(f"T_m must be at least 1 round, got {T_m}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Estimates, not constants of the problem: the decay seen in one run's losses."""

    rate: float
    """Estimate of eta mu, the share of the gap closed in a round, in (0, 1)."""
    floor: float
    """Estimate of L*, the loss the run tends to."""
    gap0: float
    """Estimate of L_0 - L*."""
    residual_variance: float
    """Variance of the losses around the fitted curve, with three fitted parameters taken off."""


def fit_rate(losses: Sequence[float]) -> Fit | None:
    """Least squares fit of L_t = L* + (L_0 - L*) (1 - rate)^t to the losses of rounds 0, 1, 2, ...

    For a given rate the model is linear in L* and L_0 - L*, so only the rate is searched. None where there is
    nothing to fit: fewer than 4 losses, or losses that do not fall. Raises InputError on a loss that is not
    finite.
    """
    loss_T = np.asarray(losses, dtype=np.float64)
    if not np.isfinite(loss_T).all():
        raise InputError(f"losses must be finite, got {loss_T.tolist()[:10]}")
    num_rounds = len(loss_T)
    if num_rounds < 4:
        return None
    round_T = np.arange(num_rounds)

    def solve(log_rate: float) -> tuple[float, float, float]:
        decay_T = (1.0 - np.exp(log_rate)) ** round_T
        spread = decay_T - decay_T.mean()
        gap0 = float(spread @ loss_T / (spread @ spread))
        floor = float(loss_T.mean() - gap0 * decay_T.mean())
        return float(np.square(loss_T - floor - gap0 * decay_T).sum()), floor, gap0

    # zoom in on the best of a grid, which finds the deepest of several valleys; a decay that takes far more
    # rounds than the run has cannot be told from a straight line, so the search stops there
    low, high = np.log(0.01 / num_rounds), np.log(1.0 - 1e-6)
    for _ in range(6):
        grid = np.linspace(low, high, 128)
        best = int(np.argmin([solve(x)[0] for x in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    log_rate = float(grid[best])
    squared_error, floor, gap0 = solve(log_rate)
    if gap0 <= 1e-12 * (1.0 + abs(floor)):
        return None
    return Fit(
        rate=float(np.exp(log_rate)),
        floor=floor,
        gap0=gap0,
        residual_variance=squared_error / (num_rounds - 3),
    )
