"""What `sam-ds bench layer` times beside a SAM layer: the same experts, chosen alike, in other layers.

A peer computes its gate's scores and weights; the choices are given to it, so that it pays nothing for its own
selection, and all do the same work. Weights are 1 in value and carry the gradient of the softmax, as ours.

Legend: T tokens, E experts, J = k - roots choices, k = roots + J, d hidden, n neurons an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sam_ds.experts.layer import SamFFN
from sam_ds.graph.route import straight_through

TRANSFORMERS = ("eager", "grouped_mm")
"""The `experts_implementation`s of transformers that are timed."""


class _GivenChoices(nn.Module):
    """A gate whose choices (T, J) are given, -1 for none."""

    def __init__(self, wg_Ed: Tensor, chosen_TJ: Tensor) -> None:
        super().__init__()
        self.wg = nn.Parameter(wg_Ed.detach().clone())
        self.chosen_TJ = chosen_TJ

    def weights(self, x_Td: Tensor) -> Tensor:
        """(T, J): 1 in value, 0 where none was chosen."""
        g_TE = F.linear(x_Td.detach().float(), self.wg).softmax(1)
        g_TJ = g_TE.gather(1, self.chosen_TJ.clamp(min=0))
        return (self.chosen_TJ >= 0) * straight_through(g_TJ)


def _gated(layer: SamFFN) -> tuple[Tensor, Tensor, Tensor]:
    """Up, gate and down, without gradient."""
    up_dm, gate_dm, down_md = layer.matrices()
    assert gate_dm is not None
    return up_dm.detach(), gate_dm.detach(), down_md.detach()


class TransformersLayer(nn.Module):
    """The experts of Mixtral with one of transformers' implementations; the roots are chosen by every token."""

    def __init__(self, layer: SamFFN, chosen_TJ: Tensor, implementation: str) -> None:
        super().__init__()
        self.gate = _GivenChoices(layer.sam.wg[:, : layer.ffn.hidden], chosen_TJ)
        self.roots = layer.roots
        up_dm, gate_dm, down_md = _gated(layer)
        config = MixtralConfig(
            hidden_size=up_dm.shape[0], intermediate_size=layer.neurons, num_local_experts=layer.slots,
            num_attention_heads=1, num_key_value_heads=1,
        )  # fmt: skip
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config).to(up_dm)
        with torch.no_grad():
            gate_up_Edn = torch.cat([layer.slots_in(gate_dm), layer.slots_in(up_dm)], dim=2)
            self.experts.gate_up_proj.copy_(gate_up_Edn.transpose(1, 2))
            self.experts.down_proj.copy_(layer.slots_out(down_md).transpose(1, 2))
        roots_Tr = torch.arange(self.roots, device=chosen_TJ.device).expand(len(chosen_TJ), -1)
        self.visited_Tk = torch.cat([roots_Tr, chosen_TJ.clamp(min=0)], dim=1)

    def forward(self, x_Td: Tensor) -> Tensor:
        weight_Tk = F.pad(self.gate.weights(x_Td), (self.roots, 0), value=1.0)
        return self.experts(x_Td, self.visited_Tk, weight_Tk.to(x_Td.dtype))


class DeepSpeedLayer(nn.Module):
    """DeepSpeed's `MOELayer` without expert parallelism, no token dropped, and the roots as one dense FFN beside it:
    inside it, with every token on them, all experts would be padded to T rows. `gated_ffn(hidden, neurons)` makes its
    FFNs."""

    def __init__(self, layer: SamFFN, chosen_TJ: Tensor, gated_ffn: Callable[[int, int], LlamaMLP]) -> None:
        super().__init__()
        up_dm, gate_dm, down_md = _gated(layer)

        def ffn(first: int, experts: int) -> LlamaMLP:
            own = slice(first * layer.neurons, (first + experts) * layer.neurons)
            made = gated_ffn(up_dm.shape[0], experts * layer.neurons).to(up_dm)
            with torch.no_grad():
                made.up_proj.weight.copy_(up_dm[:, own].t())
                made.gate_proj.weight.copy_(gate_dm[:, own].t())
                made.down_proj.weight.copy_(down_md[own].t())
            return made

        self.roots = ffn(0, layer.roots)
        routed = layer.slots - layer.roots
        experts = Experts(ffn(layer.roots, 1), routed)
        for index, expert in enumerate(experts.deepspeed_experts):
            expert.load_state_dict(ffn(layer.roots + index, 1).state_dict())
        self.moe = MOELayer(_DeepSpeedGate(layer, chosen_TJ), experts, "", ep_size=1, num_local_experts=routed)

    def forward(self, x_Td: Tensor) -> Tensor:
        return self.roots(x_Td) + self.moe(x_Td, None)


class _DeepSpeedGate(nn.Module):
    """DeepSpeed's contract of seven values; as its `topkgating` with `drop_tokens=False`, the choices given."""

    def __init__(self, layer: SamFFN, chosen_TJ: Tensor) -> None:
        super().__init__()
        self.gate = _GivenChoices(layer.sam.wg[:, : layer.ffn.hidden], chosen_TJ)
        self.roots, self.routed = layer.roots, layer.slots - layer.roots

    def forward(
        self, x_Td: Tensor, used_token: None, sparse_routes: bool, use_tutel: bool
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]:
        assert sparse_routes and not use_tutel
        chosen_TJ = torch.where(self.gate.chosen_TJ >= 0, self.gate.chosen_TJ - self.roots, -1)
        column_TJ = torch.where(chosen_TJ >= 0, chosen_TJ, self.routed)
        mask_TE = torch.zeros(len(x_Td), self.routed + 1, dtype=torch.bool, device=x_Td.device)
        mask_TE.scatter_(1, column_TJ, True)
        counts_E = mask_TE.sum(0)[: self.routed]
        place_TJ = (mask_TE.cumsum(0) - 1).gather(1, column_TJ)
        weight_TJ = self.gate.weights(x_Td)
        indices_JT, places_JT = (values.t().contiguous().int() for values in (chosen_TJ, place_TJ))
        loss = weight_TJ.new_zeros(())
        return loss, counts_E.max(), self.routed, indices_JT, places_JT, weight_TJ.t().contiguous(), counts_E
