"""FLOPs a token, counted as 2 for a multiply-add.

What the counters of the literature leave out is counted: the gate and the stand-ins. Attention
scores, norms, activations and the softmax are left out, as usual: they are small beside the matrices.
"""

from __future__ import annotations

from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig


def dense_flops(*, hidden: int, neurons: int, gated: bool) -> float:
    """Forward FLOPs a token of one dense feed-forward layer."""
    return 2.0 * (3 if gated else 2) * hidden * neurons


def ffn_flops(
    config: SamConfig, *, hidden: int, neurons: int, gated: bool, active: float, held: int | None = None
) -> float:
    """Forward FLOPs a token of one converted layer of `neurons` in all, `active` of E experts visited, on a client
    that holds `held` of them (None: all).

    `active` may be a mean over tokens. Where all that are held are visited there is no gate, and one sum stands in for
    those that are not held: all E visited is the dense layer. A message is `hidden` multiply-adds; that two visited
    experts have an edge is taken to be as likely as for any two in the first graph. Raises InputError for `held`
    outside [0, E] or `active` outside [0, held].
    """
    experts = config.num_experts
    held = experts if held is None else held
    if not 0 <= held <= experts:
        raise InputError(f"held must be between 0 and num_experts = {experts}, got {held}")
    if not 0 <= active <= held:
        raise InputError(f"active must be between 0 and {held}, the experts that are held, got {active}")
    dense = dense_flops(hidden=hidden, neurons=neurons, gated=gated)
    messages = 0.0
    if config.semantics == "message":
        pairs = (active * (active - 1) - config.roots * (config.roots - 1)) / 2
        messages = 2.0 * hidden * config.density * max(0.0, pairs)
    computed = dense * active / experts + messages
    if active == experts:
        return computed
    rank, outputs = config.standin_shape(hidden)
    # The layer's form: V x, the cores, the output basis (experts/standins.py).
    cores = 1 if active == held else experts
    standins = 2.0 * (rank * hidden + cores * (rank + 1) * outputs + outputs * hidden)
    if active == held:
        return computed + standins
    inner, width = config.router_shape(hidden=hidden, neurons=neurons, gated=gated)
    return computed + 2.0 * (hidden * inner + experts * width) + standins


def forward_flops(*, other_parameters: int, ffn: float) -> float:
    """Forward FLOPs a token of a model: `ffn` of all layers, and 2 for each parameter outside them."""
    return 2.0 * other_parameters + ffn


def training_flops(*, other_parameters: int, ffn: float, frozen: bool) -> float:
    """FLOPs a token of a training step: forward, gradients of the inputs, gradients of the weights.

    Each costs as much as the forward pass; with frozen base weights (adapters) the third is left out, for the
    adapters' own share is small.
    """
    return (2.0 if frozen else 3.0) * forward_flops(other_parameters=other_parameters, ffn=ffn)
