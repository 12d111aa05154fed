"""What the conversion is measured against: published ways to compute only a share of an FFN, without training.

Each is quality only: the dense layer is computed and what a token would not visit is masked, so the figures are exact
and nothing is said about speed. FLOPs are what the method would cost, its router counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from sam_ds.errors import InputError
from sam_ds.evaluation.baselines.cmoe import CMOE
from sam_ds.evaluation.baselines.keys import EMOE, MOEFICATION
from sam_ds.evaluation.baselines.masked import Method
from sam_ds.evaluation.baselines.random_split import LLAMA_MOE, RANDOM
from sam_ds.evaluation.baselines.static import FLAP, STATIC
from sam_ds.evaluation.costs import dense_flops
from sam_ds.experts.surgery import FFN

BASELINES: dict[str, Method] = {
    "emoe": EMOE, "moefication": MOEFICATION, "cmoe": CMOE, "random": RANDOM, "static": STATIC, "flap": FLAP,
    "llama_moe": LLAMA_MOE,
}  # fmt: skip


def baseline_flops(method: Method, ffn: FFN, *, num_experts: int, k: int) -> float:
    """Forward FLOPs a token of one layer: k of E experts, and the router where there is something to choose."""
    gated = ffn.gate is not None
    dense = dense_flops(hidden=ffn.hidden, neurons=ffn.neurons, gated=gated)
    router = method.router_flops(ffn.hidden, num_experts, k, gated) if k < num_experts or method.weighted else 0.0
    return dense * k / num_experts + router


def largest_k(method: Method, ffns: Sequence[FFN], *, num_experts: int, share: float) -> list[int]:
    """The most experts of each layer whose counted FLOPs are at most this share of the dense layer's.

    A method that works on single neurons has as many experts as the layer has neurons. Raises InputError where not
    even one expert fits.
    """
    found = []
    for ffn in ffns:
        experts = ffn.neurons if method.per_neuron else num_experts
        dense = baseline_flops(STATIC, ffn, num_experts=experts, k=experts)

        def cost(k: int, ffn: FFN = ffn, experts: int = experts, dense: float = dense) -> float:
            return baseline_flops(method, ffn, num_experts=experts, k=k) / dense

        fits = next((k for k in range(experts, 0, -1) if cost(k) <= share), None)
        if fits is None:
            raise InputError(f"share = {share} leaves {method.name} with {experts} experts no expert to visit: one "
                             f"and the router cost {cost(1):.3f} of the dense layer; give a larger share")  # fmt: skip
        found.append(fits)
    return found
