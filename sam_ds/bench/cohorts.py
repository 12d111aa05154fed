"""How many clients of a round send the same expert, and what masks that hide each of them would cost.

Pairwise masks (Bonawitz et al., CCS 2017) hide an update in the sum of those who add to the same values, its cohort. A
mask fills its whole support, and a client that sends an expert alone has none to hide in. So either every client sends
all experts, those that it lacks as masks alone ("dense": what it sends and, in lockstep, computes masks for grows), or
each expert has a cohort of its own: those that the plan makes send it, which the server knows anyway.

A row is a federation and a tier table, by the sampler in use with scores at random: `alone` is the share of (client,
expert) pairs whose cohort is one client, `few` of those with a cohort below `--least`, `median` and `smallest` are of
the same cohorts, roots left out, which all send. `dense` is the bytes of all experts over those sent. A masked value is
a whole number modulo a power of two, 32 bits as a raw one: masks alone cost nothing over raw values, but 4 and 8 times
those of int8 and int4, and what zeros save. `keys` is how many other clients a client shares an expert with.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.federation.participation import Member, plan_round

TIERS = {"12/16/16": (12, 16, 16), "6/10/16": (6, 10, 16), "4/4/4": (4, 4, 4)}
"""Experts of a tier's clients: those of `examples/benchmark.toml` and of its narrow setting, and a quarter for all."""
SHARES = (0.25, 0.375, 0.375)
CASES = ((16, 4), (50, 8), (10_000, 200))
_EXPERTS, _ROOTS = 16, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--least", type=int, default=5, help="clients below which a cohort is too small")
    parser.add_argument("--floor", type=float, default=0.1, help="least inclusion probability of an expert")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row a case. Ratios: its share of pairs whose cohort is too small."""
    check_sizes(options, "layers", "least", "rounds")
    rows = [_case(clients, drawn, name, options) for clients, drawn in CASES for name in TIERS]
    return {"rows": rows, "ratios": {f"{row['clients']}/{row['drawn']} {row['tiers']}": row["few"] for row in rows}}


def _case(clients: int, drawn: int, name: str, options: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    budgets = {f"tier {number}": [size] * options.layers for number, size in enumerate(TIERS[name])}
    tiers = rng.choice(list(budgets), size=clients, p=SHARES)
    population = [Member(client, str(tier), 1) for client, tier in enumerate(tiers)]
    # Text makes some experts likelier than others, for each client others.
    scores = {client: rng.dirichlet(np.full(_EXPERTS, 0.5), options.layers) for client in range(clients)}
    cohorts, dense, keys = [], [], []
    for round_ in range(options.rounds):
        plan = plan_round(
            options.seed, round_, population, budgets, layers=options.layers, num_experts=_EXPERTS, roots=_ROOTS,
            per_round=drawn, floor=options.floor, scores=scores,
        )  # fmt: skip
        sent_KLE = np.zeros((drawn, options.layers, _EXPERTS), dtype=bool)
        for row, client in enumerate(plan.clients):
            for layer, experts in enumerate(client.sent):
                sent_KLE[row, layer, list(experts)] = True
        free_KLE = sent_KLE[..., _ROOTS:]
        size_LE = free_KLE.sum(0)
        cohorts += np.broadcast_to(size_LE, free_KLE.shape)[free_KLE].tolist()
        dense.append(sent_KLE.size / sent_KLE.sum())
        together_KK = np.einsum("ale,ble->ab", free_KLE.astype(int), free_KLE.astype(int)) > 0
        keys.append(float(together_KK.sum(1).mean() - 1))
    sizes = np.array(cohorts)
    return {
        "clients": clients, "drawn": drawn, "tiers": name, "alone": float((sizes == 1).mean()),
        "few": float((sizes < options.least).mean()), "median": float(np.median(sizes)), "smallest": int(sizes.min()),
        "dense": float(np.mean(dense)), "keys": float(np.mean(keys)),
    }  # fmt: skip
