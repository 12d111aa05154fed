"""What users of PEFT do with a model, done with a converted one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.model import SamMixin
from sam_ds.experts.nf4 import to_nf4

IDS = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(1))


def convert(dense):
    config = SamConfig(num_experts=8, top_k=4, standin_rank=4)
    return get_sam_model(dense, config, calibration=IDS, progress=False)


def adapt(model, *targets):
    return get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))


def test_adapters_on_the_attention_train_and_merge(tiny_llama):
    adapted = adapt(convert(tiny_llama()), "q_proj", "v_proj")
    adapted(input_ids=IDS[:4], labels=IDS[:4]).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all(".self_attn." in name and "lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            assert parameter.grad is not None
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        before = adapted(input_ids=IDS[:4]).logits
        merged = adapted.merge_and_unload()
        assert isinstance(merged, SamMixin)
        torch.testing.assert_close(merged(input_ids=IDS[:4]).logits, before, atol=1e-5, rtol=1e-5)


def test_four_bits_come_before_adapters(tiny_llama):
    model = convert(tiny_llama())
    adapt(model, "q_proj")
    with pytest.raises(InputError, match="q_proj carries an adapter: quantize first"):
        to_nf4(model)


def test_adapters_on_the_experts_are_refused_and_not_passed_by(tiny_llama):
    adapted = adapt(convert(tiny_llama()), "down_proj")
    with pytest.raises(InputError, match="put adapters on the attention only"):
        adapted(input_ids=IDS[:4])


@pytest.mark.parametrize("targets", [["up_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_a_model_whose_adapters_are_not_merged_is_not_converted(tiny_llama, targets):
    adapted = adapt(tiny_llama(), *targets)
    with pytest.raises(InputError, match=r"layers.0.mlp.(up|gate)_proj carries an adapter \(peft"):
        convert(adapted)
    assert isinstance(convert(adapted.merge_and_unload()), SamMixin)


def test_adapters_on_the_attention_may_come_before_the_conversion(tiny_llama):
    model = convert(adapt(tiny_llama(), "q_proj").merge_and_unload())
    assert isinstance(model, SamMixin)


def test_a_model_that_zero_3_has_cut_up_is_refused(tiny_llama):
    model = tiny_llama()
    for parameter in model.parameters():
        # What DeepSpeed leaves of a parameter while nobody uses it.
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    with pytest.raises(InputError, match="cut into shards by ZeRO-3 .* before TrainingArguments"):
        convert(model)
