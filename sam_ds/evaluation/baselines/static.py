"""One mask for all tokens: what routing has to beat.

Legend: T tokens, m neurons, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_ds.evaluation.baselines.masked import Calibration, Mask, Method
from sam_ds.experts.surgery import FFN


def fit_static(seen: Calibration) -> Mask:
    """Keep the k neurons of the highest mean energy, mean h^2 ||w||^2 with w the neuron's row of the down projection;
    nothing stands in for the others."""
    energy_m = seen.hidden_Tm.square().mean(0) * _down_squares(seen.ffn)
    kept_m = _largest(energy_m, seen.k)
    return Mask(factor=lambda x_Td: kept_m)


def fit_flap(seen: Calibration) -> Mask:
    """FLAP (An et al., 2312.11983), its structure UL-UM: keep the k neurons of the highest weighted input feature
    variance, the variance of h over the tokens times ||w||^2; the mean output of the others becomes a bias.

    Deviates: prunes FFNs only, and measures a layer behind the layers already pruned, as for every method here, where
    the code measures all in the dense model. AL-AM, which lets the layers share the budget by standardised
    importance, was worse here (conversion benchmark).
    """
    variance_m = seen.hidden_Tm.var(0) * _down_squares(seen.ffn)
    kept_m = _largest(variance_m, seen.k)
    mean_m = seen.hidden_Tm.mean(0) * (1 - kept_m)
    return Mask(factor=lambda x_Td: kept_m, bias_d=mean_m @ seen.ffn.weights()[2].float())


def _largest(values_m: Tensor, k: int) -> Tensor:
    return torch.zeros_like(values_m).index_fill_(0, values_m.topk(k).indices, 1.0)


def _down_squares(ffn: FFN) -> Tensor:
    return ffn.weights()[2].float().square().sum(1)


STATIC = Method(name="static", fit=fit_static, router_flops=lambda d, e, k, gated: 0.0, per_neuron=True)
# The bias costs d additions.
FLAP = Method(name="flap", fit=fit_flap, router_flops=lambda d, e, k, gated: float(d), per_neuron=True)
