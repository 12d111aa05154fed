"""Experts in 4 bits: what they compute is what bitsandbytes' rounding of their weights computes, and what trains on
them trains as on those."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from families import FAMILIES, build, close, convert, logits, tokens
from torch import nn

from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.distill import DistillConfig, distill
from sam_ds.experts.nf4 import Nf4FFN, Nf4Slots, check_nf4, to_nf4
from sam_ds.experts.surgery import matrix
from sam_ds.experts.units import prepare

CONFIG = SamConfig(num_experts=8, top_k=3, standin_rank=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("neurons", "hidden"), [(8, 32), (3, 64), (40, 512)])
def test_a_slot_gives_back_what_bitsandbytes_makes_of_the_expert(neurons, hidden, dtype):
    """Also after a cast of the whole model to half precision, as DeepSpeed does it."""
    slots = Nf4Slots(3, neurons, hidden, torch.zeros(1, dtype=dtype))
    scale_3 = torch.tensor([0.01, 1.0, 30.0], dtype=dtype)
    rows_3nd = torch.randn(3, neurons, hidden, dtype=dtype) * scale_3[:, None, None]
    for slot in (2, 0, 1):
        slots.write(slot, rows_3nd[slot])
    if dtype == torch.bfloat16:
        slots = slots.bfloat16()
    for slot, rows_nd in enumerate(rows_3nd):
        packed, state = quantize_4bit(rows_nd.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(slots.read(slot, dtype), dequantize_4bit(packed, state))
    assert slots.nbytes <= 0.54 * slots.values or neurons * hidden < 4096


def rounded(model, four_bits):
    """`model` with the weights that `four_bits` stands for."""
    for ours, theirs in zip(model.sam_layers, four_bits.sam_layers, strict=True):
        for name, target in zip(("up", "gate", "down"), ours.matrices(), strict=True):
            if target is not None:
                packed = theirs.nf4[name]
                rows_md = torch.cat([packed.read(slot, target.dtype) for slot in range(theirs.slots)])
                target.copy_(rows_md if name == "down" else rows_md.t())
    for path, module in four_bits.named_modules():
        if isinstance(module, Linear4bit):
            rows = dequantize_4bit(module.weight.data, module.weight.quant_state)
            matrix(model.get_submodule(path)).copy_(rows.t())
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_the_rounded_weights(family):
    """Logits with some and with all experts, and the gradients of low-rank updates, the attention's too, and gates."""
    model = convert(build(family), CONFIG)
    ours = copy.deepcopy(model)
    to_nf4(ours)
    assert all(isinstance(layer, Nf4FFN) for layer in ours.sam_layers)
    with torch.no_grad():
        rounded(model, ours)
    for either in (model, ours):
        prepare(either, "lora", rank=2, alpha=4, seed=0, attention_rank=3)
        generator = torch.Generator().manual_seed(0)
        for name, value in either.named_parameters():
            if ".lora." in name:
                value.data.normal_(std=0.1, generator=generator)
    ids = tokens(3, 17, seed=2)
    for k in (8, 3):
        with model.active(k), ours.active(k):
            # First without gradients, where bitsandbytes' own maps would pack their weights anew.
            close(logits(ours), logits(model))
            found, expected = (either(input_ids=ids, labels=ids) for either in (ours, model))
            close(found.logits, expected.logits)
            found.loss.backward()
            expected.loss.backward()
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    theirs = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert list(trained) == list(theirs) and any(name.endswith(".lora.b_Ro") for name in trained)
    torch.testing.assert_close(trained, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_other_weights_are_packed_as_if_they_had_been_there(family):
    one, other = convert(build(family), CONFIG), convert(build(family), CONFIG)
    maps = {path: module for path, module in one.named_modules() if "attn." in path and hasattr(module, "weight")}
    with torch.no_grad():
        for linear in maps.values():
            linear.weight.normal_(std=0.2)
    weights = {path: linear.weight.detach() for path, linear in maps.items()}
    for model in (one, other):
        to_nf4(model)
    before = logits(other)
    for path, weight in weights.items():
        packed = other.get_submodule(path)
        packed.weight.data.copy_(packed.pack(weight))
    assert torch.equal(logits(other), logits(one)) and not torch.equal(logits(other), before)


def nbytes(model):
    """Of FFNs and attention."""
    total = 0
    for module in model.modules():
        if isinstance(module, Nf4Slots):
            total += module.nbytes
        elif isinstance(module, Linear4bit):
            state = module.weight.quant_state
            parts = (module.weight.data, state.absmax, state.state2.absmax, state.offset)
            total += sum(t.numel() * t.element_size() for t in parts)
    return total


def test_weights_take_a_quarter_of_their_bytes_in_half_precision(tiny_llama):
    dense = tiny_llama(hidden_size=128, intermediate_size=512).bfloat16()
    half = sum(2 * p.numel() for name, p in dense.named_parameters() if "_proj" in name)
    model = convert(dense, CONFIG)
    to_nf4(model)
    assert nbytes(model) <= 0.27 * half
    assert torch.isfinite(logits(model)).all()


def test_nothing_stays_behind_unseen(tiny_llama):
    """Neither the old matrices, in the modules whose places the layers took, nor a matrix of a kind not known."""
    model = convert(tiny_llama(), CONFIG)
    to_nf4(model)
    held = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in held for module in model._sam_original.values() for parameter in module.parameters())

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8))

    model.model.layers[1].self_attn.extra = Other()
    with pytest.raises(InputError, match=r"layers.1.self_attn.extra.weight is still in torch.float32.*Other"):
        check_nf4(model)
    fresh = convert(tiny_llama(), CONFIG)
    fresh.model.layers[1].self_attn.extra = Other()
    before = logits(fresh)
    with pytest.raises(InputError, match=r"extra.weight would stay in torch.float32.*Other"):
        to_nf4(fresh)
    assert torch.equal(logits(fresh), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_afterwards_is_noticed(tiny_llama, dtype):
    model = convert(tiny_llama(), CONFIG)
    to_nf4(model)
    with pytest.raises(InputError, match=f"cast from torch.float32 to {dtype} after to_nf4"):
        model.to(dtype).sam_layers[0](torch.zeros(3, 32, dtype=dtype))


@pytest.mark.parametrize("four_bits", [False, True])
def test_updates_in_fp32_beside_weights_in_half_precision(tiny_llama, four_bits):
    """Without autocast, which a plain loop and generate() do not have."""
    model = convert(tiny_llama().bfloat16(), CONFIG)
    if four_bits:
        to_nf4(model)
    prepare(model, "lora", rank=2, alpha=4, seed=0, attention_rank=2)
    ids = tokens(3, 17, seed=2)
    for k in (8, 3):
        with model.active(k):
            model(input_ids=ids, labels=ids).loss.backward()
    lora = model.sam_layers[1].lora
    query = model.model.layers[1].self_attn.q_proj.lora
    assert all(value.dtype == torch.float32 and value.grad.any() for value in (lora.up_rows, query.b_Ro))


def test_what_cannot_be_quantized_is_refused_and_left_alone(tiny_llama, tmp_path):
    dense = tiny_llama()
    with pytest.raises(InputError, match="not converted"):
        to_nf4(dense)
    sizes = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    odd = convert(tiny_llama(**sizes), CONFIG)
    before = logits(odd)
    with pytest.raises(InputError, match="6 x 36 values, which is no multiple of nf4's blocks of 64"):
        to_nf4(odd)
    assert torch.equal(logits(odd), before)
    model = convert(dense, CONFIG)
    to_nf4(model)
    with pytest.raises(InputError, match="nf4 is of the torch back end"):
        to_nf4(model)
    with pytest.raises(InputError, match="cannot be distilled: its weights are in 4 bits"):
        distill(model, tokens(), DistillConfig(steps=1), progress=False)
    with pytest.raises(InputError, match="trains = 'full'"):
        prepare(model, "full", rank=0, alpha=0, seed=0)
    for refused in (lambda: model.save_pretrained(tmp_path), model.unload, model.merge_and_unload, model.fold_lora):
        with pytest.raises(InputError, match="(saved|merged|unloaded): its weights are in 4 bits.*save_adapter"):
            refused()


def test_parameters_are_cast_and_buffers_are_not(tiny_llama):
    model = convert(tiny_llama(), CONFIG)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    to_nf4(model, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    ids = torch.randint(90, (2, 12))
    with model.active(8), torch.no_grad():
        assert torch.isfinite(model(input_ids=ids).logits).all()
