"""The `deepspeed` back end against DeepSpeed's own MoE layer: seconds of a step on ranks that share the experts.

One gated FFN of random weights, seen as E experts, and a graph of all edges, in which the k - roots best scores beside
the roots are the route: what `TopKGate` picks. `stock` is `deepspeed.moe.layer.MoE` with `TopKGate(k)` of E experts,
no token dropped; `stock+roots` the same work and the same routes as ours, `TopKGate(k - roots)` of E - roots experts
with the roots as one dense FFN beside it. Ours includes the gate on what the roots put out (with weights of zero, for
the sake of equal routes) and stand-ins. Forward and backward, to the input, the gate and all weights; every rank has
tokens of its own, and one thread.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam_ds.bench.layer import gated_ffn, random_layer
from sam_ds.bench.options import add_rounds, add_seed, check_sizes, numbers
from sam_ds.bench.ranks import on_ranks
from sam_ds.bench.timing import interleave
from sam_ds.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="CPU processes, over gloo")
    parser.add_argument("--ep", default="1,2", help="ranks that share the experts; parted by commas")
    parser.add_argument("--d", type=int, default=512, help="hidden size")
    parser.add_argument("--m", type=int, default=2048, help="neurons of the dense FFN")
    parser.add_argument("--tokens", type=int, default=2048, help="of each rank")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=4, help="experts a token visits, roots included")
    parser.add_argument("--roots", type=int, default=2)
    parser.set_defaults(dtype="fp32")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a layer and ep_size, seconds of rank 0. Ratios: ours / each of DeepSpeed's."""
    sizes = _check(options)
    medians = on_ranks(options.ranks, _medians, options, sizes)
    table: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for ep, own in zip(sizes, medians, strict=True):
        table += [
            {"ep_size": ep, "call": name, "median_s": value, "sam": own["sam"] / value} for name, value in own.items()
        ]
        ratios |= {f"{name} ep={ep}": own["sam"] / own[name] for name in ("stock", "stock+roots")}
    return {"rows": table, "ratios": ratios}


def _check(options: argparse.Namespace) -> list[int]:
    """The list of ep_size. Raises InputError naming the option."""
    from sam_ds.experts.deepspeed_moe import check_ep_size

    check_sizes(options, "ranks", "d", "m", "tokens", "experts", "roots")
    if options.m % options.experts:
        raise InputError(f"--experts {options.experts} does not divide --m {options.m}")
    if not options.roots < options.active < options.experts:
        raise InputError(f"--active must be between --roots {options.roots} and --experts {options.experts}, "
                         f"got {options.active}")  # fmt: skip
    sizes = numbers("ep", options.ep, int)
    for ep in sizes:
        check_ep_size(options.experts, options.roots, ep, options.ranks)
        if (options.experts - options.roots) % ep:
            raise InputError(f"--experts less --roots must be a multiple of every --ep, got {options.experts} - "
                             f"{options.roots} and {ep}: DeepSpeed's own layer knows no other")  # fmt: skip
    return sizes


class _Stock(nn.Module):
    """DeepSpeed's layer with random experts, and `roots` of them as a dense FFN beside it."""

    def __init__(self, options: argparse.Namespace, roots: int, ep: int, gate_Ed: Tensor) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        neurons = options.m // options.experts
        routed = options.experts - roots
        self.roots = gated_ffn(options.d, roots * neurons) if roots else None
        self.moe = MoE(
            options.d, gated_ffn(options.d, neurons), num_experts=routed, ep_size=ep, k=options.active - roots,
            drop_tokens=False, min_capacity=1, top2_2nd_expert_sampling=False,
        )  # fmt: skip
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(gate_Ed)
        self.moe.set_deepspeed_parallelism()

    def forward(self, x_Td: Tensor) -> Tensor:
        y_Td: Tensor = self.moe(x_Td)[0]
        return y_Td if self.roots is None else y_Td + self.roots(x_Td)


def _medians(rank: int, options: argparse.Namespace, sizes: list[int]) -> list[dict[str, float]]:
    """Seconds by layer, for every ep_size."""
    from sam_ds.experts.deepspeed_moe import MoeFFN, spread

    # Every rank makes the same layer, and reads tokens of its own.
    _, views = random_layer(options, torch.Generator().manual_seed(options.seed), roots=options.roots, density=1.0)
    views.top_k = options.active
    gate_Ed = views.sam.wg.detach()[:, : options.d]
    with torch.no_grad():
        views.sam.wg[:, options.d :] = 0
    generator = torch.Generator().manual_seed(options.seed + 1 + rank)
    x_Td, dy_Td = (torch.randn(options.tokens, options.d, generator=generator) for _ in range(2))
    x_Td.requires_grad_()
    medians = []
    for ep in sizes:
        layer = copy.deepcopy(views)
        spread(layer, ep)
        assert isinstance(layer, MoeFFN)
        with torch.no_grad():
            error = float((layer(x_Td) - views(x_Td)).norm() / views(x_Td).norm())
        assert error < 1e-5, f"the back ends differ by {error}"
        torch.manual_seed(options.seed)
        layers = {
            "sam": layer, "stock": _Stock(options, 0, ep, gate_Ed),
            "stock+roots": _Stock(options, options.roots, ep, gate_Ed[options.roots :]),
        }  # fmt: skip
        calls = {name: _call(one, x_Td, dy_Td) for name, one in (layers | {"views": views}).items()}
        timed = interleave(calls, rounds=options.rounds)
        medians.append({name: own.median for name, own in timed.items()})
    return medians


def _call(layer: nn.Module, x_Td: Tensor, dy_Td: Tensor) -> Callable[[int], None]:
    parameters = [x_Td, *layer.parameters()]

    def call(_: int) -> None:
        for parameter in parameters:
            parameter.grad = None
        # No rank begins before all have arrived: what is timed is the layer, not who was late.
        dist.barrier()
        layer(x_Td).backward(dy_Td)

    return call
