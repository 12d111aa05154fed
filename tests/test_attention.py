"""Updates of the attention: found in every family, nothing at the start, and in the weights once they are merged."""

import copy

import pytest
import torch
from families import FAMILIES, build, close, convert, logits, tokens
from torch import nn

from sam_ds.experts.attention import updated_maps
from sam_ds.experts.units import prepare

FUSED = {"phi3", "gpt2", "gpt_neox", "falcon", "bloom"}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(family's name, converted model, the same with updates of its attention)."""
    model = convert(build(request.param))
    ours = copy.deepcopy(model)
    prepare(ours, "lora", rank=2, alpha=4.0, seed=0, attention_rank=3)
    return request.param, model, ours


@pytest.fixture
def updated(pair):
    """With updates that are not zero."""
    model = copy.deepcopy(pair[2])
    for linear in updated_maps(model).values():
        nn.init.normal_(linear.lora.b_Ro, std=0.3)
    return model


def test_all_of_the_attention_is_found_and_nothing_else(pair):
    family, _, model = pair
    maps = updated_maps(model)
    assert len(maps) == 2 * (2 if family in FUSED else 4)
    assert all("attn" in path or "attention" in path for path in maps)
    drawn = [linear.lora.a_iR for linear in maps.values()]
    assert not any(torch.equal(one, other) for index, one in enumerate(drawn) for other in drawn[:index])
    assert {linear.lora.a_iR.shape for linear in maps.values()} == {(32, 3)}


def test_at_the_start_an_update_is_nothing(pair):
    _, model, ours = pair
    assert torch.equal(logits(ours), logits(model))


def test_every_update_is_felt(pair):
    """Attention that reads its maps' weights would pass them by."""
    model = copy.deepcopy(pair[2])
    before = logits(model)
    for path, linear in updated_maps(model).items():
        nn.init.normal_(linear.lora.b_Ro)
        assert (logits(model) - before).abs().max() > 1e-3, path
        nn.init.zeros_(linear.lora.b_Ro)


def test_merged_it_is_in_the_weights(pair, updated):
    _, model, _ = pair
    with updated.active(8):
        expected = logits(updated)
    merged, plain = updated.merge_and_unload(), copy.deepcopy(model).unload()
    close(logits(merged), expected)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]


def test_dropped_it_is_in_none(pair, updated):
    _, model, _ = pair
    with model.active(8):
        close(logits(updated.unload()), logits(model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(family):
    model = convert(build(family)).train()
    prepare(model, "lora", rank=2, alpha=4.0, seed=0, attention_rank=3)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(input_ids=tokens(3, 17), labels=tokens(3, 17), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert all(plain[f"{path}.lora.b_Ro"].any() for path in updated_maps(model))
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), plain)
