"""Features, and balanced k-means: an exact assignment, exact sizes, no step backwards, one answer a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import inertia, transport_cost

from sam_ds.discovery import kmeans
from sam_ds.discovery.features import activation_features, order_by_usage, output_features, weight_features
from sam_ds.discovery.kmeans import balanced_assignment, balanced_kmeans, permutation
from sam_ds.errors import InputError


@given(
    clusters=st.integers(1, 7), size=st.integers(1, 9), seed=st.integers(0, 10_000),
    skew=st.sampled_from([0.0, 1.0, 50.0]), levels=st.sampled_from([0, 2, 5]),
)  # fmt: skip
def test_assignment_is_optimal(clusters: int, size: int, seed: int, skew: float, levels: int) -> None:
    """Against scipy; `skew` makes one cluster everybody's favourite, `levels` makes ties."""
    rng = np.random.default_rng(seed)
    cost_mE = rng.normal(size=(clusters * size, clusters)) + skew * rng.normal(size=(1, clusters))
    if levels:
        cost_mE = rng.integers(0, levels, cost_mE.shape).astype(np.float64)
    labels_m = balanced_assignment(np.ascontiguousarray(cost_mE.T))
    assert np.bincount(labels_m, minlength=clusters).tolist() == [size] * clusters
    assert cost_mE[np.arange(len(labels_m)), labels_m].sum() == pytest.approx(
        transport_cost(cost_mE), abs=1e-9
    )


def test_assignment_is_optimal_at_size() -> None:
    cost_mE = np.random.default_rng(0).normal(size=(480, 16)) * np.linspace(0.1, 3, 16)
    labels_m = balanced_assignment(np.ascontiguousarray(cost_mE.T))
    assert cost_mE[np.arange(480), labels_m].sum() == pytest.approx(transport_cost(cost_mE), abs=1e-9)


def _points(
    groups: int = 6, size: int = 20, noise: float = 0.1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth_m = torch.arange(groups).repeat(size)
    centers = torch.randn(groups, 8, generator=generator)
    return centers[truth_m] + noise * torch.randn(groups * size, 8, generator=generator), truth_m


def test_kmeans_finds_groups_of_equal_size() -> None:
    points_md, truth_m = _points()
    found = balanced_kmeans(points_md, 6, restarts=5)
    assert len({(a, b) for a, b in zip(truth_m.tolist(), found.labels_m.tolist(), strict=True)}) == 6
    assert found.labels_m.dtype == torch.int64
    for label in range(6):
        torch.testing.assert_close(found.centers_Ed[label], points_md[found.labels_m == label].mean(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sizes_are_exact_and_inertia_is_that_of_the_formula(dtype: torch.dtype) -> None:
    points_md = _points(groups=5, size=16, noise=2.0)[0].to(dtype)
    found = balanced_kmeans(points_md, 8)
    assert torch.bincount(found.labels_m).tolist() == [10] * 8
    assert found.inertia == pytest.approx(inertia(points_md.double(), found.labels_m), rel=1e-5)


def test_inertia_never_rises_and_restarts_help() -> None:
    points_md = _points(noise=3.0)[0]
    steps = [balanced_kmeans(points_md, 6, max_iterations=n).inertia for n in range(1, 12)]
    assert all(later <= earlier for earlier, later in zip(steps, steps[1:], strict=False))
    assert steps[-1] < steps[0]
    starts = [balanced_kmeans(points_md, 6, restarts=n).inertia for n in (1, 4, 8)]
    assert starts == sorted(starts, reverse=True) and starts[-1] < starts[0]


def test_no_swap_of_two_points_helps() -> None:
    """At a fixed point of Lloyd's iteration no exchange of two points lowers the cost to the centres."""
    points_md = _points(groups=4, size=10, noise=2.0)[0].double()
    found = balanced_kmeans(points_md, 4)
    cost_mE = torch.cdist(points_md, found.centers_Ed).square()
    own_m = cost_mE.gather(1, found.labels_m[:, None])
    other_mm = cost_mE[:, found.labels_m]  # [p, q]: p in the place of q
    gain_mm = own_m + own_m.t() - other_mm - other_mm.t()
    assert gain_mm.max() <= 1e-4 * float(points_md.square().sum())


def test_the_shift_finds_better_clusters_than_plain_lloyd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few points a cluster in many dimensions: each is so much of its own center that Lloyd hardly moves."""
    points_md = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    shifted = [balanced_kmeans(points_md, 16, seed=seed).inertia for seed in range(3)]
    monkeypatch.setattr(kmeans, "_SHIFTS", (0.0,))
    plain = [balanced_kmeans(points_md, 16, seed=seed).inertia for seed in range(3)]
    assert max(shifted) < 0.98 * min(plain)


def test_a_warm_start_does_not_lose_and_is_short() -> None:
    points_md = _points(groups=8, size=40, noise=2.0)[0]
    found = balanced_kmeans(points_md, 8, seed=1)
    again = balanced_kmeans(points_md, 8, centers_Ed=found.centers_Ed)
    assert again.inertia <= found.inertia * (1 + 1e-6) and again.iterations < found.iterations
    assert found.sizes_E.tolist() == [40] * 8


def test_large_problems_start_from_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    points_md = _points(groups=4, size=512, noise=1.0)[0]
    sampled = balanced_kmeans(points_md, 4)
    monkeypatch.setattr(kmeans, "_SAMPLE_SIZE", len(points_md))
    whole = balanced_kmeans(points_md, 4)
    assert sampled.inertia == pytest.approx(whole.inertia, rel=1e-2) and sampled.sizes_E.tolist() == [512] * 4


@pytest.mark.gpu
def test_clusters_on_cuda_are_as_good() -> None:
    points_md = _points(noise=2.0)[0]
    found = balanced_kmeans(points_md.cuda(), 6)
    assert found.labels_m.is_cuda and found.sizes_E.tolist() == [20] * 6
    assert found.inertia == pytest.approx(balanced_kmeans(points_md, 6).inertia, rel=1e-2)


def test_the_same_seed_gives_the_same_clusters_whatever_the_global_state() -> None:
    points_md = _points(noise=3.0)[0]
    first = balanced_kmeans(points_md, 6, seed=3)
    torch.manual_seed(99)
    again, other = balanced_kmeans(points_md, 6, seed=3), balanced_kmeans(points_md, 6, seed=4)
    assert torch.equal(first.labels_m, again.labels_m) and first.inertia == again.inertia
    assert not torch.equal(first.labels_m, other.labels_m)


def test_equal_points_and_as_many_clusters_as_points() -> None:
    assert torch.bincount(balanced_kmeans(torch.ones(12, 3), 4).labels_m).tolist() == [3] * 4
    found = balanced_kmeans(torch.eye(5), 5)
    assert sorted(found.labels_m.tolist()) == list(range(5)) and found.inertia == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("points_md", "clusters", "message"), [
    (torch.ones(64, 2), 10, "64 points .* 10 .* 4, 8, 16"),
    (torch.ones(64, 2), 0, "use one of 1, 2"),
    (torch.tensor([[1.0], [float("nan")]]), 2, "1 points .* not finite"),
    (torch.ones(4), 2, r"\(m, d\)"),
])  # fmt: skip
def test_bad_input_is_refused(points_md: torch.Tensor, clusters: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        balanced_kmeans(points_md, clusters)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(InputError, match="restarts must be at least 1"):
        balanced_kmeans(torch.ones(4, 2), 2, restarts=0)
    with pytest.raises(InputError, match="max_iterations"):
        balanced_kmeans(torch.ones(4, 2), 2, max_iterations=0)
    with pytest.raises(InputError, match=r"centers_Ed must be .* \(2, 2\), got \(3, 2\)"):
        balanced_kmeans(torch.ones(4, 2), 2, centers_Ed=torch.ones(3, 2))


def test_permutation_is_stable() -> None:
    assert permutation(torch.tensor([1, 0, 1, 2, 0])).tolist() == [1, 4, 0, 2, 3]


def test_order_by_usage_puts_the_most_used_first_and_keeps_the_clusters() -> None:
    labels_m, usage_E = torch.tensor([0, 1, 2, 0, 3]), torch.tensor([1.0, 5.0, 1.0, 9.0])
    assert order_by_usage(labels_m, usage_E).tolist() == [2, 1, 3, 2, 0]


def test_weight_features_are_unit_rows() -> None:
    features = weight_features(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    torch.testing.assert_close(features, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_activation_features_mark_the_strongest_neurons_of_each_token() -> None:
    h_Tm = torch.tensor([[0.1, -5.0, 2.0], [3.0, 0.0, -1.0]])
    assert activation_features(h_Tm, 2).tolist() == [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]
    with pytest.raises(InputError, match="between 1 and the 3 neurons, got 4"):
        activation_features(h_Tm, 4)


def test_output_features_are_scaled_columns() -> None:
    down_dm = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    features = output_features(down_dm, torch.tensor([1.0, 10.0, 0.0]))
    assert features.tolist() == [[1.0, 4.0], [20.0, 50.0], [0.0, 0.0]]
