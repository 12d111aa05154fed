"""A dense FFN in which every token computes only some neurons, by mask; and what converts a model into such layers.

Legend: B rows, S tokens a row, T = B S tokens, E experts, m neurons, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.surgery import FFN, find_ffns, install


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a method sees of one layer: its inputs behind the layers already converted, and its neurons' outputs."""

    ffn: FFN
    x_Td: Tensor
    hidden_Tm: Tensor
    num_experts: int
    k: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Mask:
    """`factor`: (T, d) inputs to (T, m) or (m,), what each neuron's output is multiplied by: 0 is not computed.

    `bias_d` is added to the output of every token."""

    factor: Callable[[Tensor], Tensor]
    bias_d: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """How to choose the neurons of a layer, and what choosing costs."""

    name: str
    fit: Callable[[Calibration], Mask]
    router_flops: Callable[[int, int, int, bool], float]
    """FLOPs a token beside the visited experts, from (d, E, k, gated)."""
    per_neuron: bool = False
    """Every neuron is an expert of its own."""
    weighted: bool = False
    """Experts are multiplied by the gate's weights, so all of them visited is not the dense layer."""


class MaskedFFN(nn.Module):
    """Takes an FFN's place. The first input it is given is the calibration text, on which it is fitted."""

    def __init__(self, ffn: FFN, method: Method, *, num_experts: int, k: int, seed: int) -> None:
        super().__init__()
        self.ffn, self.method = ffn, method
        self.num_experts, self.k, self.seed = num_experts, k, seed
        self.mask: Mask | None = None

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d). The FFNs that are given the residual (Bloom's) return the sum."""
        x_Td = hidden_states.reshape(-1, hidden_states.shape[-1])
        hidden_Tm = hidden_of(self.ffn, x_Td)
        if self.mask is None:
            self.mask = self.method.fit(
                Calibration(
                    ffn=self.ffn, x_Td=x_Td.float(), hidden_Tm=hidden_Tm, num_experts=self.num_experts, k=self.k,
                    seed=self.seed,
                )
            )  # fmt: skip
        y_Td = (hidden_Tm * self.mask.factor(x_Td.float())) @ self.ffn.weights()[2].float()
        for bias_d in (self.mask.bias_d, self.ffn.biases()[2]):
            if bias_d is not None:
                y_Td = y_Td + bias_d
        y = y_Td.to(hidden_states.dtype).view(hidden_states.shape)
        return y if residual is None else residual + y

    def visited(self, x_Td: Tensor) -> Tensor:
        """(T, m) bool: the neurons that a token computes."""
        assert self.mask is not None
        return (self.mask.factor(x_Td) != 0).expand(x_Td.shape[0], self.ffn.neurons)


@torch.no_grad()
def convert(
    model: PreTrainedModel, method: Method, ids_BS: Tensor, *, num_experts: int, k: Sequence[int], seed: int
) -> list[MaskedFFN]:
    """Put masked layers that visit k[l] experts in layer l in the place of the model's FFNs, fitted on `ids_BS`.

    One forward pass over all of the text: a layer is fitted when the text reaches it, through the layers before it as
    they are by then. The model must be in eval mode.
    """
    layers = []
    for index, (ffn, own) in enumerate(zip(find_ffns(model), k, strict=True)):
        experts = ffn.neurons if method.per_neuron else num_experts
        layer = MaskedFFN(ffn, method, num_experts=experts, k=own, seed=seed + index)
        install(model, ffn, layer)
        layers.append(layer)
    # Without the head: the logits of all the text at once are the largest tensor there is.
    model.base_model(input_ids=ids_BS.to(next(model.parameters()).device), use_cache=False)
    return layers


def top_experts(score: Callable[[Tensor], Tensor], labels_m: Tensor, k: int) -> Mask:
    """Visit the k experts of the highest scores: (T, d) -> (T, E); `labels_m` says whose a neuron is."""

    def factor(x_Td: Tensor) -> Tensor:
        scores_TE = score(x_Td)
        visited_TE = torch.zeros_like(scores_TE).scatter_(1, scores_TE.topk(k, dim=1).indices, 1.0)
        return visited_TE[:, labels_m]

    return Mask(factor=factor)


def of_experts(values_Tm: Tensor, labels_m: Tensor, num_experts: int) -> Tensor:
    """(T, E) sums over each expert's neurons."""
    return values_Tm @ F.one_hot(labels_m, num_experts).to(values_Tm.dtype)


def in_rows(ffn: FFN) -> Tensor:
    """(m, d) fp32 rows that the neurons are known by: the gate projection's, or the only one's."""
    up_dm, gate_dm, _ = ffn.weights()
    return (up_dm if gate_dm is None else gate_dm).t().float()
