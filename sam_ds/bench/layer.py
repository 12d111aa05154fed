"""A SAM layer against the dense FFN and the expert layers of transformers and DeepSpeed: seconds at the same routes.

One gated FFN of random weights, seen as E experts; a random graph of half of the edges, stand-ins of rank 16. In ours
all that a converted model does is timed: scores, route, stand-ins. The peers get its choices, and their outputs are
compared with ours less the stand-ins. `ideal` is k / E of the dense FFN's median. `message` is our layer, its experts
sending their outputs along all edges, and has no peer: its ratio is to ours without. Forward is without gradients;
backward is to the input, the gate, the gains and all weights.

Legend: T tokens, E experts, J = k - roots choices, d hidden, m neurons, q and p input and output rank of the stand-ins.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from sam_ds.bench.options import add_rounds, add_seed, check_sizes, numbers
from sam_ds.bench.timing import Timed, interleave
from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import wrap_ffns
from sam_ds.experts.surgery import find_ffns
from sam_ds.graph.dag import random_graph
from sam_ds.graph.route import route

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PASSES = ("forward", "forward+backward")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, default=1024, help="hidden size")
    parser.add_argument("--m", type=int, default=4096, help="neurons of the dense FFN")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", default="4,8", help="experts a token visits, roots included; parted by commas")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32")
    parser.add_argument("--device", default="cpu")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a layer, pass and k. Ratios: ours / the ideal, ours / each other layer, and ours with messages / ours."""
    active = _check(options)
    if not torch.cuda.is_available():
        # DeepSpeed would look for an accelerator, and print that it found none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from sam_ds.bench.layer_peers import TRANSFORMERS, DeepSpeedLayer, TransformersLayer

    generator = torch.Generator().manual_seed(options.seed)
    dtype, device = _DTYPES[options.dtype], torch.device(options.device)
    dense, layer = random_layer(options, generator)
    dense, layer = dense.to(device), layer.to(device)
    sender = with_messages(dense, layer)
    x_Td, dy_Td = (
        torch.randn(options.tokens, options.d, generator=generator).to(device, dtype).requires_grad_(needed)
        for needed in (True, False)
    )
    table, ratios = [], {}
    for k in active:
        layer.top_k = sender.top_k = k
        routing = route(layer.scores(x_Td), layer.sam.adjacency_SS, roots=layer.roots, k=k)
        peers: dict[str, nn.Module] = {
            name: TransformersLayer(layer, routing.chosen_TJ, name) for name in TRANSFORMERS
        } | {"deepspeed": DeepSpeedLayer(layer, routing.chosen_TJ, gated_ffn)}
        with torch.no_grad():
            expected_Td = layer(x_Td) - layer.sam.standins(x_Td, routing.visited_TS.to(dtype))
            for name, peer in peers.items():
                error = float((peer(x_Td) - expected_Td).norm() / expected_Td.norm())
                assert error < 32 * torch.finfo(dtype).eps, f"{name} computes something else: {error}"
        layers = {"dense": dense, "sam": layer, "message": sender} | peers
        for title in _PASSES:
            calls = {name: _call(one, x_Td, dy_Td if title != "forward" else None) for name, one in layers.items()}
            timed = interleave(calls, rounds=options.rounds)
            table += _rows(timed, title, k, k / options.experts)
            ours = timed["sam"].median
            ratios[f"ideal k={k} {title}"] = ours / (timed["dense"].median * k / options.experts)
            ratios[f"message k={k} {title}"] = timed["message"].median / ours
            for name in peers:
                ratios[f"{name} k={k} {title}"] = ours / timed[name].median
    return {"rows": table, "ratios": ratios}


def _check(options: argparse.Namespace) -> list[int]:
    """The list of k. Raises InputError naming the option."""
    check_sizes(options, "d", "m", "tokens", "experts")
    active = numbers("active", options.active, int)
    least = SamConfig.roots + 1
    if not all(least <= k < options.experts for k in active):
        raise InputError(f"--active must be from {least} (one more than the roots) to {options.experts - 1} (one less "
                         f"than --experts), got {options.active}")  # fmt: skip
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {options.device!r}: {str(error).splitlines()[0]}") from error
    return active


def random_layer(
    options: argparse.Namespace, generator: torch.Generator, *, roots: int = SamConfig.roots, density: float = 0.5
) -> tuple[nn.Module, SamFFN]:
    """The dense FFN and the layer made from it, on the same weights; all that a conversion would fit is random."""
    # A fixed number of experts a token, for the peers know no other.
    config = SamConfig(
        num_experts=options.experts, top_k=options.experts, routing="top_k", standin_rank=min(16, options.d),
        density=density, roots=roots,
    )  # fmt: skip

    def normal(to: Tensor, fan_in: int) -> None:
        to.copy_(torch.randn(to.shape, generator=generator) / fan_in**0.5)

    mlp = gated_ffn(options.d, options.m).to(_DTYPES[options.dtype])
    (ffn,) = find_ffns(nn.ModuleDict({"mlp": mlp}))
    (layer,) = wrap_ffns([ffn], config)
    parts = layer.sam
    with torch.no_grad():
        for weight in mlp.parameters():
            normal(weight, weight.shape[1])
        normal(parts.wg, parts.wg.shape[1])
        normal(parts.basis_dq, options.d)
        # All stand-ins together are then about as large as the FFN's output.
        normal(parts.core_SQp, options.experts * parts.core_SQp.shape[1])
        normal(parts.spread_pd, parts.spread_pd.shape[0])
        parts.core_SQp[: layer.roots] = 0
        parts.core_all_Qp.copy_(parts.core_SQp.sum(0))
        edges = round(config.density * options.experts * (options.experts - 1) / 2)
        rng = np.random.default_rng(options.seed)
        parts.adjacency_SS.copy_(torch.from_numpy(random_graph(options.experts, edges, layer.roots, rng)))
    return mlp, layer


def with_messages(dense: nn.Module, layer: SamFFN) -> SamFFN:
    """The layer again, on the same weights, with gains that are not 0."""
    (ffn,) = find_ffns(nn.ModuleDict({"mlp": dense}))
    config = SamConfig(
        num_experts=layer.slots, top_k=layer.slots, roots=layer.roots, routing="top_k", semantics="message",
        standin_rank=layer.sam.basis_dq.shape[1],
    )  # fmt: skip
    (sender,) = wrap_ffns([ffn], config)
    sender.sam.load_state_dict(layer.sam.state_dict(), strict=False)
    assert sender.sam.gain_SE is not None
    nn.init.constant_(sender.sam.gain_SE, 0.1)
    return sender


def gated_ffn(hidden: int, neurons: int) -> LlamaMLP:
    """Llama's: down(silu(gate(x)) * up(x))."""
    # One head: its number need then not divide a hidden size that has no attention to it.
    return LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=neurons, num_attention_heads=1))


def _call(layer: nn.Module, x_Td: Tensor, dy_Td: Tensor | None) -> Callable[[int], None]:
    """One forward pass; with `dy_Td`, and one backward pass into fresh gradients."""
    parameters = [x_Td, *layer.parameters()]

    def call(_: int) -> None:
        if dy_Td is None:
            with torch.no_grad():
                layer(x_Td)
            return
        for parameter in parameters:
            parameter.grad = None
        layer(x_Td).backward(dy_Td)

    return call


def _rows(timed: dict[str, Timed], title: str, k: int, share: float) -> list[dict[str, Any]]:
    rows = []
    for name, own in timed.items():
        ratio = own.median / timed["dense"].median
        rows.append({
            "call": name, "pass": title, "k": k, "median_s": own.median, "dense": ratio, "ideal": ratio / share,
        })  # fmt: skip
    return rows
