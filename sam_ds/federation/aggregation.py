"""Folding the replies of a round into one update per unit, and taking the server's step with it.

    delta_u = sum over received (i, u) of  (|D_i| / sum_j |D_j|) / p_{i,u} * delta_{i,u}        j over all
    N clients

is the Horvitz-Thompson (1952) estimate, rule `ht`. Under a design with known p > 0 (`participation.py`)
its expectation is sum_i w_i E[delta_{i,u}(S) | u in S], w_i = |D_i| / sum_j |D_j|: a client's delta
depends on everything it held. The other rules trade bias for variance:

| rule      | weight a of a reply     | update                    | unbiased              |
|-----------|-------------------------|---------------------------|-----------------------|
| `ht`      | w_i / p                 | sum a delta               | yes                   |
| `hajek`   | w_i / p                 | sum a delta / sum a       | asymptotically        |
| `clipped` | w_i min(1 / p, clip)    | sum a delta               | where 1 / p <= clip   |
| `none`    | |D_i|                   | sum a delta / sum a       | no                    |

What guards a rule against replies that lie is in `robust.py`; what noise on the sum is worth, in `privacy.py`.

The server's step is FedOpt (Reddi et al., 2003.00295, algorithm 2) with its names: theta <- theta + eta m
/ (sqrt(v) + tau), v starting at tau^2 and no bias correction; `momentum` is FedAvgM (1909.06335).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import daxpy, saxpy

from sam_ds.errors import InputError, nearest

RULES = ("ht", "hajek", "clipped", "none")
ROBUST = ("none", "norm_clip", "trimmed_mean", "median")
SERVER_OPTIMIZERS = ("sgd", "momentum", "adam", "yogi")

U = TypeVar("U", bound=Hashable)
"""A unit: whatever is weighted on its own, e.g. one tensor of one expert."""

Moments: TypeAlias = tuple[NDArray[Any], ...]
"""What a server optimizer keeps of a unit: nothing, (m,) or (m, v)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AggregationConfig:
    """How replies are weighted and what the server does with their sum. Fields of optimizers are named as in flwr, but
    for `server_lr`, which flwr calls `server_learning_rate` in FedAvgM and `eta` in FedAdam and FedYogi. flwr's FedAdam
    starts v at 0 and corrects the moments' bias; its momentum is 0 unless given."""

    rule: str = "ht"
    """One of `RULES`."""
    clip: float = 10.0
    """Largest 1/p of the rule `clipped`."""
    robust: str = "none"
    """One of `ROBUST`; `trimmed_mean` and `median` take the place of the rule."""
    trim: float = 0.2
    """Of `trimmed_mean`: share of the replies left out at each end of each coordinate."""
    norm_bound: float = 2.0
    """Of `norm_clip`: times the median norm of the replies."""
    contribution: float = np.inf
    """Largest L2 norm of what one reply adds to a sum, over all its units together and weight included."""
    server_optimizer: str = "sgd"
    """One of `SERVER_OPTIMIZERS`."""
    server_lr: float = 1.0
    """eta; for adam and yogi a step is about this large in every coordinate: 1e-2 or less."""
    server_momentum: float = 0.9
    """Of `momentum`."""
    beta_1: float = 0.9
    """Of `adam` and `yogi`: decay of the first moment."""
    beta_2: float = 0.99
    """Of `adam` and `yogi`: decay of the second moment."""
    tau: float = 1e-3
    """Of `adam` and `yogi`: degree of adaptivity."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("rule", self.rule, RULES),
            ("robust", self.robust, ROBUST),
            ("server_optimizer", self.server_optimizer, SERVER_OPTIMIZERS),
        ):
            if value not in known:
                raise InputError(f"{name} is {value!r}: use one of {', '.join(known)}{nearest(value, known)}")
        if not self.clip >= 1:
            raise InputError(f"clip is {self.clip}: a cap on 1/p must be at least 1")
        if not 0 <= self.trim < 0.5:
            raise InputError(f"trim is {self.trim}: must be in [0, 0.5), a share to leave out at each of two ends")
        for name, number in (("server_lr", self.server_lr), ("tau", self.tau), ("norm_bound", self.norm_bound)):
            if not 0 < number < np.inf:
                raise InputError(f"{name} is {number}: must be positive")
        if not self.contribution > 0:
            raise InputError(f"contribution is {self.contribution}: must be positive")
        if self.bounded and not (self.sums and self.robust == "none"):
            raise InputError(f"contribution is {self.contribution}, rule {self.rule!r} and robust {self.robust!r}: "
                             "what one reply adds is bounded only in a sum, of `ht` or `clipped`")
        for name, number in (
            ("server_momentum", self.server_momentum),
            ("beta_1", self.beta_1),
            ("beta_2", self.beta_2),
        ):
            if not 0 <= number < 1:
                raise InputError(f"{name} is {number}: must be in [0, 1)")

    @property
    def replaces_rule(self) -> bool:
        """Neither p nor |D_i| is used."""
        return self.robust in ("trimmed_mean", "median")

    @property
    def sums(self) -> bool:
        """The update is a sum, which lacks the part of whoever does not answer; the others are means."""
        return self.rule in ("ht", "clipped") and not self.replaces_rule

    @property
    def bounded(self) -> bool:
        """A reply that adds more than `contribution` is scaled down."""
        return self.contribution < np.inf

    def cut(self, replies: int) -> int:
        """How many of the replies are left out at each end: all but the middle one or two for `median`."""
        if self.robust == "median":
            return (replies - 1) // 2
        return int(self.trim * replies) if self.robust == "trimmed_mean" else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Aggregated(Generic[U]):
    """The update of a round. A unit that nobody sent is absent: it stays as it is."""

    deltas: dict[U, NDArray[Any]]
    """In the dtype of the first reply, float32 at least."""
    effective_sample_size: float
    """Kish: (sum a)^2 / sum a^2 replies, the least over the units; 0 without replies."""
    mean_effective_sample_size: float
    """The mean over the units."""
    largest_weight: float
    """Largest 1/p that was applied (after clipping; 1 for `none`); 0 without replies."""
    received: dict[U, int]
    """Replies per unit."""
    bounded: Mapping[str, float] = field(default_factory=dict)
    """Of a bounded sum: the middle norm of what the replies would have added, to set the bound by ("contribution"), and
    the share of them that was scaled down ("clipped")."""


@dataclass(slots=True)
class _Sum:
    """Running sums of one unit: a delta (flat, of this shape), a, a^2."""

    weighted: NDArray[Any]
    shape: tuple[int, ...]
    weight: float
    squared: float
    count: int = 1

    def add(self, delta: NDArray[Any], factor: float) -> None:
        if delta.size:
            # One pass over memory, in place, with no array in between.
            axpy = saxpy if self.weighted.dtype == np.float32 else daxpy
            axpy(delta.reshape(-1), self.weighted, a=factor)
        self.weight += factor
        self.squared += factor * factor
        self.count += 1


class Aggregator(Generic[U]):
    """Folds replies one at a time into one sum per unit, in its own precision: memory does not grow with the replies.

    The result depends on the order of `add` only through rounding; fold in plan order for equal bytes.

    Args:
        config: the rule.
        total_weight: sum_j |D_j| over all clients of the population, drawn or not.

    Raises:
        InputError: a `total_weight` that is not positive.
    """

    def __init__(self, config: AggregationConfig, *, total_weight: float) -> None:
        if not 0 < total_weight < np.inf:
            raise InputError(f"total_weight is {total_weight}: must be the examples of all clients, > 0")
        self._config = config
        self._total_weight = total_weight
        self._sums: dict[U, _Sum] = {}
        self._largest = 0.0
        self._norms: list[float] = []

    def add(
        self, deltas: Mapping[U, NDArray[Any]], *, weight: float, probability: Callable[[U], float]
    ) -> None:
        """Folds the reply of one client; all of it or, on an error, nothing.

        Args:
            deltas: unit -> after local training minus what was sent, finite (`wire.payload.decode_units` accepts
            nothing else); zeros for what was held but not used. weight: |D_i|.
            probability: p of a unit of this client; not called by the rule `none`.

        Raises:
            InputError: a `weight` that is not positive, or a p outside (0, 1].
        """
        inverse = check_reply(self._config, deltas, weight=weight, probability=probability)
        for unit, delta in deltas.items():
            known = self._sums.get(unit)
            assert known is None or known.shape == delta.shape, f"shape of {unit}"
        share, scale = weight / self._total_weight, 1.0
        if self._config.bounded:
            squares = (_square(delta) * (share * inverse[unit]) ** 2 for unit, delta in deltas.items())
            self._norms.append(math.sqrt(math.fsum(squares)))
            scale = min(1.0, self._config.contribution / max(self._norms[-1], 1e-300))
        for unit, delta in deltas.items():
            factor, dtype = share * inverse[unit], np.result_type(delta.dtype, np.float32)
            if scale < 1:
                # In float64: of a delta that is huge the bound must hold too.
                delta = np.multiply(delta, scale, dtype=np.float64)
            if unit in self._sums:
                self._sums[unit].add(delta, factor)
            else:
                first = np.multiply(delta, factor).astype(dtype, copy=False).reshape(-1)
                self._sums[unit] = _Sum(first, delta.shape, factor, factor * factor)
            self._largest = max(self._largest, inverse[unit])

    def result(self) -> Aggregated[U]:
        """The update of everything folded; the last call, for the sums themselves become the update."""
        sizes = [total.weight**2 / total.squared for total in self._sums.values()]
        if not self._config.sums:
            for total in self._sums.values():
                total.weighted /= total.weight
        return Aggregated(
            deltas={unit: total.weighted.reshape(total.shape) for unit, total in self._sums.items()},
            effective_sample_size=min(sizes, default=0.0),
            mean_effective_sample_size=sum(sizes) / max(len(sizes), 1),
            largest_weight=self._largest,
            received={unit: total.count for unit, total in self._sums.items()},
            bounded=self._bounded(),
        )

    def _bounded(self) -> dict[str, float]:
        if not self._norms:
            return {}
        norms = np.array(self._norms)
        clipped = norms > self._config.contribution
        return {"contribution": float(np.median(norms)), "clipped": float(clipped.mean())}


def _square(delta: NDArray[Any]) -> float:
    """The squared L2 norm, summed in float64."""
    exact = delta.reshape(-1).astype(np.float64)
    return float(exact @ exact)


def check_reply(
    config: AggregationConfig, deltas: Mapping[U, NDArray[Any]], *, weight: float, probability: Callable[[U], float]
) -> dict[U, float]:
    """The 1/p that the rule applies to each unit of a reply (1 for `none`). Raises as `Aggregator.add` does."""
    if not 0 < weight < np.inf:
        raise InputError(f"weight is {weight}: must be the client's number of examples, > 0")
    if config.rule == "none":
        return dict.fromkeys(deltas, 1.0)
    inverse = {}
    for unit in deltas:
        p = probability(unit)
        if not 0 < p <= 1:
            raise InputError(f"probability of {unit} is {p}: must be in (0, 1], as planned before the draw")
        inverse[unit] = min(1 / p, config.clip) if config.rule == "clipped" else 1 / p
    return inverse


def weight_warnings(result: Aggregated[U], config: AggregationConfig) -> dict[str, str]:
    """What a user should know about the weights of a round: kind -> the numbers and what to do; {} if all is well.

    `sample`: under a rule with p, a unit's effective sample size is on average less than half of its replies; `weight`:
    a 1/p is above `clip`; `replies`: a unit has so few of them that `robust` leaves out none.
    """
    found: dict[str, str] = {}
    units, replies = len(result.received), sum(result.received.values())
    if not units:
        return found
    rules = " or ".join(rule for rule in ("hajek", "clipped") if rule != config.rule)
    remedy = f"raise federation.floor or federation.clients_per_round, or take federation.aggregation = {rules}"
    size, weighted = result.mean_effective_sample_size, config.rule != "none" and not config.replaces_rule
    if weighted and size < 0.5 * replies / units:
        found["sample"] = (f"the effective sample size of a unit is {size:.3g} of {replies / units:.3g} replies: "
                           f"few of them decide; {remedy}")  # fmt: skip
    if result.largest_weight > config.clip:
        found["weight"] = (f"the largest 1/p is {result.largest_weight:.3g}, federation.clip is {config.clip:g}: "
                           f"one reply may decide; {remedy}")  # fmt: skip
    clips = config.robust == "norm_clip"
    bare = sum(count < 2 if clips else config.cut(count) == 0 for count in result.received.values())
    if config.robust != "none" and bare:
        found["replies"] = (f"{bare} of {units} units have too few replies for federation.robust = {config.robust} to "
                            "guard them: raise federation.clients_per_round or the tiers' experts")  # fmt: skip
    return found


class ServerOptimizer:
    """theta <- theta + the server's step; a pure function of its arguments."""

    def __init__(self, config: AggregationConfig) -> None:
        self._config = config

    def step(
        self,
        state: Mapping[U, NDArray[Any]],
        deltas: Mapping[U, NDArray[Any]],
        moments: Mapping[U, Moments],
    ) -> tuple[dict[U, NDArray[Any]], dict[U, Moments]]:
        """The next state and moments.

        Args:
            state: all units.
            deltas: the units to move; the others keep their arrays and their moments, untouched.
            moments: of earlier steps; {} at the start.

        Returns:
            New dicts; arrays that moved are new, in their old dtype.
        """
        assert deltas.keys() <= state.keys(), "a delta of a unit that the server does not have"
        new_state, new_moments = dict(state), dict(moments)
        for unit, delta in deltas.items():
            theta = state[unit]
            assert theta.shape == delta.shape, f"shape of {unit}"
            exact = delta.astype(np.float64)
            step, kept = self._step(exact, moments.get(unit))
            new_state[unit] = np.asarray(theta + self._config.server_lr * step, dtype=theta.dtype)
            if kept:
                new_moments[unit] = tuple(np.asarray(moment, dtype=theta.dtype) for moment in kept)
        return new_state, new_moments

    def _step(
        self, delta: NDArray[np.float64], moments: Moments | None
    ) -> tuple[NDArray[np.float64], Moments]:
        """The direction that eta multiplies, and the moments to keep."""
        config = self._config
        if config.server_optimizer == "sgd":
            return delta, ()
        if config.server_optimizer == "momentum":
            (velocity,) = moments or (np.zeros_like(delta),)
            velocity = config.server_momentum * velocity + delta
            return velocity, (velocity,)
        m, v = moments or (np.zeros_like(delta), np.full_like(delta, config.tau**2))
        m = config.beta_1 * m + (1 - config.beta_1) * delta
        square = delta * delta
        if config.server_optimizer == "adam":
            v = config.beta_2 * v + (1 - config.beta_2) * square
        else:
            v = v - (1 - config.beta_2) * square * np.sign(v - square)
        return m / (np.sqrt(v) + config.tau), (m, v)
