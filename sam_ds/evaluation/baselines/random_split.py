"""Neurons dealt out at random, with a linear router fitted in closed form.

Legend: T tokens, E experts, m neurons, d hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_ds.discovery.ridge import ridge
from sam_ds.evaluation.baselines.masked import Calibration, Mask, Method, top_experts


def fit_random(seen: Calibration) -> Mask:
    """A control, of no paper: the router is ridge regression from x to the norm of each expert's output, so that it is
    the split that is judged."""
    labels_m = random_labels(seen)
    wg_dE = fit_gate(seen.x_Td, output_norms(seen, labels_m))
    return top_experts(lambda x_Td: x_Td @ wg_dE, labels_m, seen.k)


def fit_llama_moe(seen: Calibration) -> Mask:
    """LLaMA-MoE (Zhu et al., 2406.16554): the softmax over the k largest logits of a linear gate weighs the experts,
    and is scaled up for those left out.

    Deviates: the gate is trained on 200 G tokens there; here its logits are ridge regression from x to the logarithm
    of the norm of each expert's output, so that the weights are in proportion to it. The scale there is E / k for 4
    of 16 experts, which makes the mean weight E / k^2 = 1; here it is 1 at every k (the formula's own, and a mean of
    E / k, were worse: conversion benchmark). No noise.
    """
    labels_m = random_labels(seen)
    wg_dE = fit_gate(seen.x_Td, output_norms(seen, labels_m).clamp(min=1e-12).log())

    def factor(x_Td: Tensor) -> Tensor:
        top = (x_Td @ wg_dE).topk(seen.k, dim=1)
        weight_TE = x_Td.new_zeros(x_Td.shape[0], seen.num_experts)
        return weight_TE.scatter_(1, top.indices, seen.k * top.values.softmax(dim=1))[:, labels_m]

    return Mask(factor=factor)


def random_labels(seen: Calibration) -> Tensor:
    """(m,) the expert of each neuron, m / E neurons an expert."""
    order_m = torch.randperm(seen.ffn.neurons, generator=torch.Generator().manual_seed(seen.seed))
    return (order_m % seen.num_experts).to(seen.x_Td.device)


def output_norms(seen: Calibration, labels_m: Tensor) -> Tensor:
    """(T, E) ||f_e(x)||."""
    down_md = seen.ffn.weights()[2].float()
    norms = []
    for expert in range(seen.num_experts):
        own = labels_m == expert
        norms.append((seen.hidden_Tm[:, own] @ down_md[own]).norm(dim=1))
    return torch.stack(norms, dim=1)


def fit_gate(x_Td: Tensor, target_TE: Tensor) -> Tensor:
    """(d, E) of ridge regression, with the strength of our own router's."""
    return ridge((x_Td.t() @ x_Td).double(), (x_Td.t() @ target_TE).double(), 1e-3).float()


RANDOM = Method(name="random", fit=fit_random, router_flops=lambda d, e, k, gated: 2.0 * d * e)
LLAMA_MOE = Method(
    name="llama_moe", fit=fit_llama_moe, router_flops=lambda d, e, k, gated: 2.0 * d * e, weighted=True
)  # fmt: skip
