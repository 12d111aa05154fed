"""How many experts a token visits in each layer, under one budget for the whole model.

Layers differ in how evenly their experts share the work and in how much the loss feels what is left out. With g the
gradient of the loss at an FFN's output, an error e there costs about 1/2 e' E[g g'] e nats a token (the Fisher
information, labels drawn from the model itself: Martens, 1412.1193), so

    lost[k] = 1/2 sum of the E - k smallest ||f_e(x) - mu_e||^2 in that norm, a mean over tokens

with the cross terms of experts left out. The budget, L top_k, goes where one more expert saves most.

Legend: L layers, T tokens, E experts, K = E + 1 budgets 0..E, n neurons an expert, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_ds.discovery.mass import expert_mass
from sam_ds.experts.calibrate import check_finite
from sam_ds.experts.surgery import FFN

_BATCH = 4
"""Sequences a backward pass."""


def output_fisher(model: nn.Module, ffns: Sequence[FFN], batches: Sequence[Tensor], *, seed: int) -> list[Tensor]:
    """(d, d) E[g g'] at the output of each FFN of a dense model, over labels that the model draws itself.

    Writes no `.grad`. The model is run as it is: call it in eval mode. Raises InputError for an output that is not
    finite, naming the FFN.
    """
    device = next(model.parameters()).device
    # On the CPU, as everything drawn from a seed here: the same on every device.
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}

    def keep(index: int, output: Tensor) -> Tensor:
        check_finite(ffns[index].path, output)
        # A model of frozen weights has no graph yet.
        outputs[index] = output if output.requires_grad else output.detach().requires_grad_().clone()
        return outputs[index]

    handles = [
        ffn.exit.register_forward_hook(lambda _, __, output, index=index: keep(index, output))
        for index, ffn in enumerate(ffns)
    ]
    tokens = sum(ids_BS.numel() for ids_BS in batches)
    fisher: list[Tensor | float] = [0.0] * len(ffns)
    try:
        with torch.enable_grad():
            for rows_BS in (rows_BS for ids_BS in batches for rows_BS in ids_BS.split(_BATCH)):
                logits = model(input_ids=rows_BS.to(device), use_cache=False).logits.flatten(0, 1).float()
                drawn_T = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, drawn_T.to(device), reduction="sum")
                order = sorted(outputs)
                for index, gradient in zip(
                    order, torch.autograd.grad(loss, [outputs[i] for i in order]), strict=True
                ):
                    g_Td = gradient.flatten(0, -2).float()
                    fisher[index] = fisher[index] + g_Td.t() @ g_Td / tokens
    finally:
        for handle in handles:
            handle.remove()
    return [torch.as_tensor(value) for value in fisher]


def lost_by_budget(hidden_Tm: Tensor, down_md: Tensor, fisher_dd: Tensor, *, num_experts: int, roots: int) -> Tensor:
    """(K,) nats a token lost by visiting k experts of a layer, the roots and those that matter most for the token.

    `hidden_Tm` what the neurons put out, expert by expert; `down_md` the rows they write; 0 at k = E.
    """
    down_End = down_md.float().unflatten(0, (num_experts, -1))
    h_TEn = (hidden_Tm - hidden_Tm.mean(0)).unflatten(1, (num_experts, -1))
    mass_TE = 0.5 * expert_mass(h_TEn, down_End, fisher_dd)
    by_mass_TE = torch.cat([mass_TE[:, :roots], mass_TE[:, roots:].sort(dim=1, descending=True).values], dim=1)
    left_E = by_mass_TE.mean(0).flip(0).cumsum(0).flip(0)
    return torch.cat([left_E, left_E.new_zeros(1)])


def allocate(lost_LK: Tensor, total: int, roots: int) -> list[int]:
    """k of each layer: together `total`, each from `roots` to E, the sum of `lost_LK` least.

    One expert at a time where it saves most: exact, for a layer's curve is convex (the smallest go last).
    """
    layers, num_experts = lost_LK.shape[0], lost_LK.shape[1] - 1
    saved_LE = lost_LK[:, :-1] - lost_LK[:, 1:]
    budgets = [roots] * layers
    for _ in range(total - layers * roots):
        open_layers = [layer for layer in range(layers) if budgets[layer] < num_experts]
        best = max(open_layers, key=lambda layer: float(saved_LE[layer, budgets[layer]]))
        budgets[best] += 1
    return budgets
