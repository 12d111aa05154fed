"""Device tiers: what a class of clients holds and trains, and whether its memory can.

The estimate counts the model's own tensors and what training adds, per rank; the interpreter and its libraries are
not in it. Legend: L layers, E experts, b experts held, d hidden, m FFN neurons, q stand-in rank, R LoRA rank.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from sam_ds.config import RunConfig, TierSection, ds_config_path
from sam_ds.errors import InputError
from sam_ds.experts.config import router_shape, standin_shape
from sam_ds.experts.surgery import find_ffns

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a dense model that decide memory and FLOPs."""

    parameters: int
    layers: int
    hidden: int
    neurons: int
    gated: bool
    vocabulary: int
    embeddings: int
    """Parameters of the input and, where it is another one, the output embedding."""

    @property
    def ffn_parameters(self) -> int:
        """Of one layer's FFN, biases aside."""
        return (3 if self.gated else 2) * self.hidden * self.neurons

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelShape:
        """Measure a dense model. Raises InputError where no FFN is found."""
        ffns = find_ffns(model)
        embeddings = {own.weight for own in (model.get_input_embeddings(), model.get_output_embeddings()) if own}
        return cls(
            parameters=sum(p.numel() for p in model.parameters()), layers=len(ffns), hidden=ffns[0].hidden,
            neurons=ffns[0].neurons, gated=ffns[0].gate is not None,
            vocabulary=model.get_input_embeddings().weight.shape[0], embeddings=sum(own.numel() for own in embeddings),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes per rank of one client in training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(shape: ModelShape, tier: TierSection, config: RunConfig) -> Estimate:
    """Device memory of a client of this tier, on each of its ranks.

    ZeRO keeps an fp32 master of what trains beside the compute copy; it shards this from stage 1 on, gradients from
    stage 2, weights at stage 3. What it offloads is not in the estimate.
    """
    zero = read_ds_config(tier.ds_config).get("zero_optimization", {})
    stage, ranks = zero.get("stage", 0), config.runtime.ranks_per_client
    moved = {
        name: (zero.get(f"offload_{name}") or {}).get("device", "none") != "none" for name in ("optimizer", "param")
    }
    share = tier.experts / config.sam.num_experts
    word = 4 if tier.precision == "fp32" else 2
    ffn = shape.layers * shape.ffn_parameters * share
    other = shape.parameters - shape.layers * shape.ffn_parameters
    rank, outputs = standin_shape(
        config.sam.standin, num_experts=config.sam.num_experts, roots=config.sam.roots, rank=config.sam.standin_rank,
        hidden=shape.hidden,
    )  # fmt: skip
    standins = shape.layers * ((rank + outputs) * shape.hidden + tier.experts * (rank + 1) * outputs)
    _, features = router_shape(
        config.sam.router, hidden=shape.hidden, num_experts=config.sam.num_experts,
        root_neurons=config.sam.roots * shape.neurons // config.sam.num_experts, rank=config.sam.router_rank,
        gated=shape.gated,
    )  # fmt: skip
    gates = shape.layers * tier.experts * features
    if tier.trains == "full":
        trained = ffn + gates + (other if config.train.dense else 0)
    else:
        matrices = 3 if shape.gated else 2
        trained = shape.layers * matrices * share * shape.neurons * config.train.lora_rank + gates
    tokens = config.train.batch * config.train.sequence / ranks
    # Per layer: about 12 hidden-sized tensors of the block, and the FFN's inner tensors for the visited share.
    visited = min(config.sam.top_k, tier.experts) / config.sam.num_experts
    per_token = shape.layers * (12 * shape.hidden + 4 * visited * shape.neurons) + 3 * shape.vocabulary
    # In 4 bits half a byte, a byte for every 64 values and a scale for every 256 of those.
    packed = 0.5 + 1 / 64 + 4 / (64 * 256) if tier.precision == "nf4" else word
    weights = (ffn + other - shape.embeddings) * packed + shape.embeddings * word + (standins + gates) * 4
    states = trained * (12 if stage else 8)
    return Estimate(
        weights=0 if moved["param"] else int(weights / (ranks if stage == 3 else 1)),
        gradients=int(trained * 4 / (ranks if stage >= 2 else 1)),
        optimizer=0 if moved["optimizer"] else int(states / (ranks if stage else 1)),
        activations=int(tokens * per_token * word),
    )  # fmt: skip


def check_tiers(shape: ModelShape, config: RunConfig) -> None:
    """Raises InputError for a tier whose memory cannot hold its budget, whose DeepSpeed configuration contradicts the
    run, or that trains something else than the others, before any model is loaded onto it."""
    kinds = {tier.trains for tier in config.tiers.values() if tier.share > 0.0}
    if config.method == "sam" and len(kinds) > 1:
        raise InputError(f"tiers train {' and '.join(sorted(kinds))}: updates of different kinds cannot be averaged; "
                         "give every tier the same `trains`")  # fmt: skip
    for name, tier in config.tiers.items():
        if tier.share == 0.0:
            continue
        ds_config(tier, config)
        if tier.precision != "fp32" and not get_accelerator().is_bf16_supported():
            raise InputError(f"tiers.{name}: precision = {tier.precision!r} computes in bf16, which this machine's "
                             "accelerator does not know; give precision = 'fp32', or run elsewhere")  # fmt: skip
        if config.method != "sam":
            if tier.precision == "nf4":
                raise InputError(f"tiers.{name}: {config.method} trains what nf4 freezes; give precision = 'fp32' or "
                                 "'bf16', or method = 'sam'")  # fmt: skip
            continue
        if tier.precision == "nf4" and tier.trains != "lora":
            raise InputError(f"tiers.{name}: weights in 4 bits do not train; give trains = 'lora', or precision = "
                             "'fp32' or 'bf16'")  # fmt: skip
        if tier.precision == "nf4" and shape.hidden * shape.neurons // config.sam.num_experts % 64:
            raise InputError(f"tiers.{name}: an expert's matrix of {shape.neurons // config.sam.num_experts} x "
                             f"{shape.hidden} values is no multiple of nf4's blocks of 64; lower sam.num_experts, or "
                             "give precision = 'bf16'")  # fmt: skip
        need = estimate(shape, tier, config).total / GIB
        if need > tier.memory_gib:
            raise InputError(
                f"tiers.{name}: {tier.experts} experts with {tier.trains!r} training need about {need:.2f} GiB, "
                f"memory_gib is {tier.memory_gib}; lower experts or train.batch, or use trains = 'lora'"
            )


def read_ds_config(name: str) -> dict[str, Any]:
    """The JSON of a tier, as it is in its file. Raises InputError where it is not JSON."""
    path = Path(ds_config_path(name))
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"DeepSpeed configuration {name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"DeepSpeed configuration {name}: must be a JSON object")
    return value


def ds_config(tier: TierSection, config: RunConfig) -> dict[str, Any]:
    """The tier's DeepSpeed configuration with every "auto" filled from the run.

    Raises InputError for a value that contradicts the run.
    """
    filled = {
        "train_micro_batch_size_per_gpu": config.train.batch // config.runtime.ranks_per_client,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip,
        "bf16.enabled": tier.precision != "fp32",
    }
    values = read_ds_config(tier.ds_config)
    for key, value in filled.items():
        *outer, last = key.split(".")
        section = values
        for name in outer:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(f"{tier.ds_config}: {name} = {section!r} must be an object; leave it out, or write "
                                 f"{{{last!r}: \"auto\"}}")  # fmt: skip
        given = section.get(last, "auto")
        if given not in ("auto", value):
            raise InputError(f"{tier.ds_config}: {key} = {given} contradicts the run's {value}; write \"auto\"")
        section[last] = value
    values.pop("train_batch_size", None)
    if tier.precision != "fp32" and not values.get("zero_optimization", {}).get("stage", 0):
        # Its fp32 copies of what trains are nowhere to be found when the next client's weights come.
        raise InputError(f"{tier.ds_config}: ZeRO stage 0 with precision = {tier.precision!r} would train every client "
                         "from the one before; give a stage from 1 to 3 (cpu_zero2.json), or precision = 'fp32'")
    return values


def dealt_tiers(config: RunConfig) -> list[str]:
    """The tier of every client: shares by largest remainder, spread evenly over the clients' order so that each
    domain gets every tier where there are enough clients."""
    clients = config.federation.clients
    names = [name for name, tier in config.tiers.items() if tier.share > 0.0]
    exact = [config.tiers[name].share * clients for name in names]
    counts = [int(value) for value in exact]
    for index in sorted(range(len(names)), key=lambda i: counts[i] - exact[i])[: clients - sum(counts)]:
        counts[index] += 1
    dealt: list[str] = []
    given = [0] * len(names)
    for position in range(clients):
        behind = [counts[i] * (position + 1) / clients - given[i] for i in range(len(names))]
        index = int(torch.tensor(behind).argmax())
        given[index] += 1
        dealt.append(names[index])
    return dealt
