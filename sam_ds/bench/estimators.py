"""Bias, variance and mean squared error of the four aggregation rules, summed exactly over every outcome of both draws.

A small case is drawn from the seed: 4 clients of unequal size, 2 of them a round; each then holds some of 4 experts,
by the sampler in use, with unequal known probabilities. What a client answers depends on everything it holds. The
target is what `ht` promises, sum_i w_i E[delta_i(S) | e in S]; an expert that nobody sent counts as an update of zero.

Every figure is over the squared length of the target and the mean of `--rounds` cases. Legend: E experts.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.bench.options import add_rounds, add_seed
from sam_ds.errors import InputError
from sam_ds.federation.aggregation import RULES, AggregationConfig, Aggregator
from sam_ds.federation.participation import sample_experts

CLIENTS, DRAWN, EXPERTS, WIDTH = 4, 2, 4, 3
GRAINS = 8
"""h and the sampler's lambda are such multiples of 1 / GRAINS that as many starts of the comb are all that differ."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clip", type=float, default=4.0, help="largest 1/p of `clipped`")
    parser.add_argument("--spread", type=float, default=0.5, help="of the answers about their common mean of 1")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row a rule. Ratios: its mean squared error over that of `ht`."""
    if not options.spread >= 0:
        raise InputError(f"--spread must not be negative, got {options.spread}")
    cases = [_case(options.seed + number, options) for number in range(options.rounds)]
    table = {rule: np.mean([case[rule] for case in cases], axis=0) for rule in RULES}
    rows: list[dict[str, Any]] = [
        {"rule": rule, "bias2": float(bias), "variance": float(variance), "mse": float(bias + variance)}
        for rule, (bias, variance) in table.items()
    ]
    return {"rows": rows, "ratios": {row["rule"]: row["mse"] / rows[0]["mse"] for row in rows}}


def _case(seed: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Rule -> squared bias and variance, summed over experts and coordinates, over the squared target."""
    rng = np.random.default_rng(seed)
    examples_N = rng.integers(1, 40, CLIENTS).astype(float)
    designs = [_design(rng) for _ in range(CLIENTS)]

    def delta(client: int, expert: int, subset: tuple[int, ...]) -> NDArray[np.float64]:
        return 1.0 + options.spread * np.random.default_rng([seed, client, expert, *subset]).normal(size=WIDTH)

    target = np.zeros((EXPERTS, WIDTH))
    for client, (h_E, subsets) in enumerate(designs):
        for subset, chance in subsets.items():
            for expert in subset:
                share = examples_N[client] / examples_N.sum()
                target[expert] += share * chance / h_E[expert] * delta(client, expert, subset)
    found = {}
    for rule in RULES:
        config = AggregationConfig(rule=rule, clip=options.clip)
        mean, square = np.zeros((EXPERTS, WIDTH)), 0.0
        for chance, held in _outcomes(designs):
            fold: Aggregator[int] = Aggregator(config, total_weight=examples_N.sum())
            for client, subset in held.items():
                p_E = DRAWN / CLIENTS * designs[client][0]
                fold.add(
                    {expert: delta(client, expert, subset) for expert in subset}, weight=examples_N[client],
                    probability=p_E.__getitem__,
                )  # fmt: skip
            update = np.zeros((EXPERTS, WIDTH))
            for expert, value in fold.result().deltas.items():
                update[expert] = value
            mean += chance * update
            square += chance * float((update**2).sum())
        scale = float((target**2).sum())
        found[rule] = float(((mean - target) ** 2).sum()) / scale, (square - float((mean**2).sum())) / scale
    return found


def _design(rng: np.random.Generator) -> tuple[NDArray[np.float64], dict[tuple[int, ...], float]]:
    """h (E,), one root and others that differ, and subset -> probability under `sample_experts`."""
    others = ((1, 2, 5), (3, 6, 7))[int(rng.integers(2))]
    h_E = np.array([GRAINS, *rng.permutation(others)]) / GRAINS
    chances: dict[tuple[int, ...], float] = {}
    permutations = list(itertools.permutations(range(EXPERTS - 1)))
    for permutation, start in itertools.product(permutations, range(GRAINS)):
        subset = tuple(sample_experts(h_E, _Scripted(permutation, start)).tolist())  # type: ignore[arg-type]
        chances[subset] = chances.get(subset, 0.0) + 1 / (len(permutations) * GRAINS)
    return h_E, chances


class _Scripted:
    """In a generator's place: gives the permutation and the start it is told."""

    def __init__(self, permutation: tuple[int, ...], start: int) -> None:
        self._permutation, self._start = permutation, start

    def permutation(self, size: int) -> NDArray[np.int64]:
        return np.array(self._permutation)

    def integers(self, high: int) -> int:
        return self._start * high // GRAINS


def _outcomes(designs: list[Any]) -> Iterator[tuple[float, dict[int, tuple[int, ...]]]]:
    """(probability, client -> subset) of every outcome."""
    pairs = list(itertools.combinations(range(CLIENTS), DRAWN))
    for drawn in pairs:
        for held in itertools.product(*(designs[client][1].items() for client in drawn)):
            chance = float(np.prod([probability for _, probability in held])) / len(pairs)
            yield chance, {client: subset for client, (subset, _) in zip(drawn, held, strict=True)}
