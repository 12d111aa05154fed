"""Who takes part in a round, which experts each holds, and with which probability: the only home of p.

    p_{i,l,e} = pi_i h_{i,l,e} u_{i,l}      pi_i: client i is drawn;  h_{i,l,e}: it then holds expert e of layer l
                                             u_{i,l}: it sends a held expert (1 where it sends all it holds)

Dividing by p (`aggregation.py`) removes the bias of partial participation exactly, but only for a p that
was fixed before the draw and that the draw realises (Horvitz and Thompson, 1952). So both are drawn here,
by designs with given first-order inclusion probabilities, and p is never an activation probability nor a
token frequency.

Clients: exactly K of N, or each on its own (Poisson), or K of N with each tier's share kept: "stratified" is
systematic sampling (Madow, 1949) over the clients sorted by tier, tiers and their clients in random order. Of
N_t clients of a tier, N_t K / N are drawn, rounded down or up, and pi = K / N for every client.

Experts: a mixture of two designs of fixed size, over the n experts with 0 < h < 1, which share b places (the
others are certain, or never held). With probability lambda a simple random sample, else systematic sampling
with h' = (h - lambda b/n) / (1 - lambda) over a random permutation: put intervals of lengths h'_e one after the
other on [0, b), throw a comb of teeth at s, s + 1, s + 2, ... with s ~ U[0, 1), and hold the experts that are hit.
As h'_e <= 1, expert e is hit at most once, with probability h'_e; the number of hits is always b. So e is held
with probability lambda b/n + (1 - lambda) h'_e = h_e. lambda is as large as 0 <= h' <= 1 lets it be, 1 where all
h are equal. Systematic sampling alone would keep some pairs apart, as the first two of h = (.1, .1, .6, .6, .6);
the simple random sample lets every two experts meet where b >= 2.

Sending: a client whose tier sends fewer experts than it holds (the uplink is the narrow side) sends a simple
random sample of them, so u = sent / held for each, roots included. What it trains does not depend on that draw.

Everything is a function of integers: round r can be planned again alone.

Shape legend: N clients, L layers, E experts a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sam_ds.errors import InputError, nearest

SCHEMES = ("without_replacement", "poisson", "stratified")

# numpy pads seeds with zeros, [s, r] and [s, r, 0] are one generator: a tag in front keeps the uses apart.
_CLIENTS, _EXPERTS, _SENT = 1, 2, 5
# Probabilities are whole grains: cumulated floats could put two teeth, or none, into an expert with h = 1.
_GRAIN = 1 << 50


@dataclass(frozen=True, slots=True)
class Member:
    """A client of the population: its id, its tier, and |D_i|, its number of training examples."""

    client: int
    tier: str
    examples: int

    def __post_init__(self) -> None:
        if self.client < 0 or self.examples < 1:
            raise InputError(
                f"client {self.client} with {self.examples} examples: ids start at 0 and a client without "
                "examples cannot take part"
            )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClientPlan:
    """What one client does this round.

    `experts`: the expert ids it holds, ascending, for each layer; `h`: (L, E) float64, read-only, the
    probability with which it holds each of them given that it takes part; `pi`: the probability with which
    it takes part; `sent`: the experts, of those it holds, whose update it sends.
    """

    client: int
    tier: str
    experts: tuple[tuple[int, ...], ...]
    h: NDArray[np.float64]
    pi: float
    sent: tuple[tuple[int, ...], ...]

    def probability(self, layer: int, expert: int) -> float:
        """p that this client sends an expert, whether it drew it or not; that of a shared parameter is `pi`."""
        return self.pi * float(self.h[layer, expert]) * len(self.sent[layer]) / len(self.experts[layer])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RoundPlan:
    """The clients of a round, ordered by id: the order in which their replies are folded."""

    seed: int
    round: int
    clients: tuple[ClientPlan, ...]


def plan_round(
    seed: int,
    round: int,
    population: Sequence[Member],
    budgets: Mapping[str, Sequence[int]],
    *,
    layers: int,
    num_experts: int,
    roots: int,
    per_round: int,
    scheme: str = "without_replacement",
    floor: float = 0.05,
    scores: Mapping[int, NDArray[np.float64]] | None = None,
    sends: Mapping[str, int] | None = None,
) -> RoundPlan:
    """The plan of a round; the same arguments give the same plan, whatever was planned before.

    Args:
        seed, round: integers >= 0.
        population: all N clients, any order, distinct ids.
        budgets: tier -> experts a client holds in each layer, roots included.
        layers, num_experts: L and E.
        roots: experts 0..roots - 1 are held by every client.
        per_round: K, clients drawn a round (for "poisson": on average; a round may then draw none).
        scheme: one of `SCHEMES`.
        floor: the least h of an expert.
        scores: client -> (L, E) scores >= 0 of the experts, inf for h = 1, of all clients that are drawn (others are
            not looked at: `sample_clients` tells); None makes h uniform.
        sends: tier -> experts a client sends in each layer; a tier that is absent sends all it holds.

    Raises:
        InputError: a value out of range, a tier without a budget, or shapes that do not match.
    """
    if len({member.client for member in population}) != len(population):
        raise InputError("population holds a client id twice: ids must be distinct")
    for tier in sorted({member.tier for member in population}):
        if tier not in budgets:
            raise InputError(f"tier {tier!r} has no budget{nearest(tier, budgets)}")
        if len(budgets[tier]) != layers:
            raise InputError(f"budgets[{tier!r}] has {len(budgets[tier])} layers: the model has {layers}")
        if (sends or {}).get(tier, 1) < 1:
            raise InputError(f"sends[{tier!r}] is {(sends or {})[tier]}: must be at least 1, or absent to send all")

    order = sorted(range(len(population)), key=lambda row: population[row].client)
    tiers = [population[row].tier for row in order]
    drawn, pi_N = sample_clients(seed, round, tiers=tiers, per_round=per_round, scheme=scheme)
    plans = []
    for position in drawn:
        member = population[order[position]]
        budget_L = budgets[member.tier]
        scores_LE = np.zeros((layers, num_experts)) if scores is None else scores[member.client]
        if scores_LE.shape != (layers, num_experts):
            raise InputError(f"scores of client {member.client} are {scores_LE.shape}: (layers, experts) is "
                             f"{(layers, num_experts)}")  # fmt: skip
        h_LE = np.empty((layers, num_experts))
        experts, sent = [], []
        for layer in range(layers):
            h_LE[layer] = inclusion_probabilities(
                scores_LE[layer], budget=budget_L[layer], roots=roots, floor=floor
            )
            rng = np.random.default_rng([_EXPERTS, seed, round, member.client, layer])
            held = sample_experts(h_LE[layer], rng)
            experts.append(tuple(held.tolist()))
            few = (sends or {}).get(member.tier, len(held))
            if few < len(held):
                rng = np.random.default_rng([_SENT, seed, round, member.client, layer])
                held = np.sort(rng.choice(held, few, replace=False))
            sent.append(tuple(held.tolist()))
        h_LE.setflags(write=False)
        plans.append(
            ClientPlan(
                client=member.client,
                tier=member.tier,
                experts=tuple(experts),
                h=h_LE,
                pi=float(pi_N[position]),
                sent=tuple(sent),
            )
        )
    return RoundPlan(seed=seed, round=round, clients=tuple(plans))


def sample_clients(
    seed: int, round: int, *, tiers: Sequence[str], per_round: int, scheme: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Positions 0..N-1 of the clients drawn, ascending, and pi (N,) of all of them, K/N each.

    `tiers`: of all N clients, by id. "without_replacement" and "stratified" draw exactly K = `per_round`;
    "poisson" draws each client on its own, K on average.

    Raises:
        InputError: `per_round` not in 1..N, a negative seed or round, or an unknown scheme.
    """
    clients = len(tiers)
    if not 1 <= per_round <= clients:
        raise InputError(f"per_round is {per_round}: must be in 1..{clients}, the number of clients")
    if seed < 0 or round < 0:
        raise InputError(f"seed {seed}, round {round}: must not be negative")
    if scheme not in SCHEMES:
        raise InputError(f"scheme is {scheme!r}: use one of {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}")
    rng = np.random.default_rng([_CLIENTS, seed, round])
    pi_N = np.full(clients, per_round / clients)
    if scheme == "poisson":
        return np.flatnonzero(rng.random(clients) < pi_N), pi_N
    if scheme == "stratified":
        return stratified_sample(tiers, per_round, rng), pi_N
    return np.sort(rng.choice(clients, size=per_round, replace=False)), pi_N


def stratified_sample(tiers: Sequence[str], per_round: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions of exactly K = `per_round` of N clients, ascending, each with probability K/N; of every tier its
    share, rounded down or up."""
    clients = len(tiers)
    names, tier_N = np.unique(tiers, return_inverse=True)
    order_N = rng.permutation(clients)
    order_N = order_N[np.argsort(rng.permutation(len(names))[tier_N[order_N]], kind="stable")]
    # Whole numbers: a client has length K, the teeth are N apart.
    teeth = int(rng.integers(clients)) + clients * np.arange(per_round)
    return np.sort(order_N[teeth // per_round])


def inclusion_probabilities(
    scores_E: NDArray[np.float64], *, budget: int, roots: int, floor: float
) -> NDArray[np.float64]:
    """h (E,) with sum `budget`: 1 for the roots and where the score is infinite, clip(c score, floor, 1) elsewhere.

    c is found by water-filling. Where no c reaches the budget (too few positive scores) the experts with
    score 0 share the rest equally; so scores that are all zero, like scores that are all equal, give the
    uniform h.

    Raises:
        InputError: a score that is negative or NaN, or no h within these bounds has sum `budget`.
    """
    num_experts = len(scores_E)
    if not bool((scores_E >= 0).all()):
        raise InputError(f"scores are {scores_E}: must be numbers, and not negative")
    certain_E = np.isinf(scores_E) | (np.arange(num_experts) < roots)
    certain = int(certain_E.sum())
    if not (0 <= roots <= certain <= budget <= num_experts):
        raise InputError(f"budget is {budget}: must be in {certain}..{num_experts} (certain experts..all experts)")
    if not (0 <= floor <= 1 and floor * (num_experts - certain) <= budget - certain + 1e-12):
        raise InputError(
            f"floor is {floor}: must be in 0..1, and {num_experts - certain} experts share {budget - certain} "
            "places beside the certain ones; lower the floor or raise the budget"
        )

    h_E = np.ones(num_experts)
    if budget == num_experts:
        return h_E
    # Scaled to a maximum of 1, so that sums of large scores stay finite.
    free, left = np.flatnonzero(~certain_E), float(budget - certain)
    scaled_E = np.zeros(num_experts)
    scaled_E[free] = scores_E[free] / max(float(scores_E[free].max()), np.finfo(np.float64).tiny)
    while free.size:
        total = scaled_E[free].sum()
        share = scaled_E[free] / total * left if total > 0 else np.full(free.size, left / free.size)
        above, below = np.maximum(share - 1, 0).sum(), np.maximum(floor - share, 0).sum()
        if above == below == 0:
            h_E[free] = share
            break
        # The sum is off by above - below when both sides are clipped: the larger side is clipped at the
        # solution too.
        bound, clipped = (1.0, share > 1) if above >= below else (floor, share < floor)
        h_E[free[clipped]] = bound
        left -= bound * np.count_nonzero(clipped)
        free = free[~clipped]
    # The last rounding error goes where it is relatively the smallest.
    largest = int(np.argmax(np.where(h_E < 1, h_E, 0)))
    h_E[largest] -= math.fsum([*h_E, -budget])
    return np.clip(h_E, floor, 1.0)


def sample_experts(h_E: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Expert ids, ascending, exactly sum(h) of them, each with probability h (to 2^-50); any two experts that are
    neither certain nor never held can meet if two places or more are free.

    Raises:
        InputError: an h outside [0, 1], or a sum that is not an integer.
    """
    total = float(h_E.sum())
    if not (0 <= h_E.min() and h_E.max() <= 1 and abs(total - round(total)) <= 1e-9):
        raise InputError(f"h is {h_E}: must be in [0, 1] with an integer sum")
    budget = round(total)
    grains_E = np.rint(h_E * _GRAIN).astype(np.int64)
    grains_E[np.argmin(np.abs(grains_E - _GRAIN // 2))] += budget * _GRAIN - int(grains_E.sum())
    certain, free = np.flatnonzero(grains_E == _GRAIN), np.flatnonzero((grains_E > 0) & (grains_E < _GRAIN))
    if not free.size:
        return certain
    places = budget - len(certain)
    order = rng.permutation(len(free))
    length = grains_E[free[order]]
    # lambda = n unit / _GRAIN of the module's docstring, rounded down.
    unit = int(min(length.min() // places, (_GRAIN - length.max()) // (len(free) - places)))
    start = int(rng.integers(_GRAIN)) - len(free) * unit
    if start < 0:
        hit = order[:places]
    else:
        teeth = start + (_GRAIN - len(free) * unit) * np.arange(places)
        hit = order[np.searchsorted(np.cumsum(length - places * unit), teeth, side="right")]
    return np.sort(np.concatenate([certain, free[hit]]))
