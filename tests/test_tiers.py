"""Tiers that cannot be, DeepSpeed's configuration, and who gets which tier."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.ds_config import ds_config, read_ds_config
from sam_ds.clients.memory import GIB, estimate
from sam_ds.clients.tiers import check_tiers
from sam_ds.config import RunConfig, TierSection, ds_config_path, load_config
from sam_ds.errors import InputError

CONFIG = RunConfig()


def meta(**sizes):
    """A Llama of two layers on the meta device."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
             "vocab_size": 512} | sizes  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def dense():
    return meta()


def tier(**values):
    return TierSection(**{"experts": 8, "memory_gib": 1.0, "share": 1.0, **values})


def test_a_tier_that_is_too_small_is_refused(dense):
    need = estimate(dense, tier(), CONFIG).peak / GIB
    check_tiers(dense, replace(CONFIG, tiers={"phone": tier(memory_gib=need * 1.01)}))
    small = tier(memory_gib=need * 0.99)
    with pytest.raises(InputError, match=r"tiers\.phone: 8 experts with 'full' training need about .* GiB"):
        check_tiers(dense, replace(CONFIG, tiers={"phone": small}))
    # Nobody has it, or the method does not heed tiers.
    check_tiers(dense, replace(CONFIG, tiers={"phone": replace(small, share=0.0), "other": tier()}))
    check_tiers(dense, replace(CONFIG, method="fedavg", tiers={"phone": small}))


@pytest.mark.parametrize(("values", "message"), [
    ({"precision": "bf16", "ds_config": "cpu_zero0.json"}, r"ZeRO stage 0 with precision = 'bf16' .* from 1 to 3"),
    ({"precision": "nf4"}, r"tiers.phone: weights in 4 bits do not train; give trains = 'lora'"),
])  # fmt: skip
def test_precisions_that_cannot_train_so_are_refused(dense, values, message):
    with pytest.raises(InputError, match=message):
        check_tiers(dense, replace(CONFIG, tiers={"phone": tier(**values)}))


def test_a_section_that_is_no_section_is_refused(tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"bf16": "auto"}))
    with pytest.raises(InputError, match="bf16 = 'auto' must be an object"):
        ds_config(tier(ds_config=str(tmp_path / "own.json")), CONFIG, 1)


def test_nf4_wants_whole_blocks_and_bf16_a_machine_that_has_it(dense, monkeypatch):
    four = replace(CONFIG, tiers={"phone": tier(precision="nf4", trains="lora")})
    check_tiers(dense, four)
    with pytest.raises(InputError, match="of 3 x 60 values is no multiple of nf4's blocks of 64"):
        check_tiers(meta(hidden_size=60, intermediate_size=48), four)
    with pytest.raises(InputError, match="fedavg trains what nf4 freezes"):
        check_tiers(dense, replace(four, method="fedavg"))
    monkeypatch.setattr(type(get_accelerator()), "is_bf16_supported", lambda self: False)
    with pytest.raises(InputError, match="tiers.phone: precision = 'nf4' computes in bf16"):
        check_tiers(dense, four)


@pytest.mark.parametrize("method", ["sam", "fedit"])
def test_attention_that_is_not_there_is_refused(method):
    config = load_config(None, [f"method={method}", "train.attention_rank=4", "tiers.phone.experts=16",
                                "tiers.phone.memory_gib=1.0", "tiers.phone.share=1.0", "tiers.phone.trains=lora",
                                *(f"tiers.{name}.share=0.0" for name in ("small", "medium", "large"))])  # fmt: skip
    check_tiers(meta(), config)
    without = meta()
    for layer in without.model.layers:
        layer.self_attn = torch.nn.Identity()
    with pytest.raises(InputError, match="train.attention_rank: LlamaForCausalLM has no linear maps .* give 0"):
        check_tiers(without, config)


def test_auto_is_filled_from_the_run():
    values = ds_config(tier(precision="bf16"), load_config(None, ["train.batch=8", "runtime.ranks_per_client=2"]),
                       trained=1000)
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 1
    assert values["gradient_clipping"] == CONFIG.train.clip
    assert values["bf16"] == {"enabled": True}
    assert values["zero_optimization"]["stage"] == 2
    assert values["zero_optimization"]["reduce_bucket_size"] == 1000
    more = ds_config(tier(), CONFIG, trained=10**9)["zero_optimization"]
    assert more["reduce_bucket_size"] == 20_000_000 and more["sub_group_size"] == 10**9
    assert "auto" not in json.dumps(values)


@pytest.mark.parametrize("name", sorted(path.name for path in Path(ds_config_path("zero3.json")).parent.glob("*.json")))
def test_every_configuration_in_the_repository_fits_the_defaults(name):
    assert "auto" not in json.dumps(ds_config(tier(ds_config=name), CONFIG, 1))


def own(tmp_path, **values):
    path = tmp_path / "own.json"
    path.write_text(json.dumps(values))
    return tier(ds_config=str(path))


def test_what_is_left_out_is_filled_too(tmp_path):
    values = ds_config(own(tmp_path, train_batch_size=64), CONFIG, 1)
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
def test_a_contradiction_is_refused_before_the_run(dense, tmp_path, values, named):
    section = own(tmp_path, **values)
    with pytest.raises(InputError, match=named):
        ds_config(section, CONFIG, 1)
    with pytest.raises(InputError, match=named):
        check_tiers(dense, replace(CONFIG, tiers={"phone": section}))
    with pytest.raises(InputError, match=named):
        check_tiers(dense, replace(CONFIG, method="fedavg", tiers={"phone": section}))


@pytest.mark.parametrize(("zero", "message"), [
    ("auto", "zero_optimization = 'auto' must be an object"),
    (None, "zero_optimization = None must be an object"),
    ({"stage": "auto"}, "stage = 'auto' must be 0, 1, 2 or 3"),
    ({"stage": 7}, "stage = 7 must be 0, 1, 2 or 3"),
    ({"stage": 2, "reduce_bucket_size": "5e8"}, "reduce_bucket_size = '5e8' must be a number of elements"),
    ({"stage": 3, "stage3_prefetch_bucket_size": 0}, "stage3_prefetch_bucket_size = 0 must be a number"),
    ({"stage": 2, "offload_optimizer": "cpu"}, "offload_optimizer = 'cpu' must be an object"),
])  # fmt: skip
def test_what_deepspeed_does_not_know_is_refused(tmp_path, zero, message):
    with pytest.raises(InputError, match=message):
        ds_config(own(tmp_path, zero_optimization=zero), CONFIG, 1)
    sizes = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size", "sub_group_size"), "auto")
    filled = ds_config(own(tmp_path, zero_optimization={"stage": 3, **sizes}), CONFIG, 1)
    assert "auto" not in json.dumps(filled)


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
