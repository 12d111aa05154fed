"""A client that holds some of the experts against one that holds and visits all: time, memory, bytes.

A Llama of random weights, converted. Both clients visit all experts they hold; the other experts are the stand-ins'.
`step` is the forward and backward pass of the feed-forward layers, to their inputs and all that trains; `weights` the
bytes of their matrices, stand-ins apart; `up` what a round's update of them takes encoded, random deltas without zeros,
`down` the same, for what trains comes and goes; `first` all that a client must be given before its first round.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.bench.timing import interleave
from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.layer import STANDINS
from sam_ds.experts.model import SamMixin
from sam_ds.experts.slots import StandInStore, hold_experts, to_slots
from sam_ds.experts.units import TRAINS, expert_weights, prepare, read_units, trained_fields
from sam_ds.wire.codec import encode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, default=512, help="hidden size")
    parser.add_argument("--m", type=int, default=2048, help="neurons of an FFN")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048, help="a step")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--held", type=int, default=4, help="experts that the smaller client holds, roots included")
    parser.add_argument("--trains", choices=TRAINS[:2], default="full")
    parser.add_argument("--standin-rank", type=int, default=16)
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: what, of both clients. Ratios: the smaller / the larger."""
    check_sizes(options, "d", "m", "layers", "tokens")
    if not SamConfig.roots < options.held < options.experts:
        raise InputError(f"--held must be above the root and below --experts {options.experts}, got {options.held}")
    with TemporaryDirectory() as folder:
        model = converted_llama(options, top_k=options.held, standin_rank=options.standin_rank)
        model.save_pretrained(folder)
        clients = {held: _client(options, folder, held) for held in (options.held, options.experts)}
    x_Td, dy_Td = (torch.randn(options.tokens, options.d) for _ in range(2))
    calls = {str(held): lambda _, own=model: _step(own, x_Td, dy_Td) for held, model in clients.items()}
    timed = interleave(calls, rounds=options.rounds)
    found = {held: {"step": timed[str(held)].median} | _sizes(options, model) for held, model in clients.items()}
    small, large = found[options.held], found[options.experts]
    rows = [
        {"what": what, str(options.held): small[what], str(options.experts): large[what],
         "ratio": small[what] / large[what] if large[what] else float("nan")}
        for what in small
    ]  # fmt: skip
    return {"rows": rows, "ratios": {what: small[what] / large[what] for what in small if large[what]}}


def converted_llama(
    options: argparse.Namespace, *, top_k: int, standin_rank: int = SamConfig.standin_rank
) -> SamMixin:
    """A Llama of random weights of the options' sizes; neurons are clustered, and not regrouped."""
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=options.d, intermediate_size=options.m, num_hidden_layers=options.layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
    )).eval()  # fmt: skip
    config = SamConfig(
        num_experts=options.experts, top_k=top_k, routing="top_k", allocation="uniform", regroups=0,
        standin_rank=min(standin_rank, options.d),
    )  # fmt: skip
    ids_BS = torch.randint(512, (4 * options.experts, 128))
    return get_sam_model(model, config, calibration=ids_BS, progress=False)


def _client(options: argparse.Namespace, folder: str, held: int) -> SamMixin:
    model = from_pretrained(folder)
    cores = StandInStore(model).core
    weights = {field.parameter: model.get_parameter(field.parameter).detach() for field in expert_weights(model)}
    to_slots(model, held)
    hold_experts(model.sam_layers, cores, [range(held)] * options.layers)
    with torch.no_grad():
        for field in expert_weights(model):
            for slot in range(held):
                field.write(model.get_parameter(field.parameter), slot, field.read(weights[field.parameter], slot))
    prepare(model, options.trains, rank=16, alpha=16, seed=0, dense=False)
    for layer in model.sam_layers:
        layer.top_k = held
    return model


def _step(model: SamMixin, x_Td: Tensor, dy_Td: Tensor) -> None:
    for layer in model.sam_layers:
        for parameter in layer.parameters():
            parameter.grad = None
        layer(x_Td.detach().requires_grad_()).backward(dy_Td)


def _sizes(options: argparse.Namespace, model: SamMixin) -> dict[str, float]:
    """Bytes."""
    layers = model.sam_layers
    fields = [field for field in trained_fields(model, options.trains) if field.tensor != "wg"]
    held = [range(layer.slots) for layer in layers]
    units = read_units(fields, {}, dict(model.named_parameters()), held)
    up = sum(len(encode(torch.randn(value.shape).numpy(), base_round=1)) for value in units.values())
    standins = [getattr(layer.sam, name) for layer in layers for name in STANDINS]
    weights = sum(m.numel() * m.element_size() for layer in layers for m in layer.matrices() if m is not None)
    everything = [value for name, value in model.state_dict().items() if ".lora." not in name]
    return {
        "weights": weights, "stand-ins": sum(t.numel() * t.element_size() for t in standins), "down": up, "up": up,
        "first": sum(t.numel() * t.element_size() for t in everything),
    }  # fmt: skip
