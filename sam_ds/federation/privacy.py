"""Client-level differential privacy of what leaves the server: the weights, and the graph with them.

Protected is one client, all its answers in all rounds, from whoever sees every model and graph that is sent or saved.
Neighbours are two runs in one of which all answers of one client are zeros (Kairouz et al., 2103.00039, "zero-out"; its
epsilon means what it does where the client is left out). That it takes part, its tier and |D_i| are public. The server
sees all it is sent, and so does whoever reads its folder. In a round it releases

    sum over the clients drawn of c_i + sigma S N(0, I),     c_i = clip_S((w_i / p_{i,u} delta_{i,u}) for all u)

with w_i = |D_i| / sum_j |D_j|, u over the units that i sent, clip_S(v) = v min(1, S / |v|), and |v| the L2 norm over
all units together. What one client changes is c_i, so the sensitivity is S:

- The clip comes after the weight. Before it, the sensitivity would be S max w_i / p_{i,u}, which no client bounds: an
  expert that is rarely held counts manifold, and p follows from the client's own text.
- Nobody else's c_j may move with the answers of i. sum_j |D_j| is fixed, and p_j is of j's registration and of what was
  released before; what i registers with moves p_i alone, and so c_i. So no mean by weights of the replies (`hajek`,
  `none`; `fedavg` and `fedit` become sums with p = pi, the first estimator of McMahan et al., 1710.06963), no norms of
  others (`robust`), no scores by what others held or who else there is (`fitness`, `anchors`). A client that fails
  counts as zeros: nothing is scaled up for it.
- Noise is on every coordinate of every unit that trains. An expert that stays as it is would tell that nobody who was
  drawn held it, and what a client holds follows from its text.
- The draw of a "poisson" round amplifies: a client is in it with q = K / N on its own. For exactly K of N the bound of
  the sampled Gaussian does not hold under zero-out, as a client that is in keeps another out; none is claimed (q = 1).

The noise and the draw come from the operating system's entropy, not from the run's seed: whoever has the configuration
could take seeded noise off again, and knows who was in a seeded draw; and numpy's generators can be recovered from what
they put out, which an expert that nobody sent shows bare. So a run with noise cannot be repeated, and one that is
resumed is another run from there on, with the same epsilon: the last round's noise is in the checkpoint's weights.

Edits of the graph come from counters with noise of their own (`graph/privacy.py`), which is then as secret, and are in
the same epsilon. Not covered: counters, losses and norms in the run folder's records; whether a client answered at all,
where nobody did and the round is repeated; floating point, but that noise is added in float64 and rounded to float32.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, MutableMapping
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from sam_ds.federation.accountant import Release, epsilon_of

U = TypeVar("U", bound=Hashable)

Released: TypeAlias = dict[str, list[list[float]]]
"""What was released so far, by part ("weights", "edits"): [noise, rate, times] of each run of releases alike; noise 0
where there was none."""

_CHUNK = 1 << 16


def noised(
    deltas: Mapping[U, NDArray[Any]], units: Mapping[U, NDArray[Any]], deviation: float
) -> dict[U, NDArray[Any]]:
    """An update of all `units`, with noise of this standard deviation on every coordinate: in place where there is a
    delta, else on zeros."""
    result = {}
    for unit, value in units.items():
        delta = deltas.get(unit)
        flat = np.zeros(value.size, value.dtype) if delta is None else delta.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            part = flat[start : start + _CHUNK]
            part[:] = part + deviation * secret_normal(part.size)
        result[unit] = flat.reshape(value.shape)
    return result


def secret_normal(count: int) -> NDArray[np.float64]:
    """(count,) independent N(0, 1) from the operating system's entropy, by the inverse of the distribution function at
    52 bits and a sign: the tail beyond 8.2 is missing, of probability 2^-53."""
    bits = np.frombuffer(os.urandom(8 * count), np.uint64)
    size: NDArray[np.float64] = ndtri(((bits >> np.uint64(12)) + 0.5) * 2.0**-53)
    return np.where(bits & np.uint64(1), size, -size)


def note_release(released: MutableMapping[str, list[list[float]]], part: str, noise: float, rate: float) -> None:
    """One more release of a part, in place."""
    entries = released.setdefault(part, [])
    if not entries or entries[-1][:2] != [noise, rate]:
        entries.append([noise, rate, 0])
    entries[-1][2] += 1


def spent(released: Mapping[str, list[list[float]]], delta: float) -> dict[str, float]:
    """The epsilon at `delta` of each part that never went out without noise, and of the "run" if all are such;
    {} where none is."""
    parts = {
        part: [Release(noise, rate, int(times)) for noise, rate, times in entries]
        for part, entries in released.items()
        if all(noise for noise, _, _ in entries)
    }
    if not parts:
        return {}
    found = {part: epsilon_of(releases, delta) for part, releases in parts.items()}
    if parts.keys() == released.keys():
        found["run"] = epsilon_of([each for releases in parts.values() for each in releases], delta)
    return {"delta": delta} | found
