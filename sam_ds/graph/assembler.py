"""The assembler: one small MLP, shared by all clients, that turns a client's condition into edge logits.

A network for each client, with an (E, E) output, would learn from one client's text alone; here a single one is
conditioned on the client and federated like any shared parameter, and each layer's logits are a product of rank a,
(E, a) times (a, E), added to a fixed prior: the number of parameters grows with E, never with E^2. The hard top-B has
no gradient of its own; it comes through the credited edges of the route (`route.gate_values`).

Where experts send messages, it also writes what each edge's are multiplied with for this client, as another product
of rank a, beside the gains that all clients share: there a graph is a weighted one, its weights have a gradient, and
clients whose texts are alike get weights that are alike. They are 0 at the start.

Letters: L layers, E experts, H hidden, a rank of the edge logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sam_ds.errors import InputError
from sam_ds.graph.dag import BoolArray, top_edges


@dataclass(frozen=True, kw_only=True, slots=True)
class AssemblerConfig:
    """Sizes of the network."""

    layers: int
    """L, converted layers."""
    num_experts: int
    """E, experts a layer."""
    hidden: int = 32
    """H, width of the shared hidden layer."""
    rank: int = 4
    """a, rank of the learned part of the edge logits, and of the gains."""
    messages: bool = False
    """Whether it writes gains."""

    def __post_init__(self) -> None:
        for name in ("layers", "num_experts", "hidden", "rank"):
            if getattr(self, name) < 1:
                raise InputError(f"assembler {name} must be at least 1, got {getattr(self, name)}")


def client_condition(mean_scores_LE: Tensor, budget_share: float) -> Tensor:
    """(L, E + 1): mean gate scores on a client's text, standardised within each layer, and its share of the
    experts.

    `budget_share` in (0, 1] is how many experts a layer it may hold, over how many there are.
    """
    if not 0.0 < budget_share <= 1.0:
        raise InputError(f"budget_share must be in (0, 1], got {budget_share}")
    scores_LE = mean_scores_LE.float()
    centred_LE = scores_LE - scores_LE.mean(dim=1, keepdim=True)
    spread_L1 = scores_LE.std(dim=1, keepdim=True, correction=0)
    standard_LE = centred_LE / spread_L1.clamp(min=1e-6)  # equal scores say nothing: zeros, not noise
    return torch.cat([standard_LE, torch.full_like(spread_L1, budget_share)], dim=1)


class Assembler(nn.Module):
    """Condition (L, E + 1) -> edge logits (L, E, E); a fresh one stays close to the prior for every
    client."""

    prior_LEE: Tensor
    above_EE: Tensor

    def __init__(self, config: AssemblerConfig, prior_LEE: Tensor, seed: int) -> None:
        """prior_LEE: (L, E, E) logits to start from; only its strictly upper entries matter, they must be
        finite."""
        super().__init__()
        expected = (config.layers, config.num_experts, config.num_experts)
        if tuple(prior_LEE.shape) != expected:
            raise InputError(f"prior must have shape (L, E, E) = {expected}, got {tuple(prior_LEE.shape)}")
        above_EE = torch.ones(expected[1:], dtype=torch.bool, device=prior_LEE.device).triu(diagonal=1)
        if not prior_LEE[:, above_EE].isfinite().all():
            raise InputError("prior must be finite above the diagonal: use large negative logits, not -inf")
        self.config = config
        self.register_buffer("prior_LEE", prior_LEE.float(), persistent=False)
        self.register_buffer("above_EE", above_EE, persistent=False)

        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * std)

        width, hidden, out = config.num_experts + 1, config.hidden, config.num_experts * config.rank
        self.encode = normal(hidden, width, std=1 / math.sqrt(width))
        self.layer_embedding = normal(config.layers, hidden, std=1.0)
        self.mix = normal(hidden, hidden, std=1 / math.sqrt(hidden))
        self.mix_bias = nn.Parameter(torch.zeros(hidden))
        self.tails = normal(out, hidden, std=1 / math.sqrt(hidden))
        # small, not zero: the logits start at the prior to about 1e-2, and both factors have a gradient
        self.heads = normal(out, hidden, std=1e-2 / math.sqrt(hidden))
        if config.messages:
            self.gain_tails = normal(out, hidden, std=1 / math.sqrt(hidden))
            self.gain_heads = nn.Parameter(torch.zeros(out, hidden))

    def forward(self, condition: Tensor) -> Tensor:
        """(L, E, E) edge logits, [tail, head]; -inf on and below the diagonal."""
        learned_LEE = self._pairs(self._read(condition), self.tails, self.heads)
        return (self.prior_LEE + learned_LEE).masked_fill(~self.above_EE, float("-inf"))

    def gains(self, condition: Tensor) -> Tensor:
        """(L, E, E) what the messages of every edge are multiplied with beside the gains that all share, [tail, head];
        0 on and below the diagonal. Only with `messages`."""
        gains_LEE = self._pairs(self._read(condition), self.gain_tails, self.gain_heads)
        # A step of an optimizer that goes by signs moves all H terms of a head alike: without this, gains would go as
        # far in one local step as those that all share go in ten.
        return gains_LEE.masked_fill(~self.above_EE, 0.0) / math.sqrt(self.config.hidden)

    def _read(self, condition: Tensor) -> Tensor:
        """(L, H)"""
        assert condition.shape == (self.config.layers, self.config.num_experts + 1), condition.shape
        hidden_LH = nn.functional.gelu(condition.to(self.encode) @ self.encode.T + self.layer_embedding)
        return nn.functional.gelu(hidden_LH @ self.mix.T + self.mix_bias)

    def _pairs(self, hidden_LH: Tensor, tails: Tensor, heads: Tensor) -> Tensor:
        """(L, E, E) products of a vector for each tail and one for each head."""
        shape = (self.config.layers, self.config.num_experts, self.config.rank)
        tails_LEa, heads_LEa = ((hidden_LH @ weight.T).view(shape) for weight in (tails, heads))
        return tails_LEa @ heads_LEa.transpose(1, 2) / math.sqrt(self.config.rank)


@torch.no_grad()
def hard_graph(
    assembler: Assembler, condition: Tensor, allowed_LEE: BoolArray, edges: int, roots: int
) -> BoolArray:
    """(L, E, E) the best `edges` of each layer by the assembler's logits, of those there are (`dag.top_edges`)."""
    logits_LEE = assembler(condition.to(assembler.mix_bias.device)).double().cpu().numpy()
    return np.stack(
        [top_edges(logits_EE, allowed_EE, edges, roots)
         for logits_EE, allowed_EE in zip(logits_LEE, allowed_LEE, strict=True)]
    )  # fmt: skip
