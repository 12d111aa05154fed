"""What stands in for an expert that a token does not visit (measured in `examples/benchmarks/conversion.md`).

    s_e(x) = C_e [V x, 1] W        V (q, d) one input basis for the layer, W (p, d) one output basis, C_e (p, q + 1)

close to the expert's mean output on calibration text plus a linear map of rank q. Fitted as one ridge regression of
*what the routes in use leave out* on the features 1{e not visited} [V x, 1], jointly over e, the constants shrunk to
the means; V holds the input directions of the reduced-rank regression (Izenman, 1975) of that residual on x, W the
output directions of the fit. With both bases shared an expert costs p (q + 1) numbers and multiplications, few beside
an expert's own. Roots are always visited and have no stand-in. The ridge strength is the one of a few that predicts
held-out calibration tokens best.

Legend: T tokens, E experts, d hidden, q input rank, Q = q + 1, p output rank, F = E Q features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_ds.discovery.ridge import ridge

_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """Stand-ins of one layer: `basis_dq` (d, q) = V', `core_EQp` (E, q + 1, p) = C_e', `spread_pd` (p, d) = W, whose
    rows are orthonormal."""

    basis_dq: Tensor
    core_EQp: Tensor
    spread_pd: Tensor


Chunks = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]
"""A fresh pass over the calibration tokens: x (T, d), the summed output of the unvisited experts less their means
(T, d), unvisited (T, E) bool."""


def with_one(z_Tq: Tensor) -> Tensor:
    """(T, q + 1) the inputs of the stand-ins: a last column of ones."""
    return torch.cat([z_Tq, z_Tq.new_ones(z_Tq.shape[0], 1)], dim=1)


def fit_standins(
    chunks: Chunks, *, mean_Ed: Tensor, roots: int, rank: int, outputs: int,
    bases: tuple[Tensor, Tensor] | None = None,
) -> StandIns:  # fmt: skip
    """Fit the stand-ins of one layer; `mean_Ed` (E, d) is zero for the roots. Given `bases` (V', W) stay as they are.

    Rank 0: the means, to rounding where `outputs` >= E - roots. Every fifth chunk is held out to choose the ridge.
    """
    hidden = mean_Ed.shape[1]
    if bases is not None:
        basis_dq, spread_pd = bases
        w_EQd, _ = _regression(chunks, basis_dq, mean_Ed, roots)
    else:
        basis_dq = mean_Ed.new_zeros(hidden, 0)
        if rank > 0:
            basis_dq = _input_basis(chunks, mean_Ed.new_zeros(2, hidden, hidden, dtype=torch.float64), rank)
        w_EQd, gram_FF = _regression(chunks, basis_dq, mean_Ed, roots)
        spread_pd = _output_basis(w_EQd, gram_FF, outputs)
    return StandIns(basis_dq=basis_dq, core_EQp=(w_EQd @ spread_pd.t()).contiguous(), spread_pd=spread_pd)


def _regression(chunks: Chunks, basis_dq: Tensor, mean_Ed: Tensor, roots: int) -> tuple[Tensor, Tensor]:
    """(E, Q, d) the stand-ins over this input basis, the output basis being whole, and the features' Gram matrix."""
    (num_experts, hidden), rank = mean_Ed.shape, basis_dq.shape[1]
    if rank == 0:
        return mean_Ed[:, None], torch.eye(num_experts)
    features = num_experts * (rank + 1)
    # Index 0: tokens to fit on, 1: tokens to choose the ridge on.
    gram = mean_Ed.new_zeros(2, features, features, dtype=torch.float64)
    cross = mean_Ed.new_zeros(2, features, hidden, dtype=torch.float64)
    for index, (x_Td, residual_Td, unvisited_TE) in enumerate(chunks()):
        missing_TE = unvisited_TE.to(x_Td.dtype)
        phi_TF = (missing_TE[:, :, None] * with_one(x_Td @ basis_dq)[:, None, :]).flatten(1)
        held_out = int(index % 5 == 4)
        gram[held_out] += (phi_TF.t() @ phi_TF).double()
        cross[held_out] += (phi_TF.t() @ residual_Td).double()
    if not gram[1].any():
        gram[1], cross[1] = gram[0], cross[0]

    def held_out_loss(strength: float) -> float:
        w_Fd = ridge(gram[0], cross[0], strength)
        return float((w_Fd * (gram[1] @ w_Fd)).sum() - 2 * (w_Fd * cross[1]).sum())

    best = min(_RIDGES, key=held_out_loss)
    w_EQd = ridge(gram.sum(0), cross.sum(0), best).float().view(num_experts, rank + 1, hidden)
    w_EQd[:, -1] += mean_Ed
    w_EQd[:roots] = 0.0
    return w_EQd, gram.sum(0)


def _output_basis(w_EQd: Tensor, gram_FF: Tensor, outputs: int) -> Tensor:
    """(p, d): the `outputs` output directions in which the stand-ins vary most over the calibration tokens."""
    w_Fd = w_EQd.flatten(0, 1).double()
    energy_dd = w_Fd.t() @ gram_FF.to(w_Fd) @ w_Fd
    directions = torch.linalg.eigh(energy_dd).eigenvectors[:, w_EQd.shape[2] - outputs :]
    return directions.t().to(w_EQd.dtype).contiguous()


def _input_basis(chunks: Chunks, empty_2dd: Tensor, rank: int) -> Tensor:
    """(d, q): the input directions of the rank-q regression of the left-out output on x (Izenman, 1975)."""
    gram_dd, cross_dd = empty_2dd.clone()
    hidden = len(gram_dd)
    for x_Td, residual_Td, _ in chunks():
        gram_dd += (x_Td.t() @ x_Td).double()
        cross_dd += (x_Td.t() @ residual_Td).double()
    full_dd = ridge(gram_dd, cross_dd, 1e-2)
    explained_dd = full_dd.t() @ gram_dd @ full_dd
    directions = torch.linalg.eigh(explained_dd).eigenvectors[:, -rank:]
    basis_dq = full_dd @ directions
    # Unit variance of V x, so that the ridge treats its q inputs and the intercept alike.
    spread_q = ((basis_dq * (gram_dd @ basis_dq)).sum(0)).clamp(min=1e-12).sqrt()
    return (basis_dq / spread_q * gram_dd.diagonal().sum().sqrt() / hidden**0.5).float()
