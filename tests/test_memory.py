"""What a client is said to need: it is what its own model takes, and what DeepSpeed's stages add."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from families import build, convert
from transformers import AutoConfig

from sam_ds.bench import memory as bench
from sam_ds.bench.tiers import converted_llama
from sam_ds.clients import memory
from sam_ds.clients.memory import Estimate, estimate, slot_model
from sam_ds.config import TierSection, load_config
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import check_architecture
from sam_ds.experts.model import add_assembler
from sam_ds.experts.nf4 import Nf4Slots, to_nf4
from sam_ds.experts.slots import to_slots
from sam_ds.experts.units import prepare

CONFIG = load_config(None, [
    "sam.num_experts=8", "sam.top_k=3", "sam.roots=1", "sam.standin_rank=4", "federation.floor=0.1", "train.batch=4",
    "train.sequence=32", "tiers.small.experts=4", "tiers.medium.experts=6", "tiers.large.experts=8",
])  # fmt: skip


def tier(**values):
    return TierSection(**{"experts": 4, "memory_gib": 1.0, "share": 1.0, "ds_config": "cpu_zero0.json", **values})


def dense(family="llama"):
    # No grouped heads: on fake tensors their keys and values are repeated, which a real pass spares itself.
    return build(family, **({"num_key_value_heads": 4} if family == "llama" else {}))


def meta(family="llama"):
    return dense(family).to("meta")


def of(config=CONFIG, ranks=1, **values) -> Estimate:
    config = replace(config, runtime=replace(config.runtime, ranks_per_client=ranks))
    return estimate(meta(), tier(**values), config)


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_more_experts_or_more_precision_need_more(trains):
    few, more = of(experts=4, trains=trains), of(experts=8, trains=trains)
    assert few.weights < more.weights and few.optimizer < more.optimizer and few.peak < more.peak
    half = of(experts=4, trains=trains, precision="bf16", ds_config="cpu_zero2.json")
    assert few.weights / 2 < half.weights < 0.6 * few.weights
    assert half.activations < of(experts=4, trains=trains, ds_config="cpu_zero2.json").activations
    assert (few.adapters > 0) == (trains == "lora")


def test_what_trains_less_needs_less():
    assert of(trains="lora").peak < of().peak
    assert of(replace(CONFIG, train=replace(CONFIG.train, dense=False))).optimizer < of().optimizer
    routed, whole = (of(replace(CONFIG, train=replace(CONFIG.train, whole=w)), experts=8) for w in (0.0, 0.5))
    assert routed.activations < whole.activations and routed.kept == whole.kept


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_weights_are_those_of_the_real_model(trains):
    model = convert(dense(), SamConfig.of_run(CONFIG))
    to_slots(model, 5)
    prepare(model, trains, rank=CONFIG.train.lora_rank, alpha=1.0, seed=0, dense=True, attention_rank=3)
    rank = 3 if trains == "lora" else 0
    only = {"only": tier(experts=5, trains=trains)}
    config = replace(CONFIG, train=replace(CONFIG.train, attention_rank=rank), tiers=only)
    said = of(config, experts=5, trains=trains)
    add_assembler(model, seed=0)
    real = [*model.parameters(), *model.buffers()]
    assert said.weights + said.adapters == sum(value.numel() * value.element_size() for value in real)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(("held", "trains", "semantics"), [
    (3, "full", "reach"), (8, "full", "reach"), (8, "lora", "reach"), (3, "full", "message"), (8, "full", "message"),
    (8, "lora", "message"),
])  # fmt: skip
def test_a_pass_on_fake_tensors_takes_what_a_real_one_takes(family, held, trains, semantics):
    """3 of 3 experts visited is the dense path, as it is counted but for the causal mask, which fake tensors cannot
    spare; 3 of 8 is routed, where tokens are gathered and put together."""
    section = tier(experts=held, trains=trains)
    config = replace(CONFIG, sam=replace(CONFIG.sam, semantics=semantics))
    said = memory._passes(slot_model(meta(family), section, config), section, config, kept=1.0)
    model = convert(dense(family), replace(SamConfig.of_run(config), allocation="uniform"))
    to_slots(model, held)
    add_assembler(model, seed=0)
    for parameter in model.parameters():
        # What `to_slots` leaves undefined.
        torch.nn.init.normal_(parameter, std=0.1)
    prepare(model, trains, rank=CONFIG.train.lora_rank, alpha=1.0, seed=0, dense=True)
    model.sam_condition = torch.zeros(len(model.sam_layers), 9)
    ids = torch.randint(60, (4, 32))
    live = memory._Live([*model.parameters(), *model.buffers()])
    with live:
        model.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert live.peak == pytest.approx(said, rel=0.06)


@pytest.mark.parametrize("ranks", [1, 2])
def test_stages_shard_what_they_shard(ranks):
    """Of P elements that train, bytes: 8 of moments, 4 of a master copy from stage 1 on."""
    trained = sum(p.numel() for p in slot_model(meta(), tier(), CONFIG).parameters() if p.requires_grad)
    zero0, zero2 = of(ranks=ranks), of(ranks=ranks, ds_config="cpu_zero2.json")
    zero3 = of(ranks=ranks, ds_config="zero3.json")
    # Under ZeRO-3 the bucket, as large as what trains, and the rank's gradients stay.
    assert (zero0.optimizer, zero2.optimizer) == (8 * trained, 12 * trained // ranks)
    assert zero3.optimizer == 12 * trained // ranks + 4 * trained + 4 * trained // ranks
    assert zero0.weights == zero2.weights >= zero3.weights and (ranks == 1 or zero3.weights < 0.6 * zero2.weights)
    assert (zero0.gradients, zero2.gradients, zero3.gradients) == (
        8 * trained, 8 * trained // ranks, 4 * trained // ranks)  # fmt: skip
    half = of(ranks=ranks, ds_config="cpu_zero2.json", precision="bf16")
    assert half.optimizer == zero2.optimizer and half.gradients == (2 + 2 + 4) * trained // ranks


def zero_of(tmp_path, **zero):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": zero}))
    return of(ds_config=str(tmp_path / "own.json"))


def test_zero_3_steps_by_groups(tmp_path):
    whole, parts = zero_of(tmp_path, stage=3), zero_of(tmp_path, stage=3, sub_group_size=1000)
    assert parts.gradients == 4000 < whole.gradients and parts.kept == whole.kept


def test_stage_1_keeps_all_gradients(tmp_path):
    one, two = zero_of(tmp_path, stage=1), zero_of(tmp_path, stage=2)
    assert one.optimizer == two.optimizer and one.gradients == two.gradients  # on one rank


@pytest.mark.parametrize(("offload", "moved"), [(None, False), ({}, False), ({"device": "none"}, False),
                                                ({"device": "cpu"}, True), ({"device": "nvme"}, True)])  # fmt: skip
@pytest.mark.parametrize("stage", [2, 3])
def test_what_is_offloaded_is_not_on_the_device(tmp_path, stage, offload, moved):
    said = zero_of(tmp_path, stage=stage, offload_optimizer=offload, reduce_bucket_size=10)
    assert (said.optimizer <= 40) == (said.gradients == 0) == moved and said.weights > 0
    if stage == 3:
        said = zero_of(tmp_path, stage=3, offload_param=offload)
        buffers = slot_model(meta(), tier(), CONFIG).buffers()
        assert (said.weights == sum(b.numel() * b.element_size() for b in buffers)) == moved


def test_four_bits_weigh_what_the_quantized_model_weighs():
    model = convert(dense(), SamConfig.of_run(CONFIG))
    to_slots(model, 4)
    add_assembler(model, seed=0)
    prepare(model, "lora", rank=CONFIG.train.lora_rank, alpha=1.0, seed=0, dense=True)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    to_nf4(model, dtype=torch.bfloat16)
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, Nf4Slots))
    packed += sum(m.weight.nbytes + m.weight.quant_state.absmax.nbytes for m in quantized)
    said = of(precision="nf4", trains="lora", ds_config="cpu_zero2.json")
    half = of(precision="bf16", trains="lora", ds_config="cpu_zero2.json")
    matrices = 2 * sum(slots.values for slots in model.modules() if isinstance(slots, Nf4Slots))
    matrices += 2 * sum(m.in_features * m.out_features for m in quantized)
    # Scales of so small matrices are a little more than their share.
    assert said.weights == pytest.approx(half.weights - matrices + packed, rel=0.05)


def test_a_model_that_looks_at_its_tokens_is_estimated_without_activations():
    model = slot_model(meta(), tier(), CONFIG)
    embed = model.get_input_embeddings()
    embed.register_forward_hook(lambda module, args, output: output * float(args[0].sum()))
    with pytest.warns(UserWarning, match="depends on its tokens' values .* without activations"):
        assert memory._passes(model, tier(), CONFIG, kept=1.0) == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_estimate_is_within_a_tenth_of_what_was_measured():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    result = bench.run(parser.parse_args([]))
    assert len(result["rows"]) >= 6
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(1.0, abs=0.1), row


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in bench.CASES if case.endswith(" 1") and "cpu_zero0" not in case])
def test_the_estimate_is_within_a_tenth_of_what_a_gpu_allocated(case, one_rank, tmp_path):
    sizes = argparse.Namespace(d=768, m=3072, layers=8, experts=16, seed=0)
    converted_llama(sizes, top_k=4).save_pretrained(tmp_path)
    config = bench.config_of(case)
    architecture = check_architecture(AutoConfig.from_pretrained(tmp_path), SamConfig.of_run(config))
    said = estimate(architecture, config.tiers["only"], config)
    assert said.peak == pytest.approx(bench.train(config, tmp_path, one_rank)["training"], rel=0.1)
