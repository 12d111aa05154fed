"""Which feed-forward networks are found; what cannot be converted is refused and left alone."""

import copy
from functools import partial

import bitsandbytes
import pytest
import torch
from families import CONFIG, SIZES, build, close, convert, logits, tokens
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sam_ds.errors import InputError
from sam_ds.experts import convert as conversion
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.surgery import find_ffns


def quantized(kind, dense):
    """The second FFN's up-projection stored as bitsandbytes stores it."""
    mlp = dense.model.layers[1].mlp
    weight = mlp.up_proj.weight.detach()
    if kind == "4bit":
        mlp.up_proj = bitsandbytes.nn.Linear4bit(32, 64, bias=False)
        mlp.up_proj.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False).to("cpu")
    else:
        mlp.up_proj = bitsandbytes.nn.Linear8bitLt(32, 64, bias=False, has_fp16_weights=False)
        mlp.up_proj.weight = bitsandbytes.nn.Int8Params(weight.to(torch.int8), requires_grad=False)
    return "up_proj.weight is a (Params4bit|Int8Params) of torch.u?int8"


def parametrized(dense):
    nn.utils.parametrizations.weight_norm(dense.model.layers[1].mlp.down_proj)
    return "mlp.down_proj.weight is computed from other parameters"


def float8(dense):
    linear = dense.model.layers[1].mlp.gate_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return "mlp.gate_proj.weight is a Parameter of torch.float8_e4m3fn"


def shared_weight(dense):
    dense.model.layers[1].mlp.up_proj.weight = dense.model.layers[0].mlp.up_proj.weight
    return "layers.1.mlp.up_proj has the same weight as model.layers.0.mlp.up_proj"


def shared_module(dense):
    dense.model.layers[1].mlp = dense.model.layers[0].mlp
    return "has the same weight as"


def not_a_number(dense):
    with torch.no_grad():
        dense.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    return "model.layers.1.mlp.up_proj.weight of the model holds values that are not finite"


class OtherForm(nn.Module):
    """An FFN by its parts, which computes something else."""

    def __init__(self, mlp):
        super().__init__()
        self.w1, self.w2, self.w3, self.act = mlp.gate_proj, mlp.down_proj, mlp.up_proj, mlp.act_fn

    def forward(self, x):
        return self.w2(self.act(self.w1(x)).square() * self.w3(x))


def other_form(dense):
    dense.model.layers[1].mlp = OtherForm(dense.model.layers[1].mlp)
    return r"layers.1.mlp does not compute w2\(act\(w1\(x\)\) \* w3\(x\)\), as its parts suggest"


def never_reached(dense):
    dense.model.layers[0].spare = copy.deepcopy(dense.model.layers[1].mlp)
    return "layers.0.spare has the parts of a feed-forward network, but no forward pass reaches it"


REFUSED = [
    partial(quantized, "4bit"), partial(quantized, "8bit"), parametrized, float8, shared_weight, shared_module,
    not_a_number, other_form, never_reached,
]  # fmt: skip


def left_alone(model, before, modules):
    assert [type(module) for module in model.modules()] == modules
    assert model.training
    for name, value in model.state_dict().items():
        # bytes: float8 and NaN are not compared otherwise
        assert torch.equal(value.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_converted_is_refused_and_left_alone(change):
    model = build("llama").train()
    message = change(model)
    before, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=message):
        get_sam_model(model, CONFIG, calibration=tokens(), progress=False)
    left_alone(model, before, modules)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_a_conversion_that_fails_late_is_undone(model_type, monkeypatch):
    """Not finite beyond the text that experts are found on: the neurons have moved by then."""
    model = build(model_type).train()
    before, modules = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    calibrate, seen = conversion.calibrate_layer, []

    def fail_second(layer, x_Td, **settings):
        seen.append(layer)
        if len(seen) == 2:
            x_Td = x_Td * float("nan")
        return calibrate(layer, x_Td, **settings)

    monkeypatch.setattr(conversion, "calibrate_layer", fail_second)
    with pytest.raises(InputError, match=r"[.]1.* activations on the calibration text are not finite"):
        get_sam_model(model, CONFIG, calibration=tokens(), progress=False)
    left_alone(model, before, modules)
    monkeypatch.undo()
    again = get_sam_model(model, CONFIG, calibration=tokens(), progress=False)
    close(logits(again.eval()), logits(convert(build(model_type))))


def test_parts_with_other_names_are_found_by_their_shapes():
    class Renamed(OtherForm):
        def forward(self, x):
            return self.w2(self.act(self.w1(x)) * self.w3(x))

    dense = build("llama", mlp_bias=False)
    renamed = copy.deepcopy(dense)
    for layer in renamed.model.layers:
        layer.mlp = Renamed(layer.mlp)
    model = convert(renamed)
    assert model.sam_layers[0].ffn_names == ("w3", "w1", "w2")
    with model.active(8):
        close(logits(model), logits(dense))
    assert type(model.merge_and_unload().model.layers[0].mlp) is Renamed


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "granitemoe"])
def test_a_mixture_of_experts_is_refused(model_type):
    with torch.device("meta"):
        config = AutoConfig.for_model(model_type, **SIZES)
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="'model.layers.0.*(experts|router)': it is already a mixture of experts"):
        find_ffns(model)


def test_a_model_without_an_ffn_says_what_was_looked_for():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2))
    with pytest.raises(InputError, match="MambaForCausalLM has no .*linear children.*fc1/fc2.*activation"):
        find_ffns(model)


def test_dropped_out_activations_are_refused():
    model = build("xglm", d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, activation_dropout=0.1)
    with pytest.raises(InputError, match="model.layers.0 drops out 0.1 of its activations"):
        find_ffns(model)
