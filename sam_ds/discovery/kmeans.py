"""Balanced k-means: min ||W - Z C||_F^2 over 0/1 matrices Z with Z 1 = 1 and exactly m / E points a cluster.

Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii, 2007), where the assignment step is the
transport problem of m points and E clusters of capacity m / E (Bradley, Bennett and Demiriz, 2000). It is
solved exactly: prices of the clusters are brought close to the optimum by annealed Sinkhorn steps, every
point takes the cluster that is cheapest for it, and what is too much somewhere moves along successive
shortest paths of the residual graph. That graph needs only E nodes: the edge i -> j costs the least c_pj -
c_pi of the points p in i.

Legend: m points (neurons), d features, E clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_ds.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TOLERANCE = 1e-6
"""Lloyd stops at a gain below this share of ||W||_F^2; fp32 does not resolve much less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clustering:
    """`labels_m` (m,) int64, `centers_Ed` (E, d) means of the clusters, `inertia` = ||W - Z C||_F^2, and the
    number of Lloyd iterations it took."""

    labels_m: Tensor
    centers_Ed: Tensor
    inertia: float
    iterations: int


def balanced_kmeans(
    points_md: Tensor, clusters: int, *, seed: int = 0, max_iterations: int = 100, restarts: int = 1
) -> Clustering:
    """Cluster (m, d) points into equal parts; the best of `restarts` starts. Points may lie on any device.

    Raises InputError for points that are not finite and where `clusters` does not divide m.
    """
    if points_md.ndim != 2 or points_md.numel() == 0:
        raise InputError(f"the points to cluster must be (m, d), and not empty, got {tuple(points_md.shape)}")
    if not_finite := int((~torch.isfinite(points_md)).sum()):
        raise InputError(f"{not_finite} values of the points to cluster are not finite: check the checkpoint")
    check_divides(len(points_md), clusters)
    for name, value in (("max_iterations", max_iterations), ("restarts", restarts)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    points_md = points_md.detach()
    points_md = points_md if points_md.dtype == torch.float64 else points_md.float()
    generator = torch.Generator().manual_seed(seed)
    found = [
        _lloyd(points_md, _plus_plus(points_md, clusters, generator), max_iterations) for _ in range(restarts)
    ]
    return min(found, key=lambda clustering: clustering.inertia)


def permutation(labels_m: Tensor) -> Tensor:
    """(m,) the order of the points that makes clusters contiguous and keeps the order inside each."""
    return torch.argsort(labels_m, stable=True)


def check_divides(points: int, clusters: int) -> None:
    """Raise InputError, naming the nearest divisors, unless the points split into `clusters` equal parts."""
    if clusters >= 1 and points % clusters == 0:
        return
    divisors = [n for n in range(1, points + 1) if points % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - clusters))[:4])
    raise InputError(
        f"{points} points (neurons) do not split into {clusters} equal clusters: use one of "
        f"{', '.join(map(str, near))}"
    )


def _plus_plus(points_md: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """(E, d) points drawn with probability proportional to the squared distance to the nearest one so far."""
    chosen = [int(torch.randint(len(points_md), (1,), generator=generator))]
    nearest_m = torch.full((len(points_md),), math.inf, dtype=torch.float64)
    while len(chosen) < clusters:
        distance_m = (points_md - points_md[chosen[-1]]).square().sum(1)
        nearest_m = torch.minimum(nearest_m, distance_m.cpu().double())
        cumulative_m = nearest_m.cumsum(0)
        draw = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative_m[-1]
        chosen.append(min(int(torch.searchsorted(cumulative_m, draw, right=True)), len(points_md) - 1))
    return points_md[chosen]


def _lloyd(points_md: Tensor, centers_Ed: Tensor, max_iterations: int) -> Clustering:
    clusters, size = len(centers_Ed), len(points_md) // len(centers_Ed)
    norm = float(points_md.square().sum(dtype=torch.float64))
    best: Clustering | None = None
    for iteration in range(1, max_iterations + 1):
        # ||w||^2 is left out: it is the same for every cluster.
        cost_mE = centers_Ed.square().sum(1) - 2 * points_md @ centers_Ed.t()
        labels_m = torch.from_numpy(balanced_assignment(cost_mE.double().cpu().numpy())).to(points_md.device)
        # A product, not index_add: the same sum in the same order on every run, on CUDA too.
        member_mE = torch.nn.functional.one_hot(labels_m, clusters).to(points_md.dtype)
        centers_Ed = member_mE.t() @ points_md / size
        inertia = max(0.0, norm - size * float(centers_Ed.square().sum(dtype=torch.float64)))
        if best is not None and inertia >= best.inertia - _TOLERANCE * norm:
            break
        best = Clustering(labels_m=labels_m, centers_Ed=centers_Ed, inertia=inertia, iterations=iteration)
    assert best is not None
    return best


def balanced_assignment(cost_mE: FloatArray) -> IntArray:
    """(m,) labels of least total cost with m / E points in each cluster: exact to rounding.

    Invariant of the second half: with the prices, every point sits where cost + price is least, so the
    assignment is optimal for the sizes it has; the last path makes these sizes m / E.
    """
    clusters, size = cost_mE.shape[1], cost_mE.shape[0] // cost_mE.shape[1]
    price_E = _start_prices(cost_mE)
    labels_m: IntArray = np.argmin(cost_mE + price_E, axis=1)
    count_E = np.bincount(labels_m, minlength=clusters)
    # least_EE[i, j]: the least c_pj - c_pi of the points p in i, and that point.
    least_EE = np.full((clusters, clusters), np.inf)
    point_EE = np.zeros((clusters, clusters), dtype=np.int64)

    def refresh(i: int) -> None:
        members = np.flatnonzero(labels_m == i)
        if len(members) == 0:
            least_EE[i] = np.inf
            return
        change = cost_mE[members] - cost_mE[members, i, None]
        cheapest_E = change.argmin(axis=0)
        least_EE[i] = change[cheapest_E, np.arange(clusters)]
        point_EE[i] = members[cheapest_E]

    for i in range(clusters):
        refresh(i)
    while (count_E > size).any():
        node, distance_E, before_E = _nearest_gap(least_EE + price_E - price_E[:, None], count_E, size)
        price_E += distance_E[node] - np.minimum(distance_E, distance_E[node])
        count_E[node] += 1
        path = [node]
        while before_E[path[-1]] >= 0:
            path.append(int(before_E[path[-1]]))
        for j, i in zip(path, path[1:], strict=False):
            labels_m[point_EE[i, j]] = j
        count_E[path[-1]] -= 1
        for i in path:
            refresh(i)
    return labels_m


def _nearest_gap(length_EE: FloatArray, count_E: IntArray, size: int) -> tuple[int, FloatArray, IntArray]:
    """Dijkstra from all clusters with too many points to the nearest with too few, and how it is reached."""
    clusters = len(count_E)
    # The prices keep lengths at 0 or more, but for rounding.
    length_EE = np.maximum(length_EE, 0.0)
    distance_E: FloatArray = np.where(count_E > size, 0.0, np.inf)
    before_E = np.full(clusters, -1, dtype=np.int64)
    open_E = np.ones(clusters, dtype=np.bool_)
    while True:
        node = int(np.argmin(np.where(open_E, distance_E, np.inf)))
        if count_E[node] < size:
            return node, distance_E, before_E
        open_E[node] = False
        shorter_E = open_E & (distance_E[node] + length_EE[node] < distance_E)
        distance_E[shorter_E] = distance_E[node] + length_EE[node, shorter_E]
        before_E[shorter_E] = node


def _start_prices(cost_mE: FloatArray) -> FloatArray:
    """(E,) dual prices of the entropic transport problem at falling temperatures: close to the exact ones."""
    points, clusters = cost_mE.shape
    relative_mE = torch.from_numpy(cost_mE - cost_mE.mean(axis=1, keepdims=True))
    spread = float(relative_mE.square().mean().sqrt())
    price_E = torch.zeros(clusters, dtype=torch.float32)
    if spread > 0.0:
        relative_mE = (relative_mE / spread).float()
        for temperature in 0.5 ** np.arange(0.0, 8.0, 0.5):
            share_mE = torch.log_softmax(-(relative_mE + price_E) / temperature, dim=1)
            price_E += temperature * (share_mE.logsumexp(0) - math.log(points / clusters))
    return price_E.double().numpy() * spread
