"""How much the loss feels each FFN neuron: |w g| (SNIP, Lee et al., 1810.02340; SSFL, Ohib et al., 2405.09037).

Of a neuron, the sum over the weights it writes with, the row of the down-projection. That of the weights it reads with
is left out: where these are linear in the neuron's output, their w g has the same sum.

Legend: T tokens, m neurons, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.surgery import FFN

_BATCH = 4
"""Sequences a backward pass."""


def saliency(model: PreTrainedModel, ffns: Sequence[FFN], batches: Sequence[Tensor]) -> list[Tensor]:
    """(m,) of each FFN of a dense model, with the gradient over all the text.

    Writes no `.grad`. Raises InputError for activations that are not finite, naming the FFN.
    """
    device = next(model.parameters()).device
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def enter(index: int, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args[0].detach().flatten(0, -2)

    def leave(index: int, output: Tensor) -> Tensor:
        outputs[index] = output if output.requires_grad else output.detach().requires_grad_().clone()
        return outputs[index]

    handles = []
    for index, ffn in enumerate(ffns):
        handles.append(ffn.entry.register_forward_pre_hook(lambda _, args, index=index: enter(index, args)))
        handles.append(ffn.exit.register_forward_hook(lambda _, __, output, index=index: leave(index, output)))
    gradients = [torch.zeros_like(ffn.weights()[2], dtype=torch.float32) for ffn in ffns]
    try:
        with torch.enable_grad():
            for rows_BS in (rows_BS for ids_BS in batches for rows_BS in ids_BS.split(_BATCH)):
                ids_BS = rows_BS.to(device)
                loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss * len(rows_BS)
                order = sorted(outputs)
                found = torch.autograd.grad(loss, [outputs[index] for index in order])
                for index, gradient in zip(order, found, strict=True):
                    hidden_Tm = hidden_of(ffns[index], inputs[index]).detach()
                    gradients[index] += hidden_Tm.t() @ gradient.flatten(0, -2).float()
    finally:
        for handle in handles:
            handle.remove()
    return [
        (ffn.weights()[2].detach().float() * gradient_md).abs().sum(1)
        for ffn, gradient_md in zip(ffns, gradients, strict=True)
    ]
