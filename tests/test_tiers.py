"""Memory before the run, DeepSpeed's configuration, and who gets which tier."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest
from deepspeed.accelerator import get_accelerator
from hypothesis import given
from hypothesis import strategies as st

from sam_ds.clients.tiers import ModelShape, check_tiers, dealt_tiers, ds_config, estimate, read_ds_config
from sam_ds.config import RunConfig, TierSection, load_config
from sam_ds.errors import InputError

SHAPE = ModelShape(parameters=10_000_000, layers=6, hidden=256, neurons=1024, gated=True, vocabulary=4096,
                   embeddings=2 * 4096 * 256)
CONFIG = RunConfig()


def tier(**values):
    return TierSection(**{"experts": 8, "memory_gib": 1.0, "share": 1.0, **values})


def test_shape_of_a_model(tiny_llama, tiny_gpt2):
    llama, gpt2 = tiny_llama(), tiny_gpt2()
    shape = ModelShape.of(llama)
    assert shape.parameters == sum(p.numel() for p in llama.parameters())
    assert (shape.layers, shape.hidden, shape.neurons, shape.gated, shape.vocabulary) == (2, 32, 64, True, 97)
    assert shape.ffn_parameters == sum(p.numel() for p in llama.model.layers[0].mlp.parameters())
    shape = ModelShape.of(gpt2)
    assert not shape.gated and shape.ffn_parameters == 2 * 32 * 64


@given(st.integers(2, 15), st.sampled_from(["full", "lora"]), st.sampled_from(["fp32", "bf16"]))
def test_more_experts_need_more_memory(experts, trains, precision):
    fewer, more = (
        estimate(SHAPE, tier(experts=e, trains=trains, precision=precision), CONFIG) for e in (experts, experts + 1)
    )
    assert fewer.total < more.total and fewer.weights < more.weights and fewer.optimizer < more.optimizer
    assert fewer.activations <= more.activations


@given(experts=st.integers(2, 16))
def test_what_costs_less(experts):
    full = estimate(SHAPE, tier(experts=experts), CONFIG)
    assert estimate(SHAPE, tier(experts=experts, trains="lora"), CONFIG).total < full.total
    assert estimate(SHAPE, tier(experts=experts, precision="bf16"), CONFIG).total < full.total
    assert estimate(SHAPE, tier(experts=experts, ds_config="cpu_zero0.json"), CONFIG).optimizer < full.optimizer


@pytest.mark.parametrize(("standin", "rank", "outputs"), [("linear", 16, 48), ("mean", 0, 14), ("none", 0, 0)])
def test_all_experts_weigh_what_the_model_weighs(standin, rank, outputs):
    config = replace(CONFIG, sam=replace(CONFIG.sam, standin=standin))
    full = estimate(SHAPE, tier(experts=16, precision="fp32"), config)
    roots = CONFIG.sam.roots * 1024 // 16
    added = 6 * (16 * (256 + roots + 1) + (rank + outputs) * 256 + 16 * (rank + 1) * outputs)
    assert full.weights == 4 * (SHAPE.parameters + added)


def test_a_tier_that_is_too_small_is_refused():
    need = estimate(SHAPE, tier(), CONFIG).total / 2**30
    check_tiers(SHAPE, replace(CONFIG, tiers={"phone": tier(memory_gib=need * 1.01)}))
    small = tier(memory_gib=need * 0.99)
    with pytest.raises(InputError, match=r"tiers\.phone: 8 experts with 'full' training need about .* GiB"):
        check_tiers(SHAPE, replace(CONFIG, tiers={"phone": small}))
    # Nobody has it, or the method does not heed tiers.
    check_tiers(SHAPE, replace(CONFIG, tiers={"phone": replace(small, share=0.0), "other": tier()}))
    check_tiers(SHAPE, replace(CONFIG, method="fedavg", tiers={"phone": small}))


@pytest.mark.parametrize(("values", "message"), [
    ({"precision": "bf16", "ds_config": "cpu_zero0.json"}, r"ZeRO stage 0 with precision = 'bf16' .* from 1 to 3"),
    ({"precision": "nf4"}, r"tiers.phone: weights in 4 bits do not train; give trains = 'lora'"),
])  # fmt: skip
def test_precisions_that_cannot_train_so_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        check_tiers(SHAPE, replace(CONFIG, tiers={"phone": tier(**values)}))


@pytest.mark.parametrize(("zero", "moved"), [({}, False), ({"offload_optimizer": None}, False),
    ({"offload_optimizer": {"device": "none"}}, False), ({"offload_optimizer": {"device": "cpu"}}, True)])  # fmt: skip
def test_what_is_offloaded_is_not_on_the_device(tmp_path, zero, moved):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2} | zero}))
    assert (estimate(SHAPE, tier(ds_config=str(tmp_path / "own.json")), CONFIG).optimizer == 0) == moved


def test_a_section_that_is_no_section_is_refused(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"bf16": "auto"}))
    with pytest.raises(InputError, match="bf16 = 'auto' must be an object"):
        ds_config(tier(ds_config=str(tmp_path / "own.json")), CONFIG)


def test_nf4_wants_whole_blocks_and_bf16_a_machine_that_has_it(monkeypatch):
    four = replace(CONFIG, tiers={"phone": tier(precision="nf4", trains="lora")})
    check_tiers(SHAPE, four)
    with pytest.raises(InputError, match="of 65 x 255 values is no multiple of nf4's blocks of 64"):
        check_tiers(replace(SHAPE, hidden=255, neurons=1024 + 16), four)
    with pytest.raises(InputError, match="fedavg trains what nf4 freezes"):
        check_tiers(SHAPE, replace(four, method="fedavg"))
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    with pytest.raises(InputError, match="tiers.phone: precision = 'nf4' computes in bf16"):
        check_tiers(SHAPE, four)


def test_auto_is_filled_from_the_run():
    values = ds_config(tier(precision="bf16"), load_config(None, ["train.batch=8", "runtime.ranks_per_client=2"]))
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 1
    assert values["gradient_clipping"] == CONFIG.train.clip
    assert values["bf16"] == {"enabled": True}
    assert values["zero_optimization"]["stage"] == 2
    assert "auto" not in json.dumps(values)


@pytest.mark.parametrize("name", ["cpu_zero0.json", "cpu_zero2.json", "zero3.json"])
def test_every_configuration_in_the_repository_fits_the_defaults(name):
    assert "auto" not in json.dumps(ds_config(tier(ds_config=name), CONFIG))


def own(tmp_path, **values):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    return tier(ds_config=str(path))


def test_what_is_left_out_is_filled_too(tmp_path):
    values = ds_config(own(tmp_path, train_batch_size=64), CONFIG)
    assert values["train_micro_batch_size_per_gpu"] == CONFIG.train.batch and "train_batch_size" not in values
    assert values["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    "values, named",
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu = 3"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps = 4"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = True"),
    ],
)
def test_a_contradiction_is_refused_before_the_run(tmp_path, values, named):
    section = own(tmp_path, **values)
    with pytest.raises(InputError, match=named):
        ds_config(section, CONFIG)
    with pytest.raises(InputError, match=named):
        check_tiers(SHAPE, replace(CONFIG, tiers={"phone": section}))
    with pytest.raises(InputError, match=named):
        check_tiers(SHAPE, replace(CONFIG, method="fedavg", tiers={"phone": section}))


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_file_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(InputError, match="JSON"):
        read_ds_config(str(tmp_path / "own.json"))


@given(st.integers(1, 60), st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any))
def test_tiers_are_dealt_by_their_shares(clients, parts):
    total = sum(parts)
    tiers = {f"t{i}": tier(share=part / total, experts=16) for i, part in enumerate(parts)}
    federation = replace(CONFIG.federation, clients=clients, clients_per_round=1)
    dealt = dealt_tiers(replace(CONFIG, tiers=tiers, federation=federation))
    assert len(dealt) == clients
    counts = Counter(dealt)
    for i, part in enumerate(parts):
        assert abs(counts[f"t{i}"] - clients * part / total) < 1
        assert part or not counts[f"t{i}"]
        # Spread evenly: what a prefix has is close to its share of it.
        for end in range(clients + 1):
            assert abs(dealt[:end].count(f"t{i}") - counts[f"t{i}"] * end / clients) <= 1.5
