"""Balanced k-means on the neurons' keys, the rows of the gate (or first) projection, and two routers.

Legend: T tokens, E experts, m neurons, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_ds.discovery.features import weight_features
from sam_ds.discovery.kmeans import balanced_kmeans
from sam_ds.evaluation.baselines.masked import Calibration, Mask, Method, in_rows, of_experts, top_experts

_EPOCHS, _BATCH, _RATE = 30, 512, 0.01


def fit_emoe(seen: Calibration) -> Mask:
    """EMoE (Qiu et al., 2310.10908): the score of an expert is the mean pre-activation of its neurons, "avg-k", which
    is x times its mean key; weights are 0 or 1.

    Deviates: all layers are converted, where the paper converts a few late ones; nothing is fine-tuned.
    """
    labels_m = _labels(seen)
    key_Ed = mean_keys(in_rows(seen.ffn), labels_m, seen.num_experts)
    return top_experts(lambda x_Td: x_Td @ key_Ed.t(), labels_m, seen.k)


def fit_moefication(seen: Calibration) -> Mask:
    """MoEfication (Zhang et al., 2110.01786): a two-layer router, from the mean normalised keys and the identity,
    trained for 30 epochs on binary cross-entropy with the experts' activation mass over its largest; the epoch that
    captures most mass of the last tenth of the text is kept.

    Deviates: the mass is of |h|, since activations of a gated FFN have signs, and of the tokens as they are, since it
    is not homogeneous: the paper's ReLU lets it normalise them.
    """
    labels_m, experts = _labels(seen), seen.num_experts
    x_Td = F.normalize(seen.x_Td, dim=1)
    mass_TE = of_experts(seen.hidden_Tm.abs(), labels_m, experts)
    train = max(1, x_Td.shape[0] * 9 // 10)
    held_out = slice(train, None) if train < x_Td.shape[0] else slice(None)
    generator = torch.Generator().manual_seed(seen.seed)
    key_Ed = mean_keys(weight_features(in_rows(seen.ffn)), labels_m, experts)
    with torch.enable_grad():
        first = key_Ed.detach().clone().requires_grad_()
        second = torch.eye(experts, device=x_Td.device).requires_grad_()
        optimizer = torch.optim.Adam([first, second], lr=_RATE)
        best, kept = -1.0, (first, second)
        for _ in range(_EPOCHS):
            for index in torch.randperm(train, generator=generator).to(x_Td.device).split(_BATCH):
                target_BE = mass_TE[index] / mass_TE[index].max().clamp(min=1e-12)
                loss = F.binary_cross_entropy_with_logits(mlp(x_Td[index], first, second), target_BE)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                chosen_TK = mlp(x_Td[held_out], first, second).topk(seen.k, dim=1).indices
                captured = float(mass_TE[held_out].gather(1, chosen_TK).sum() / mass_TE[held_out].sum())
            if captured > best:
                best, kept = captured, (first.detach().clone(), second.detach().clone())
    return top_experts(lambda x_Td: mlp(F.normalize(x_Td, dim=1), *kept), labels_m, seen.k)


def mlp(x_Td: Tensor, first_Ed: Tensor, second_EE: Tensor) -> Tensor:
    """(T, E) scores."""
    return torch.tanh(x_Td @ first_Ed.t()) @ second_EE.t()


def mean_keys(rows_md: Tensor, labels_m: Tensor, num_experts: int) -> Tensor:
    """(E, d) mean row of each expert; the experts are of one size."""
    return of_experts(rows_md.t(), labels_m, num_experts).t() * (num_experts / len(labels_m))


def _labels(seen: Calibration) -> Tensor:
    return balanced_kmeans(weight_features(in_rows(seen.ffn)), seen.num_experts, seed=seen.seed).labels_m


EMOE = Method(name="emoe", fit=fit_emoe, router_flops=lambda d, e, k, gated: 2.0 * d * e)
MOEFICATION = Method(
    name="moefication", fit=fit_moefication, router_flops=lambda d, e, k, gated: 2.0 * e * (d + e)
)  # fmt: skip
