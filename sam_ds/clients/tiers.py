"""Device tiers: whether a device's memory can hold what its tier asks of it."""

from __future__ import annotations

from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from sam_ds.clients.ds_config import ds_config
from sam_ds.clients.memory import GIB, Estimate, estimate
from sam_ds.config import RunConfig
from sam_ds.errors import InputError
from sam_ds.experts.attention import attention_maps
from sam_ds.experts.surgery import find_ffns


def check_tiers(dense: PreTrainedModel, config: RunConfig) -> dict[str, Estimate]:
    """What a client of each tier needs, by the tier's name; `dense` is on the meta device. Nothing for methods that
    train the whole model on every client.

    Raises InputError for a tier whose memory cannot hold its budget, whose DeepSpeed configuration contradicts the
    run, or that trains something else than the others, before any model is loaded onto it; and for a model that has
    no attention to put low-rank updates on.
    """
    ffns = find_ffns(dense)
    ffn = ffns[0]
    if config.train.attention_rank:
        attention_maps(dense, ffns)
    found = {}
    kinds = {tier.trains for tier in config.tiers.values() if tier.share > 0.0}
    if config.subsets and len(kinds) > 1:
        raise InputError(f"tiers train {' and '.join(sorted(kinds))}: updates of different kinds cannot be averaged; "
                         "give every tier the same `trains`")  # fmt: skip
    for name, tier in config.tiers.items():
        if tier.share == 0.0:
            continue
        ds_config(tier, config, dense.num_parameters())
        if tier.precision != "fp32" and not get_accelerator().is_bf16_supported():
            raise InputError(f"tiers.{name}: precision = {tier.precision!r} computes in bf16, which this machine's "
                             "accelerator does not know; give precision = 'fp32', or run elsewhere")  # fmt: skip
        if not config.subsets:
            if tier.precision == "nf4":
                raise InputError(f"tiers.{name}: {config.method} trains what nf4 freezes; give precision = 'fp32' or "
                                 "'bf16', or method = 'sam'")  # fmt: skip
            continue
        if tier.precision == "nf4" and tier.trains != "lora":
            raise InputError(f"tiers.{name}: weights in 4 bits do not train; give trains = 'lora', or precision = "
                             "'fp32' or 'bf16'")  # fmt: skip
        if tier.precision == "nf4" and config.sam.semantics == "message":
            raise InputError(f"tiers.{name}: weights in 4 bits do not exchange messages; give precision = 'bf16', or "
                             "sam.semantics = 'reach'")  # fmt: skip
        if tier.precision == "nf4" and ffn.hidden * ffn.neurons // config.sam.num_experts % 64:
            raise InputError(f"tiers.{name}: an expert's matrix of {ffn.neurons // config.sam.num_experts} x "
                             f"{ffn.hidden} values is no multiple of nf4's blocks of 64; lower sam.num_experts, or "
                             "give precision = 'bf16'")  # fmt: skip
        found[name] = estimate(dense, tier, config)
        need = found[name].peak / GIB
        if need > tier.memory_gib:
            raise InputError(
                f"tiers.{name}: {tier.experts} experts with {tier.trains!r} training need about {need:.2f} GiB, "
                f"memory_gib is {tier.memory_gib}; lower experts or train.batch, or use trains = 'lora'"
            )
    return found
