"""What an expert's output matters to a token: the quantity that grouping, gates and budgets are all about.

Legend: T tokens, E experts, n neurons an expert, d outputs.
"""

from __future__ import annotations

from torch import Tensor


def expert_mass(hidden_TEn: Tensor, down_End: Tensor, metric_dd: Tensor | None = None) -> Tensor:
    """(T, E) ||W_e' h_e||^2 of what the neurons put out, or in the norm v' M v of a metric (d, d).

    Computed in the n neurons of an expert, h' (W M W') h, which are far fewer than the outputs.
    """
    inner_Edn = down_End.transpose(1, 2) if metric_dd is None else metric_dd @ down_End.transpose(1, 2)
    hidden_ETn = hidden_TEn.transpose(0, 1)
    return (hidden_ETn @ (down_End @ inner_Edn) * hidden_ETn).sum(-1).clamp(min=0).t()
