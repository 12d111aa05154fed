"""Balanced k-means: min ||W - Z C||_F^2 over 0/1 matrices Z with Z 1 = 1 and exactly m / E points a cluster.

With equal sizes that is the largest sum over clusters of ||s_e||^2, s_e the sum of the cluster's points. Lloyd's
iteration maximises a linear bound of it: every point p is worth s_e . p in cluster e, and who goes where is the
transport problem of m points and E clusters of capacity m / E (Bradley, Bennett and Demiriz, 2000).

A point is part of its own s_e, so it is drawn to where it is; in high dimensions, and with few points a cluster,
so strongly that Lloyd stops after a few steps. Taking shift * ||p||^2 off the worth of a point's own cluster changes
the objective by a constant, and lets points leave (the negative diagonal shift of kernel k-means: Dhillon, Guan and
Kulis, 2007). The shift falls from 1, where a point is judged as if it were nowhere, to 0, which never loses.

The transport problem is solved exactly: prices of the clusters come close to the optimum by Newton's steps on the
entropic dual at falling temperatures, every point takes the cluster that is cheapest for it, and what is too much
somewhere moves along successive shortest paths of the residual graph. That graph needs only E nodes: the edge i -> j
costs the least c_jp - c_ip of the points p in i.

Legend: m points (neurons), d features, E clusters, c candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sam_ds.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_SHIFTS = (1.0, 0.75, 0.5, 0.25, 0.0)
_TOLERANCE = 1e-5
"""A shift is done at a gain below this share of the variance."""
_SAMPLE = 8
"""Large problems start from the centers of one point in this many..."""
_SAMPLE_SIZE = 64
"""...if that leaves so many a cluster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clustering:
    """`labels_m` (m,) int64, `centers_Ed` (E, d) means of the clusters, `inertia` = ||W - Z C||_F^2, and the
    number of assignments of all points it took."""

    labels_m: Tensor
    centers_Ed: Tensor
    inertia: float
    iterations: int

    @property
    def sizes_E(self) -> Tensor:
        """(E,) points of each cluster: m / E."""
        return torch.bincount(self.labels_m, minlength=len(self.centers_Ed))


def balanced_kmeans(
    points_md: Tensor, clusters: int, *, seed: int = 0, max_iterations: int = 200, restarts: int = 1,
    centers_Ed: Tensor | None = None,
) -> Clustering:  # fmt: skip
    """Cluster (m, d) points into equal parts; the best of `restarts` starts, the first of them from `centers_Ed`
    (E, d) if given, the others from seeds drawn with `seed`. Points may lie on any device.

    Raises InputError for points that are not finite, centers of another shape, and where `clusters` does not divide m.
    """
    if points_md.ndim != 2 or points_md.numel() == 0:
        raise InputError(f"the points to cluster must be (m, d), and not empty, got {tuple(points_md.shape)}")
    check_divides(len(points_md), clusters)
    for name, value in (("max_iterations", max_iterations), ("restarts", restarts)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    expected = (clusters, points_md.shape[1])
    if centers_Ed is not None and centers_Ed.shape != expected:
        raise InputError(f"centers_Ed must be (E, d) = {expected}, got {tuple(centers_Ed.shape)}")
    points_md = points_md.detach()
    points_md = points_md if points_md.dtype == torch.float64 else points_md.float()
    square_m = torch.linalg.vector_norm(points_md, dim=1).square()
    if not_finite := int((~torch.isfinite(square_m)).sum()):
        raise InputError(f"{not_finite} points to cluster are not finite, or too large: check the checkpoint")
    generator = torch.Generator().manual_seed(seed)
    best: Clustering | None = None
    for _ in range(restarts):
        start_Ed = _start(points_md, square_m, clusters, generator) if centers_Ed is None else centers_Ed.to(points_md)
        found = _lloyd(points_md, square_m, start_Ed, max_iterations)
        best = found if best is None or found.inertia < best.inertia else best
        centers_Ed = None
    assert best is not None
    return best


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


def _start(points_md: Tensor, square_m: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """(E, d) centers to start from: k-means++ seeds, on large problems moved by clustering a sample first."""
    size = len(points_md) // clusters // _SAMPLE
    if size < _SAMPLE_SIZE:
        return points_md[_plus_plus(points_md, square_m, clusters, generator)]
    sample = torch.randperm(len(points_md), generator=generator)[: size * clusters].to(points_md.device)
    points_md, square_m = points_md[sample], square_m[sample]
    seeds_Ed = points_md[_plus_plus(points_md, square_m, clusters, generator)]
    return _lloyd(points_md, square_m, seeds_Ed, max_iterations=50).centers_Ed


def _plus_plus(points_md: Tensor, square_m: Tensor, clusters: int, generator: torch.Generator) -> list[int]:
    """E points, each the best of a few drawn with probability proportional to the squared distance to the nearest one
    so far (greedy k-means++: Arthur and Vassilvitskii, 2007)."""
    candidates = 2 + int(math.log(clusters))
    chosen: list[int] = []
    drawn_c = torch.randint(len(points_md), (1,), generator=generator)
    nearest_m = torch.full((len(points_md),), math.inf, dtype=torch.float64)
    while True:
        drawn = drawn_c.to(points_md.device)
        distance_cm = square_m[drawn, None] + square_m - 2 * points_md[drawn] @ points_md.t()
        nearest_cm = torch.minimum(nearest_m, distance_cm.clamp(min=0).cpu().double())
        best = int(nearest_cm.sum(1).argmin())
        nearest_m = nearest_cm[best]
        chosen.append(int(drawn_c[best]))
        if len(chosen) == clusters:
            return chosen
        cumulative_m = nearest_m.cumsum(0)
        draw_c = torch.rand(candidates, generator=generator, dtype=torch.float64) * cumulative_m[-1]
        drawn_c = torch.searchsorted(cumulative_m, draw_c, right=True).clamp(max=len(points_md) - 1)


def _lloyd(points_md: Tensor, square_m: Tensor, centers_Ed: Tensor, max_iterations: int) -> Clustering:
    points, clusters = len(points_md), len(centers_Ed)
    size = points // clusters

    def assign(to_Ed: Tensor, own_m: FloatArray | None = None) -> IntArray:
        # ||w||^2 and ||c||^2 are left out: with equal sizes they add the same to every assignment.
        cost_mE = points_md @ -to_Ed.t()
        cost_Em = cost_mE.cpu().numpy().T.astype(np.float64, order="C")
        if own_m is not None:
            cost_Em[labels_m, np.arange(points)] += own_m
        return balanced_assignment(cost_Em)

    def member(labels_m: IntArray) -> Tensor:
        # A product with it, not index_add: the same sum in the same order on every run, on CUDA too.
        return F.one_hot(torch.from_numpy(labels_m).to(points_md.device), clusters).to(points_md.dtype).t()

    def score(sum_Ed: Tensor) -> float:
        return float(torch.linalg.vector_norm(sum_Ed, dtype=torch.float64)) ** 2 / size

    labels_m = assign(centers_Ed - centers_Ed.mean(0))
    sum_Ed = member(labels_m) @ points_md
    mean_d = sum_Ed.mean(0) / size
    # Around the mean, once for all: a part common to all points moves none of them, and a move keeps the mean.
    sum_Ed -= size * mean_d
    best, iterations = score(sum_Ed), 1
    spread_m = (square_m - points_md @ (2 * mean_d) + mean_d.square().sum()).clamp(min=0).double().cpu().numpy()
    variance = float(spread_m.sum())
    moved_m = np.arange(points)
    for shift in _SHIFTS:
        while iterations < max_iterations:
            next_m = assign(sum_Ed, shift * spread_m)
            iterations += 1
            moved_m = np.flatnonzero(next_m != labels_m)
            moved_md = points_md[torch.from_numpy(moved_m).to(points_md.device)]
            next_Ed = sum_Ed + (member(next_m[moved_m]) - member(labels_m[moved_m])) @ moved_md
            gain = score(next_Ed) - best
            if gain > 0:
                labels_m, sum_Ed, best = next_m, next_Ed, best + gain
            if gain <= _TOLERANCE * variance:
                break
        # Where no point wants to leave at this shift, none does at a smaller one.
        if len(moved_m) == 0:
            break
    return Clustering(
        labels_m=torch.from_numpy(labels_m).to(points_md.device), centers_Ed=member(labels_m) @ points_md / size,
        inertia=max(0.0, variance - best), iterations=iterations,
    )  # fmt: skip


def balanced_assignment(cost_Em: FloatArray) -> IntArray:
    """(m,) labels of least total cost with m / E points in each cluster: exact to rounding.

    Invariant of the second half: with the prices, every point sits where cost + price is least, so the
    assignment is optimal for the sizes it has; the last path makes these sizes m / E.
    """
    clusters, size = cost_Em.shape[0], cost_Em.shape[1] // cost_Em.shape[0]
    price_E = _start_prices(cost_Em)
    labels_m: IntArray = np.argmin(cost_Em + price_E[:, None], axis=0)
    count_E = np.bincount(labels_m, minlength=clusters)
    # least_EE[i, j]: the least c_jp - c_ip of the points p in i, and that point.
    least_EE = np.full((clusters, clusters), np.inf)
    point_EE = np.zeros((clusters, clusters), dtype=np.int64)

    def refresh(i: int) -> None:
        members = np.flatnonzero(labels_m == i)
        if len(members) == 0:
            least_EE[i] = np.inf
            return
        change = cost_Em[:, members] - cost_Em[i, members]
        cheapest_E = change.argmin(axis=1)
        least_EE[i] = change[np.arange(clusters), cheapest_E]
        point_EE[i] = members[cheapest_E]

    if (count_E > size).any():
        for i in range(clusters):
            refresh(i)
    while (count_E > size).any():
        # The prices keep lengths at 0 or more, but for rounding.
        length_EE = np.maximum(least_EE + price_E - price_E[:, None], 0.0)
        distance_E, before_E = _shortest(length_EE, np.where(count_E > size, 0.0, np.inf))
        node = int(np.where(count_E < size, distance_E, np.inf).argmin())
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


def _shortest(length_EE: FloatArray, distance_E: FloatArray) -> tuple[FloatArray, IntArray]:
    """Distances of all clusters from those at distance 0 and the cluster before each, by Bellman and Ford's rounds:
    a few of them, each one numpy sweep, are faster than Dijkstra's E steps."""
    before_E = np.full(len(distance_E), -1, dtype=np.int64)
    while True:
        through_EE = distance_E[:, None] + length_EE
        via_E = through_EE.argmin(axis=0)
        next_E = through_EE[via_E, np.arange(len(via_E))]
        shorter_E = next_E < distance_E
        if not shorter_E.any():
            return distance_E, before_E
        distance_E = np.where(shorter_E, next_E, distance_E)
        before_E = np.where(shorter_E, via_E, before_E)


def _start_prices(cost_Em: FloatArray) -> FloatArray:
    """(E,) dual prices of the entropic transport problem at falling temperatures: close to the exact ones."""
    clusters, points = cost_Em.shape
    size = points / clusters
    relative_Em = cost_Em - cost_Em.mean(axis=0)
    spread = float(np.sqrt(np.square(relative_Em).mean()))
    price_E = np.zeros(clusters)
    if spread == 0.0:
        return price_E
    # numpy, not torch: arrays this small are done before a second thread has started.
    relative_Em = (relative_Em / spread).astype(np.float32)
    for temperature in 0.5 ** np.arange(11.0):
        for _ in range(4):
            share_Em = relative_Em + price_E[:, None].astype(np.float32)
            share_Em *= np.float32(-1 / temperature)
            share_Em -= share_Em.max(axis=0)
            share_Em = np.exp(share_Em, out=share_Em)
            share_Em /= share_Em.sum(axis=0)
            count_E = share_Em.sum(axis=1, dtype=np.float64)
            # Where a cluster has no share the Hessian has no slope, and prices are known but for a constant.
            hessian_EE = np.diag(count_E + 1e-3 * size) - share_Em @ share_Em.T + size
            step_E = temperature * np.linalg.solve(hessian_EE, count_E - size)
            price_E += step_E * min(1.0, 2 * temperature / max(np.abs(step_E).max(), 1e-30))
            if np.abs(count_E - size).max() < 0.05 * size:
                break
    return price_E * spread
