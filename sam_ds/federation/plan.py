"""What a run will need, from its configuration and the model's alone: no weights and no text.

The model is built on the meta device, where tensors have shapes and nothing else, converted there and cut down to each
tier, so what is counted is what the run's own code makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from transformers import AutoConfig, PreTrainedModel

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.memory import GIB, Estimate, slot_model
from sam_ds.clients.tiers import check_tiers
from sam_ds.config import RunConfig, TierSection
from sam_ds.data.base_model import BaseRecipe, base_config
from sam_ds.errors import InputError
from sam_ds.evaluation.costs import ffn_flops, training_flops
from sam_ds.experts.checkpoint import readable
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import check_architecture
from sam_ds.experts.surgery import find_ffns
from sam_ds.experts.units import Field, expert_weights, shared_parameters, trained_fields

_BITS = {"raw": 32, "bf16": 16, "int8": 8, "int4": 4}
_COUNTER = 3 * 8
"""Bytes a pair of slots: used, offered, together."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a dense model that decide FLOPs."""

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
        both = model.get_input_embeddings(), model.get_output_embeddings()
        embeddings = {own.get_parameter("weight") for own in both if own}
        return cls(
            parameters=sum(p.numel() for p in model.parameters()), layers=len(ffns), hidden=ffns[0].hidden,
            neurons=ffns[0].neurons, gated=ffns[0].gate is not None,
            vocabulary=len(both[0].get_parameter("weight")), embeddings=sum(own.numel() for own in embeddings),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TierPlan:
    """One tier: how many clients, and what one of them takes."""

    name: str
    clients: int
    tier: TierSection
    ranks: int
    """That train one of them together."""
    memory: Estimate
    """On each rank of its group."""
    first: int
    """Bytes, in half precision, of the frozen weights that a client must be given once; of the experts it holds, anew
    where those change, and of what low-rank updates are merged into."""
    down: int
    """Bytes a round: the exact values of what trains."""
    up: int
    """Bytes a round, encoded without any gain from zeros."""
    flops: float
    """Of a round's local training."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """All tiers, and how a launch of `ranks` runs them."""

    tiers: Sequence[TierPlan]
    ranks: int
    groups: int
    """Of the largest size; the clients of smaller ones share them."""
    rank_bytes: int
    """A rank keeps an engine for every tier, and trains in one at a time."""

    def expected(self, what: str, clients: int) -> float:
        """Of the drawn clients of a round together: `down`, `up` or `flops`."""
        total = sum(plan.clients for plan in self.tiers)
        return clients / total * sum(plan.clients * float(getattr(plan, what)) for plan in self.tiers)

    def seconds(self, clients: int, flops_per_second: float) -> float:
        """Expected time of a round's local training: the ranks share the work, and the last client is not divided."""
        longest = max(plan.flops / plan.ranks for plan in self.tiers)
        return max(self.expected("flops", clients) / self.ranks, longest) / flops_per_second


def plan_run(config: RunConfig, *, ranks: int, rank_gib: float) -> RunPlan:
    """Raises InputError as the run itself would, and where the engines of a rank do not fit into its memory."""
    if config.method != "sam":
        raise InputError(f"plan is of method = 'sam', where tiers differ; {config.method} trains the same on every "
                         "client")  # fmt: skip
    size = config.pod
    if ranks < 1 or ranks % size:
        raise InputError(f"--ranks {ranks} is no multiple of the largest worker group, of {size}")
    with readable(config.model):
        embedded = config.model == "embedded"
        architecture = base_config(BaseRecipe()) if embedded else AutoConfig.from_pretrained(config.model)
        dense = check_architecture(architecture, SamConfig.of_run(config))
    shape = ModelShape.of(dense)
    memory = check_tiers(dense, config)
    dealt = dealt_tiers(config)
    tiers = [
        _tier_plan(config, shape, dense, name, dealt.count(name), own) for name, own in memory.items()
    ]  # fmt: skip
    rank_bytes = sum(own.kept for own in memory.values()) + max(own.peak - own.kept for own in memory.values())
    if rank_bytes > rank_gib * GIB:
        worst = max(tiers, key=lambda own: own.memory.peak)
        raise InputError(f"a rank needs {rank_bytes / GIB:.1f} GiB for the engines of all tiers, it has {rank_gib:g}: "
                         f"give tiers.{worst.name} fewer experts, precision = 'nf4' or a ds_config that offloads, or "
                         "raise its ranks under ZeRO-3")  # fmt: skip
    return RunPlan(tiers=tiers, ranks=ranks, groups=ranks // size, rank_bytes=rank_bytes)


def _tier_plan(
    config: RunConfig, shape: ModelShape, dense: PreTrainedModel, name: str, clients: int, memory: Estimate
) -> TierPlan:
    tier, dense_too = config.tiers[name], config.train.dense
    model = slot_model(dense, tier, config)
    sizes = {path: parameter.numel() for path, parameter in model.named_parameters()}
    fields = trained_fields(model, tier.trains)
    shared = sum(sizes[path] for path in shared_parameters(model, tier.trains, dense=dense_too).values())
    expert = sum(_of_one(field, sizes, tier.experts) for field in fields)
    trained = {field.parameter for field in fields}
    frozen = [field for field in expert_weights(model) if field.parameter not in trained]
    added = (".sam.", ".lora.", "sam_assembler.")
    kept = {field.parameter for field in expert_weights(model)} | set(
        shared_parameters(model, tier.trains, dense=dense_too).values()
    )
    other = sum(size for path, size in sizes.items() if path not in kept and not any(a in path for a in added))
    sent = (tier.sends or tier.experts) * expert + shared
    cores = [layer.sam.core_SQp for layer in model.sam_layers] if config.federation.refit_standins else []
    standins = sum(core.numel() // tier.experts * config.sam.num_experts for core in cores)
    return TierPlan(
        name=name, clients=clients, tier=tier, ranks=config.ranks_of(tier), memory=memory,
        first=2 * (other + tier.experts * sum(_of_one(field, sizes, tier.experts) for field in frozen)),
        down=4 * (tier.experts * expert + shared + standins),
        up=_BITS[config.wire.values] * sent // 8 + _COUNTER * len(model.sam_layers) * tier.experts**2,
        flops=_flops(config, shape, tier),
    )  # fmt: skip


def _of_one(field: Field, sizes: dict[str, int], slots: int) -> int:
    return sizes[field.parameter] // slots


def _flops(config: RunConfig, shape: ModelShape, tier: TierSection) -> float:
    """Of one client's local training in a round."""
    flops = partial(ffn_flops, hidden=shape.hidden, neurons=shape.neurons, gated=shape.gated, held=tier.experts)
    sam = SamConfig.of_run(config)
    routed = flops(sam, active=min(config.sam.top_k, tier.experts))
    held = flops(replace(sam, semantics="reach"), active=tier.experts)
    whole = sum(config.train.whole_steps()) / config.train.steps
    ffn = shape.layers * (whole * held + (1 - whole) * routed)
    other = shape.parameters - shape.layers * shape.ffn_parameters - shape.embeddings
    # The output embedding is a product, the input embedding a look-up.
    other += shape.vocabulary * shape.hidden
    tokens = config.train.steps * config.train.batch * config.train.sequence
    return tokens * training_flops(other_parameters=other, ffn=ffn, frozen=tier.trains == "lora")

