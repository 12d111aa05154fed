"""CMoE (Pei et al., 2502.04416): experts every token visits, from the neurons that are active most often, and routed
experts of neurons that are active together.

Legend: T tokens, S shared and R = E - S routed experts, m neurons, n = m / E, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_ds.discovery.features import activation_features
from sam_ds.discovery.kmeans import balanced_kmeans, check_divides
from sam_ds.evaluation.baselines.masked import Calibration, Mask, Method

_ACTIVE = 10
"""K_a: so many neurons of a token count as active."""
_CLUSTER_TOKENS = 4096
"""Tokens that the routed neurons are clustered by; rates are of all."""


def shared(k: int) -> int:
    """S: half of the k experts, as in the paper's S3A3E8."""
    return max(1, k // 2)


def fit(seen: Calibration) -> Mask:
    """Rates are the share of tokens for which a neuron is among the 10 of the largest |h|. The S n neurons of the
    highest rates are visited always; the others are clustered by which tokens they are active for, from the R of the
    highest rates as centers. A routed expert's score is |h| of its representative, the neuron nearest its center.

    Deviates: S is half of k, at every k; balanced k-means runs until it has converged, on squared distances, where
    the code makes one step on L1; |h| is that of the layer, where the code normalises inputs and rows. The paper's
    optional training is left out.
    """
    neurons, experts, k = seen.hidden_Tm.shape[1], seen.num_experts, seen.k
    check_divides(neurons, experts)
    size = neurons // experts
    active_mT = activation_features(seen.hidden_Tm, top=min(_ACTIVE, neurons))
    order_m = active_mT.mean(1).argsort(descending=True, stable=True)
    always, routed = order_m[: shared(k) * size], order_m[shared(k) * size :]
    points = active_mT[routed, :_CLUSTER_TOKENS]
    clusters = experts - shared(k)
    found = balanced_kmeans(points, clusters, seed=seen.seed, centers_Ed=points[:clusters])
    representative_R = routed[nearest_members(points, found.labels_m, found.centers_Ed)]
    up_dm, gate_dm, _ = seen.ffn.weights()
    up_b, gate_b, _ = seen.ffn.biases()

    def factor(x_Td: Tensor) -> Tensor:
        x_Td = x_Td.to(up_dm.dtype)

        def of(matrix_dm: Tensor, bias_m: Tensor | None) -> Tensor:
            out_TR = x_Td @ matrix_dm[:, representative_R]
            return out_TR if bias_m is None else out_TR + bias_m[representative_R]

        up_TR = of(up_dm, up_b)
        hidden_TR = seen.ffn.activation(up_TR) if gate_dm is None else seen.ffn.activation(of(gate_dm, gate_b)) * up_TR
        chosen_TK = hidden_TR.abs().topk(k - shared(k), dim=1).indices
        visited_TR = torch.zeros(hidden_TR.shape, device=x_Td.device).scatter_(1, chosen_TK, 1.0)
        factor_Tm = torch.ones(x_Td.shape[0], neurons, device=x_Td.device)
        factor_Tm[:, routed] = visited_TR[:, found.labels_m]
        return factor_Tm

    assert len(always) + len(routed) == neurons
    return Mask(factor=factor)


def nearest_members(points_md: Tensor, labels_m: Tensor, centers_Ed: Tensor) -> Tensor:
    """(E,) the point of each cluster that is nearest its center."""
    distance_Em = torch.cdist(centers_Ed, points_md)
    outside_Em = labels_m[None, :] != torch.arange(len(centers_Ed), device=labels_m.device)[:, None]
    return distance_Em.masked_fill(outside_Em, float("inf")).argmin(dim=1)


def _router_flops(d: int, experts: int, k: int, gated: bool) -> float:
    return 2.0 * (2 if gated else 1) * d * (experts - shared(k))


CMOE = Method(name="cmoe", fit=fit, router_flops=_router_flops)
