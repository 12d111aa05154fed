"""FLOPs a token, counted as 2 for a multiply-add.

What the counters of the literature leave out is counted: the gate and the stand-ins (design 3). Attention
scores, norms, activations and the softmax are left out, as usual: they are small beside the matrices.
"""

from __future__ import annotations

from sam_ds.errors import InputError

_STANDINS = ("none", "mean", "linear")


def ffn_flops(
    *,
    hidden: int,
    neurons: int,
    num_experts: int,
    active: float,
    gated: bool,
    standin_rank: int,
    standin: str,
) -> float:
    """Forward FLOPs a token of one feed-forward layer of `neurons` in all, `active` of E experts visited.

    `active` may be a mean over tokens. All experts visited is the dense layer, which runs without gate and
    stand-ins. Raises InputError for a stand-in that does not exist and `active` outside [0, E].
    """
    if standin not in _STANDINS:
        raise InputError(f"standin must be one of {', '.join(_STANDINS)}, got {standin!r}")
    if not 0 <= active <= num_experts:
        raise InputError(f"active must be between 0 and num_experts = {num_experts}, got {active}")
    matrices = 3 if gated else 2
    experts = 2.0 * matrices * hidden * neurons * active / num_experts
    if active == num_experts:
        return experts
    gate = 2.0 * num_experts * hidden
    standins = 0.0
    if standin == "mean":
        standins = active * hidden  # adds only: the sum over all experts is known, the visited are taken off
    elif standin == "linear":
        # V, the sum over all experts, k visited to take off; or V and the E - k unvisited one by one.
        products = min(2 + active, 1 + num_experts - active)
        standins = 2.0 * products * standin_rank * hidden
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
