"""What the neurons of an FFN are clustered by, and the order of the clusters found.

Neurons that read the same inputs (`weight_features`: EMoE, 2310.10908, and MoEfication, 2110.01786), that
fire on the same tokens (`activation_features`: CMoE, 2502.04416) or that write the same outputs
(`output_features`) belong together. Every function gives one row a neuron, ready for `balanced_kmeans`.

Legend: T tokens, E experts, m neurons, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sam_ds.errors import InputError


def weight_features(w_md: Tensor) -> Tensor:
    """(m, d) rows of the gate (or first) projection, L2-normalised; a zero row stays zero."""
    return F.normalize(w_md, dim=1)


def activation_features(h_Tm: Tensor, top: int) -> Tensor:
    """(m, T) binary: 1 where the neuron is among the `top` of the token by |h| (CMoE's K_a).

    Raises InputError unless 1 <= top <= m.
    """
    neurons = h_Tm.shape[1]
    if not 1 <= top <= neurons:
        raise InputError(f"top must be between 1 and the {neurons} neurons, got {top}")
    strongest = h_Tm.abs().topk(top, dim=1).indices
    return torch.zeros_like(h_Tm).scatter_(1, strongest, 1.0).t().contiguous()


def output_features(down_dm: Tensor, h_norm_m: Tensor) -> Tensor:
    """(m, d) columns of the down projection times the root mean square of their neuron."""
    return (down_dm * h_norm_m).t().contiguous()


def order_by_usage(labels_m: Tensor, usage_E: Tensor) -> Tensor:
    """(m,) the same clusters, numbered by usage: 0 is the most used; ties keep their order."""
    order_E = torch.argsort(usage_E, descending=True, stable=True)
    rank_E = torch.empty_like(order_E)
    rank_E[order_E] = torch.arange(len(order_E), device=order_E.device)
    return rank_E.to(labels_m.device)[labels_m]
