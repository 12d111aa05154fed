"""Low-rank updates of the experts, from and to PEFT."""

import copy
import json

import pytest
import torch
from families import FAMILIES, build, close, convert, logits
from peft import LoraConfig, PeftModel

from sam_ds.errors import InputError
from sam_ds.experts.adapter import add_lora, load_adapter, save_adapter
from sam_ds.experts.config import SamConfig
from sam_ds.experts.nf4 import to_nf4
from sam_ds.experts.slots import to_slots

CONFIG = SamConfig(num_experts=8, top_k=3, standin_rank=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_the_slices_onto_the_plain_model(family, tmp_path):
    model = convert(build(family), CONFIG)
    plain = copy.deepcopy(model).merge_and_unload()
    add_lora(model, LoraConfig(r=3, lora_alpha=5))
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lora", "sam"}
    for layer in model.sam_layers:
        for value in layer.lora.parameters():
            value.data.normal_(std=0.2)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(plain, tmp_path)
    with model.active(8):
        ours = logits(model)
    close(logits(peft), ours)
    # Put on the model as it was, with the gates that trained.
    again = convert(build(family), CONFIG)
    with torch.no_grad():
        for layer in again.sam_layers:
            layer.sam.wg.zero_()
    load_adapter(again, tmp_path)
    close(logits(again), logits(model))
    merged = peft.merge_and_unload()
    close(logits(merged), logits(model.merge_and_unload()))


def test_an_adapter_trained_on_4_bits_goes_on_the_model_as_it_was(tiny_llama, tmp_path):
    model = convert(tiny_llama(), CONFIG)
    plain = copy.deepcopy(model).merge_and_unload()
    to_nf4(model)
    add_lora(model, LoraConfig(r=3, lora_alpha=5, target_modules=["up_proj", "gate_proj", "down_proj"]))
    for layer in model.sam_layers:
        for value in layer.lora.parameters():
            value.data.normal_(std=0.2)
    save_adapter(model, tmp_path)
    peft = PeftModel.from_pretrained(plain, tmp_path)
    delta = peft.base_model.model.model.layers[1].mlp.down_proj.get_delta_weight("default")
    torch.testing.assert_close(delta.t(), model.sam_layers[1].lora.deltas()["down"])


@pytest.mark.parametrize(("settings", "message"), [
    ({"lora_dropout": 0.1}, r"lora_dropout=0.1, which slices by expert do not know"),
    ({"use_dora": True}, "use_dora=True"),
    ({"rank_pattern": {"up_proj": 4}}, "rank_pattern"),
    ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
    ({"exclude_modules": ["up_proj"]}, "exclude_modules"),
    ({"target_modules": ["q_proj"]}, r"must be \['down_proj', 'gate_proj', 'up_proj'\].*attention with get_peft_model"),
    ({"target_modules": "all-linear"}, "all-linear"),
])  # fmt: skip
def test_what_slices_cannot_do_is_refused(tiny_llama, settings, message):
    model = convert(tiny_llama(), CONFIG)
    with pytest.raises(InputError, match=message):
        add_lora(model, LoraConfig(r=2, **settings))
    assert all(layer.lora is None for layer in model.sam_layers)


def test_what_has_no_adapter_is_refused(tiny_llama, tmp_path):
    dense = tiny_llama()
    for refused in (lambda: add_lora(dense, LoraConfig()), lambda: save_adapter(dense, tmp_path)):
        with pytest.raises(InputError, match="not converted"):
            refused()
    model = convert(dense, CONFIG)
    with pytest.raises(InputError, match="no low-rank updates"):
        save_adapter(model, tmp_path)
    add_lora(model, LoraConfig(r=2))
    sharded = model.sam_layers[0].lora.up_rows
    sharded.ds_shape, sharded.data = sharded.shape, torch.empty(0)
    with pytest.raises(InputError, match="GatheredParameters"):
        save_adapter(model, tmp_path)
    model.unload()
    model = convert(tiny_llama(), CONFIG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    with pytest.raises(InputError, match="holds no adapter of this model"):
        load_adapter(model, tmp_path)
    assert all(layer.lora is None for layer in model.sam_layers)
    (tmp_path / "adapter_config.json").unlink()
    to_slots(model, 4)
    add_lora(model, LoraConfig(r=2))
    with pytest.raises(InputError, match="holds 4 of 8 experts"):
        save_adapter(model, tmp_path)
    with pytest.raises(InputError, match="already"):
        add_lora(model, LoraConfig(r=2))
    assert not list(tmp_path.iterdir())
