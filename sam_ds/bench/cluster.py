"""Balanced k-means of an FFN's neurons against `k-means-constrained`: seconds and inertia.

Both get the same fp32 rows and one start a round, with the seed of the round; the peer runs with its defaults.
Inertia is computed here from the labels of each: sum over points of ||w - mean of its cluster||^2.

Legend: m points (neurons), d features, E clusters, G groups, q factors.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.bench.timing import interleave, rows
from sam_ds.discovery.features import weight_features
from sam_ds.discovery.kmeans import balanced_kmeans, check_divides
from sam_ds.errors import InputError

PEER = "k-means-constrained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--m", type=int, default=11008, help="synthetic neurons")
    parser.add_argument("--d", type=int, default=4096, help="features of a synthetic neuron")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--groups", type=int, default=16, help="planted among the synthetic neurons")
    parser.add_argument("--model", help="folder or hub id: cluster its own neurons, layer by layer, instead")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a call on a set of points. Ratios: the middle one over the sets, and the worst inertia of all rounds."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise InputError(f"{PEER} is not installed: pip install {PEER}") from error
    check_sizes(options, "m", "d", "groups", "experts")
    if options.model is None:
        check_divides(options.m, options.experts)
        sets = {"synthetic": synthetic_rows(options.m, options.d, groups=options.groups, seed=options.seed)}
    else:
        sets = _rows_of(options.model)
    table, ratios = [], []
    for title, points_md in sets.items():
        check_divides(len(points_md), options.experts)
        size, points = len(points_md) // options.experts, points_md.numpy()

        def ours(number: int, points_md: Tensor = points_md) -> tuple[Tensor, int]:
            found = balanced_kmeans(points_md, options.experts, seed=options.seed + number + 1)
            return found.labels_m, found.iterations

        def peer(number: int, points: Any = points, size: int = size) -> tuple[Tensor, int]:
            found = KMeansConstrained(
                options.experts, size_min=size, size_max=size, n_init=1, random_state=options.seed + number + 1
            ).fit(points)
            return torch.from_numpy(found.labels_).long(), int(found.n_iter_)

        timed = interleave({"sam_ds": ours, PEER: peer}, rounds=options.rounds)
        inertia = {
            name: [_inertia(points_md, labels_m, options.experts) for labels_m, _ in own.returned]
            for name, own in timed.items()
        }
        for row in rows(timed, PEER):
            name = row["call"]
            table.append({
                "points": title, **row, "inertia": float(np.median(inertia[name])),
                "iterations": float(np.median([iterations for _, iterations in timed[name].returned])),
            })  # fmt: skip
        middle = {name: float(np.median(values)) for name, values in inertia.items()}
        ratios.append((
            timed["sam_ds"].median / timed[PEER].median, middle["sam_ds"] / middle[PEER],
            max(inertia["sam_ds"]) / min(inertia[PEER]),
        ))  # fmt: skip
    seconds, inertias, worst = zip(*ratios, strict=True)
    return {"rows": table, "ratios": {
        "time": float(np.median(seconds)), "inertia": float(np.median(inertias)), "largest_inertia": max(inertias),
        "our_worst_over_their_best": max(worst),
    }}  # fmt: skip


def synthetic_rows(m: int, d: int, *, groups: int, seed: int) -> Tensor:
    """(m, d) unit rows with the variance of trained gate rows shared out, in expectation, as

    7 % a direction common to all, 25 % one of `groups` directions, drawn uniformly; 30 % 256 factors whose standard
    deviation falls with the square root of their rank; 38 % white noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    group_m = torch.randint(groups, (m,), generator=generator)
    scale_q = torch.arange(1, min(256, d) + 1).rsqrt()
    scale_q *= math.sqrt(0.30) / scale_q.norm()
    points_md = (normal(m, len(scale_q)) * scale_q) @ normal(len(scale_q), d)
    points_md += math.sqrt(0.07) * normal(d) + math.sqrt(0.25) * normal(groups, d)[group_m]
    return F.normalize(points_md + math.sqrt(0.38) * normal(m, d), dim=1)


def _rows_of(model: str) -> dict[str, Tensor]:
    """The normalised gate (or first) projection of every FFN."""
    from transformers import AutoModelForCausalLM

    from sam_ds.experts.checkpoint import readable
    from sam_ds.experts.surgery import find_ffns, matrix

    with readable(model):
        found = find_ffns(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    inner = {ffn.path: ffn.module.get_submodule(ffn.gate or ffn.up) for ffn in found}
    return {path: weight_features(matrix(linear).detach().t().float()) for path, linear in inner.items()}


def _inertia(points_md: Tensor, labels_m: Tensor, clusters: int) -> float:
    members = [points_md[labels_m == label].double() for label in range(clusters)]
    return sum(float((own - own.mean(0)).square().sum()) for own in members)
