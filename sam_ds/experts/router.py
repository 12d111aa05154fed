"""Gates: a score for every expert, higher where more is lost without it.

    score_e(x) = w_e . phi(x)

The rows w_e train, travel and are sliced with their experts; what phi is made of belongs to the layer and does not:

    linear          [x, 1], w by ridge regression of the mass lost: ||f_e(x) - mu_e||
    roots           [x, |h|, 1], h what the roots' neurons put out, which every token computes anyway; w likewise
    low_rank        [V x, 1], V of rank q (reduced-rank regression: Izenman, 1975); w likewise
    mlp             [silu(V x + b), 1] with q units (MoEfication, 2110.01786), both trained by gradient for that mass
    mean_key        x, w_e the mean of the experts' gate (or first) rows (EMoE, 2310.10908)
    representative  |h| of one neuron an expert, w the identity (CMoE, 2502.04416), there the neuron nearest the
                    center of its cluster, here the one whose |h| goes most with the expert's mass

Legend: T tokens, E experts, S slots, d hidden, r the roots' neurons, F features, I inner units.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_ds.discovery.ridge import ridge_of
from sam_ds.experts.config import ROUTERS, router_shape
from sam_ds.experts.surgery import FFN

_RIDGE = 1e-3
_STEPS, _BATCH, _RATE = 400, 1024, 3e-3


class Features(nn.Module):
    """phi of one layer, in fp32 whatever the model's precision: a route must not depend on how a score was rounded.

    Its buffers are zero until `fit_router`.
    """

    inner_dI: Tensor
    inner_I: Tensor

    def __init__(
        self, router: str, *, hidden: int, num_experts: int, root_neurons: int, rank: int, gated: bool,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        assert router in ROUTERS
        self.router = router
        self.gated = gated
        inner, self.width = router_shape(
            router, hidden=hidden, num_experts=num_experts, root_neurons=root_neurons, rank=rank, gated=gated
        )  # fmt: skip
        self.register_buffer("inner_dI", torch.zeros(hidden, inner, device=device))
        self.register_buffer("inner_I", torch.zeros(inner, device=device))

    def forward(self, x_Td: Tensor, root_Tr: Tensor | None, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """(T, F) of the layer's inputs and of what the roots' neurons put out (`roots` only)."""
        x_Td = x_Td.float()
        one_T1 = x_Td.new_ones(len(x_Td), 1)
        if self.router == "mean_key":
            return x_Td
        if self.router == "linear":
            return torch.cat([x_Td, one_T1], dim=1)
        if self.router == "roots":
            assert root_Tr is not None
            return torch.cat([x_Td, root_Tr.float().abs(), one_T1], dim=1)
        # Cast with the model where that is cast to half.
        inner_TI = x_Td @ self.inner_dI.float() + self.inner_I.float()
        if self.router == "low_rank":
            return torch.cat([inner_TI, one_T1], dim=1)
        if self.router == "mlp":
            return torch.cat([F.silu(inner_TI), one_T1], dim=1)
        if not self.gated:
            return activation(inner_TI).abs()
        gate_TE, up_TE = inner_TI.chunk(2, dim=1)
        return (activation(gate_TE) * up_TE).abs()


@torch.no_grad()
def fit_router(
    phi: Features, ffn: FFN, x_Td: Tensor, root_Tr: Tensor | None, lost_TE: Tensor, *, hidden_Tm: Tensor, seed: int
) -> Tensor:
    """(E, F) the rows w, from the tokens' inputs and the mass that each loses without each expert.

    Fills the buffers of `phi`. `hidden_Tm`: what the neurons put out for some of the first tokens, for
    `representative`. The experts are the blocks of the FFN's neurons, in order.
    """
    experts = lost_TE.shape[1]
    up_dm, gate_dm, _ = ffn.weights()
    if phi.router == "mean_key":
        rows_dm = up_dm if gate_dm is None else gate_dm
        return rows_dm.float().unflatten(1, (experts, -1)).mean(2).t()
    if phi.router == "representative":
        chosen_E = _representatives(hidden_Tm.abs().unflatten(1, (experts, -1)), lost_TE[: len(hidden_Tm)])
        biases = zip((gate_dm, up_dm), reversed(ffn.biases()[:2]), strict=True)
        columns, offsets = [], []
        for matrix_dm, bias_m in biases:
            if matrix_dm is not None:
                columns.append(matrix_dm[:, chosen_E])
                offsets.append(phi.inner_I.new_zeros(experts) if bias_m is None else bias_m[chosen_E])
        phi.inner_dI.copy_(torch.cat(columns, dim=1))
        phi.inner_I.copy_(torch.cat(offsets))
        return torch.eye(experts, device=x_Td.device)
    if phi.router == "low_rank":
        full_dE = ridge_of(torch.cat([x_Td, torch.ones_like(x_Td[:, :1])], dim=1), lost_TE, _RIDGE)[:-1]
        # The directions in which the predictions vary most: the optimum of that rank.
        predicted_TE = x_Td @ full_dE
        variance_EE = torch.cov(predicted_TE.t().double()).to(x_Td)
        directions_Eq = torch.linalg.eigh(variance_EE).eigenvectors.flip(1)[:, : phi.width - 1]
        phi.inner_dI[:, : directions_Eq.shape[1]] = full_dE @ directions_Eq
    elif phi.router == "mlp":
        return _train(phi, x_Td, lost_TE, seed=seed)
    return ridge_of(phi(x_Td, root_Tr, ffn.activation), lost_TE, _RIDGE).t()


def _representatives(size_TEn: Tensor, lost_TE: Tensor) -> Tensor:
    """(E,) the neuron of each expert whose |h| correlates most with the expert's mass."""
    centered_TEn, mass_TE = size_TEn - size_TEn.mean(0), lost_TE - lost_TE.mean(0)
    joint_En = torch.einsum("ten,te->en", centered_TEn, mass_TE)
    correlation_En = joint_En / centered_TEn.norm(dim=0).clamp(min=1e-12)
    first_E = torch.arange(size_TEn.shape[1], device=size_TEn.device) * size_TEn.shape[2]
    return first_E + correlation_En.argmax(1)


def _train(phi: Features, x_Td: Tensor, lost_TE: Tensor, *, seed: int) -> Tensor:
    """(E, F) rows and phi's buffers by a few hundred steps of AdamW on the squared error."""
    generator = torch.Generator().manual_seed(seed)
    hidden, units = phi.inner_dI.shape
    scale_d, mean_E, spread = x_Td.std(0).clamp(min=1e-6), lost_TE.mean(0), lost_TE.std()
    inner = (torch.randn(hidden, units, generator=generator) / hidden**0.5).to(x_Td)
    offset = x_Td.new_zeros(units)
    rows = (torch.randn(lost_TE.shape[1], units + 1, generator=generator) / units**0.5).to(x_Td)
    trained = [value.requires_grad_() for value in (inner, offset, rows)]
    with torch.enable_grad():
        optimizer = torch.optim.AdamW(trained, lr=_RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            drawn_B = torch.randint(len(x_Td), (_BATCH,), generator=generator).to(x_Td.device)
            inner_BI = F.silu(x_Td[drawn_B] / scale_d @ inner + offset)
            target_BE = (lost_TE[drawn_B] - mean_E) / spread
            loss = F.mse_loss(F.linear(inner_BI, rows[:, :-1], rows[:, -1]), target_BE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    phi.inner_dI.copy_(inner.detach() / scale_d[:, None])
    phi.inner_I.copy_(offset.detach())
    rows = rows.detach() * spread
    rows[:, -1] += mean_E
    return rows
