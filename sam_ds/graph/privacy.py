"""Noise on the counters that edits are proposed from, and what it is worth.

Protected is one client, all its text and all its rounds together, from whoever sees the edits; the server sees the
counters themselves. A client's counters of a round are scaled down to an L2 norm of at most C, so over the T_m rounds
of a period one client changes their sum by at most T_m C. Gaussian noise of standard deviation sigma T_m C, added once
a period, gives (epsilon, delta) with, exactly (Balle and Wang 2018, 1805.06530, theorem 8; a = 1 / sigma),

    delta(epsilon) = Phi(a / 2 - epsilon / a) - e^epsilon Phi(-a / 2 - epsilon / a)

and p periods are one of sigma / sqrt(p) (Dong et al., 1905.02383). That clients are drawn is not used: it would make
epsilon smaller.

What this does not cover: the scores of the registration, and the weights, which carry a client's text into the trial of
each edit and into everybody's later counters; for them there is `federation/privacy.py`. And the noise must be secret:
it follows from the run's seed, which whoever has the configuration knows, unless `federation.dp_noise` is on too.

Letters: L layers, E experts, S experts held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import log_ndtr

from sam_ds.errors import InputError

IntArray = npt.NDArray[np.int64]

_NOISE = 6
"""Keeps the generator of the noise apart from those of participation (1, 2, 5), exploration (3) and upload (4)."""


def clip_counters(counters: Sequence[IntArray], bound: float) -> list[IntArray]:
    """One client's (3, S, S) of every layer, scaled down together to an L2 norm of at most `bound` and rounded down."""
    norm = math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in counters))
    if norm <= bound:
        return list(counters)
    return [np.floor(value * (bound / norm)).astype(np.int64) for value in counters]


def noised_counters(counters: Sequence[IntArray], deviation: float, seed: int, round_: int) -> list[IntArray]:
    """Strictly upper (L, E, E) tables with Gaussian noise above their diagonals, rounded, none below 0."""
    rng = np.random.default_rng([_NOISE, seed, round_])
    return [
        np.triu(np.maximum(np.rint(value + rng.normal(0.0, deviation, value.shape)), 0), 1).astype(np.int64)
        for value in counters
    ]


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """The least delta at this epsilon of Gaussian noise of deviation sigma x the sensitivity."""
    a = 1.0 / sigma
    lost = math.exp(log_ndtr(a / 2 - epsilon / a))
    return max(0.0, lost - math.exp(epsilon + log_ndtr(-a / 2 - epsilon / a)))


def gaussian_epsilon(sigma: float, delta: float, *, releases: int = 1) -> float:
    """The least epsilon at this delta of so many releases, to 1e-9, from above.

    Raises:
        InputError: a sigma that is not positive, or a delta outside (0, 1).
    """
    if not (0.0 < sigma < math.inf and 0.0 < delta < 1.0):
        raise InputError(f"sigma is {sigma} and delta {delta}: sigma must be positive and delta in (0, 1)")
    sigma /= math.sqrt(releases)
    if gaussian_delta(0.0, sigma) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while gaussian_delta(high, sigma) > delta:
        low, high = high, 2.0 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(middle, sigma) > delta else (low, middle)
    return high
