"""Epsilon of a sequence of Gaussian releases, each of all clients or of a secret Poisson sample of them.

A release is a sum that one client changes by at most 1 in L2 norm, plus N(0, sigma^2) on every coordinate; the client
is in it with probability q. Of its Renyi divergence D_alpha (Mironov, 1702.07476), at whole orders alpha,

    (alpha - 1) D_alpha = log sum_k C(alpha, k) (1 - q)^(alpha - k) q^k exp((k^2 - k) / (2 sigma^2))

(Mironov, Talwar, Zhang, 1908.10530, section 3.3), which is alpha / (2 sigma^2) at q = 1. D_alpha adds up over releases,
also where the later ones depend on the earlier; and epsilon is at most

    min over alpha of  sum D_alpha + log((alpha - 1) / alpha) - (log delta + log alpha) / (alpha - 1)

(Canonne, Kamath, Steinke, 2004.00010, proposition 12). Whatever the draws were, the releases are no worse than the same
of all clients, and those together are one release of sigma = (sum sigma_r^-2)^(-1/2), whose epsilon is known exactly
(`graph/privacy.py`): the smaller of the two bounds holds.

A release with q = 1 may see the same draw as one with q < 1: given the others' draws, the joint density is an average
over the client's own, and Minkowski's inequality bounds its moments by the product of the two.

flwr's `RdpAccountant` gives the first bound, by way of the package dp-accounting, which the stack does not bring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, logsumexp

from sam_ds.errors import InputError
from sam_ds.graph.privacy import gaussian_epsilon

ORDERS = np.array([*range(2, 129), *range(136, 257, 8), *range(288, 1025, 32)])


@dataclass(frozen=True, slots=True)
class Release:
    """`times` releases alike. `noise`: sigma, in units of the sensitivity. `rate`: q, 1 without amplification."""

    noise: float
    rate: float
    times: int

    def __post_init__(self) -> None:
        if not (0 < self.noise < math.inf and 0 < self.rate <= 1 and self.times >= 1):
            raise InputError(f"{self}: noise must be positive, rate in (0, 1], times at least 1")


def epsilon_of(releases: Sequence[Release], delta: float) -> float:
    """The epsilon at this delta of all releases together; one release or more. Raises InputError for a delta outside
    (0, 1)."""
    together = 1 / math.sqrt(math.fsum(each.times / each.noise**2 for each in releases))
    exact = gaussian_epsilon(together, delta)
    if all(each.rate == 1 for each in releases):
        return exact
    divergence = np.sum([each.times * renyi(each.rate, each.noise) for each in releases], axis=0)
    bounds = divergence + np.log1p(-1 / ORDERS) - (math.log(delta) + np.log(ORDERS)) / (ORDERS - 1)
    return min(exact, max(0.0, float(bounds.min())))


@cache
def renyi(rate: float, noise: float) -> NDArray[np.float64]:
    """D_alpha of one release at `ORDERS`."""
    if rate == 1:
        return ORDERS / (2 * noise**2)
    found = []
    for order in map(int, ORDERS):
        k = np.arange(order + 1)
        chances = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
        chances += (order - k) * math.log1p(-rate) + k * math.log(rate)
        found.append(float(logsumexp(chances + (k * k - k) / (2 * noise**2))) / (order - 1))
    return np.array(found)
