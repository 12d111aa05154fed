"""LoRA whose trained factor belongs to an expert, slice by slice (FFA-LoRA, Sun et al., 2403.12313).

delta W = scale * A B for gate and up with B (R, m) sliced by neuron, and delta W_down = scale * A B with A (m, R)
sliced by neuron. The other factor is frozen and drawn from the run's seed, so delta W is linear in what is averaged
and an average of slices is the average of the updates. With `both=True` the frozen factors train too (FedIT's way:
the mean of products is not the product of the means; biased, kept as the control).

The neuron-owned factors are stored neuron first, (S n, R), so that expert s owns the rows [s n, (s+1) n).
Legend: S slots, n neurons a slot, R rank, d hidden.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


# Final, so that a type checker knows it to be true wherever it is not None.
@final
class LoraSlices(nn.Module):
    """The low-rank update of one FFN: trained rows per neuron (zero at the start), frozen factors from `seed`."""

    def __init__(
        self, *, hidden: int, neurons: int, gated: bool, rank: int, alpha: float, seed: int, both: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = alpha / rank

        def frozen(rows: int, columns: int) -> nn.Parameter:
            value = torch.randn(rows, columns, generator=generator) / hidden**0.5
            return nn.Parameter(value, requires_grad=both)

        # Drawn in a fixed order and independent of the number of neurons: every client holds the same factors.
        self.up_in = frozen(hidden, rank)
        self.down_out = frozen(rank, hidden)
        self.gate_in = frozen(hidden, rank) if gated else None
        self.up_rows = nn.Parameter(torch.zeros(neurons, rank))
        self.down_rows = nn.Parameter(torch.zeros(neurons, rank))
        self.gate_rows = nn.Parameter(torch.zeros(neurons, rank)) if gated else None

    @torch.no_grad()
    def deltas(self) -> dict[str, Tensor]:
        """What to add to each matrix: up and gate (d, m), down (m, d)."""
        result = {
            "up": self.scale * self.up_in @ self.up_rows.t(),
            "down": self.scale * self.down_rows @ self.down_out,
        }
        if self.gate_in is not None and self.gate_rows is not None:
            result["gate"] = self.scale * self.gate_in @ self.gate_rows.t()
        return result
