"""FLOPs a token, counted as 2 for a multiply-add.

What the counters of the literature leave out is counted: the gate and the stand-ins (design 3). Attention
scores, norms, activations and the softmax are left out, as usual: they are small beside the matrices.
"""

from __future__ import annotations

from sam_ds.errors import InputError
from sam_ds.experts.config import standin_shape


def ffn_flops(
    *,
    hidden: int,
    neurons: int,
    num_experts: int,
    active: float,
    gated: bool,
    roots: int,
    standin_rank: int,
    standin: str,
) -> float:
    """Forward FLOPs a token of one feed-forward layer of `neurons` in all, `active` of E experts visited.

    `active` may be a mean over tokens. All experts visited is the dense layer, which runs without gate and
    stand-ins. Raises InputError for a stand-in that does not exist and `active` outside [0, E].
    """
    rank, outputs = standin_shape(
        standin, num_experts=num_experts, roots=roots, rank=standin_rank, hidden=hidden
    )  # fmt: skip
    if not 0 <= active <= num_experts:
        raise InputError(f"active must be between 0 and num_experts = {num_experts}, got {active}")
    matrices = 3 if gated else 2
    experts = 2.0 * matrices * hidden * neurons * active / num_experts
    if active == num_experts:
        return experts
    gate = 2.0 * num_experts * hidden
    # The layer's form: V x, every expert's core, the output basis (experts/standins.py).
    standins = 2.0 * (rank * hidden + num_experts * (rank + 1) * outputs + outputs * hidden)
    return experts + gate + standins


def forward_flops(*, other_parameters: int, ffn: float) -> float:
    """Forward FLOPs a token of a model: `ffn` of all layers, and 2 for each parameter outside them."""
    return 2.0 * other_parameters + ffn


def training_flops(*, other_parameters: int, ffn: float, frozen: bool) -> float:
    """FLOPs a token of a training step: forward, gradients of the inputs, gradients of the weights.

    Each costs as much as the forward pass; with frozen base weights (adapters) the third is left out, for the
    adapters' own share is small.
    """
    return (2.0 if frozen else 3.0) * forward_flops(other_parameters=other_parameters, ffn=ffn)
