"""Conversion over the model families: what each stores its FFN as makes no difference to what it computes, saves and
gives back; and what cannot be converted is refused and left alone."""

import copy
from dataclasses import dataclass, field
from functools import partial

import bitsandbytes
import pytest
import torch
from reference import masked_dense
from test_slots import HELD, client, graph, restrict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.model import add_assembler
from sam_ds.experts.slots import to_slots
from sam_ds.experts.surgery import find_ffns
from sam_ds.experts.units import TRAINS, prepare, read_units, shared_parameters, trained_fields, write_units

CONFIG = SamConfig(num_experts=8, top_k=4, roots=2, standin_rank=4)
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Family:
    """A tiny model of one family, and where that family keeps its FFN."""

    settings: dict = field(default_factory=dict)
    sizes: dict = field(default_factory=lambda: SIZES)
    owner: str = "model.layers.{}.mlp"
    inner: tuple = ("gate_proj", "up_proj")
    down: str = "down_proj"
    entry: str = ""
    """The child of `owner` that is called with the FFN's input; the owner itself where empty."""
    blocks: int = 1
    transposed: bool = False

    def places(self, model):
        """(called with the FFN's input, down-projection) of every layer."""
        owners = [model.get_submodule(self.owner.format(layer)) for layer in range(2)]
        return [(owner.get_submodule(self.entry), owner.get_submodule(self.down)) for owner in owners]

    def neuron_first(self, name, value):
        """A view (m, blocks, ...) of an FFN parameter; None where `name` is not owned by neurons."""
        for layer in range(2):
            for child in (*self.inner, self.down):
                prefix = f"{self.owner.format(layer)}.{child}."
                if name == prefix + "weight":
                    rows = value.t() if self.transposed == (child != self.down) else value
                    return rows[:, None] if child == self.down else rows.unflatten(0, (self.blocks, -1)).transpose(0, 1)
                if name == prefix + "bias" and child != self.down:
                    return value.view(self.blocks, -1).t()
        return None

    def orders(self, dense, converted):
        """For every layer the place in `dense` of each neuron of `converted`, by what it reads; exact."""
        found = []
        for layer in range(2):
            name = f"{self.owner.format(layer)}.{self.inner[0]}.weight"
            before, after = (
                self.neuron_first(name, model.state_dict()[name]).flatten(1) for model in (dense, converted)
            )
            same = (after[:, None] == before[None]).all(-1)
            assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all()
            found.append(same.int().argmax(1))
        return found

    def in_old_order(self, name, value, orders):
        """`value`, a parameter of the converted model or its gradient, with the neurons where they were."""
        value = value.clone()
        view = self.neuron_first(name, value)
        if view is not None:
            layer = next(layer for layer in range(2) if name.startswith(self.owner.format(layer) + "."))
            view[orders[layer]] = view.clone()
        return value


PLAIN = {"inner": ("dense_h_to_4h",), "down": "dense_4h_to_h"}
FC = {"inner": ("fc1",), "down": "fc2"}
FAMILIES = {
    "llama": Family({"mlp_bias": True}),
    "mistral": Family({"sliding_window": 16}),
    "qwen2": Family(),
    "qwen3": Family({"head_dim": 8}),
    "gemma": Family({"head_dim": 8}),
    "gemma2": Family({"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "gemma3_text": Family({"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}),
    "phi": Family(**FC),
    "phi3": Family(inner=("gate_up_proj",), blocks=2),
    "gpt2": Family(
        sizes={"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        owner="transformer.h.{}.mlp", inner=("c_fc",), down="c_proj", transposed=True,
    ),
    "gpt_neox": Family(owner="gpt_neox.layers.{}.mlp", **PLAIN),
    "opt": Family(
        {"ffn_dim": 64, "word_embed_proj_dim": 32}, owner="model.decoder.layers.{}", entry="fc1", **FC
    ),
    "falcon": Family({"ffn_hidden_size": 64, "bias": True}, owner="transformer.h.{}.mlp", **PLAIN),
    "bloom": Family(
        sizes={"hidden_size": 32, "n_layer": 2, "n_head": 4}, owner="transformer.h.{}.mlp", **PLAIN
    ),
    "stablelm": Family(),
    "olmo2": Family(),
    "granite": Family({"mlp_bias": True, "residual_multiplier": 0.5}),
}  # fmt: skip


def build(model_type, **changes):
    """A random model in eval mode; no bias is zero, no FFN too weak to be seen in the logits."""
    family = FAMILIES.get(model_type, Family())
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**TOKENS, **family.sizes, **family.settings, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1, generator=generator)
    return model


def tokens(rows=8, columns=32, seed=1):
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(seed))


def convert(dense, config=CONFIG, calibration=None):
    ids = tokens() if calibration is None else calibration
    return get_sam_model(copy.deepcopy(dense), config, calibration=ids, progress=False)


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tokens(3, 17, seed=2) if ids is None else ids).logits


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def same_state(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """(family, dense model, converted model)."""
    dense = build(request.param)
    return FAMILIES[request.param], dense, convert(dense)


def test_all_experts_visited_is_the_dense_model_in_logits_and_gradients(pair):
    family, dense, model = pair
    ids = tokens(3, 17, seed=2)
    with model.active(8):
        ours = model(input_ids=ids, labels=ids)
        ours.loss.backward()
    theirs = dense(input_ids=ids, labels=ids)
    theirs.loss.backward()
    close(ours.logits, theirs.logits)
    orders = family.orders(dense, model)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in dense.named_parameters():
        gradient = family.in_old_order(name, gradients[name], orders)
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
        assert ".sam." not in name
    model.zero_grad()


def test_a_sparse_forward_is_the_dense_model_with_neurons_masked(pair):
    family, dense, model = pair
    merged = copy.deepcopy(model).merge_and_unload()
    sparse = logits(model)
    assert (sparse - logits(dense)).abs().max() > 1e-3
    with torch.no_grad(), masked_dense(model.sam_layers, family.places(merged)):
        close(logits(merged), sparse)


def test_merging_gives_the_original_state_with_its_neurons_in_another_order(pair):
    family, dense, model = pair
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(dense)
    close(logits(merged), logits(dense))
    orders = family.orders(dense, merged)
    assert all(not torch.equal(order, order.sort().values) for order in orders)
    state = {name: family.in_old_order(name, value, orders) for name, value in merged.state_dict().items()}
    same_state(state, dense.state_dict())
    assert [type(module) for module in merged.modules()] == [type(module) for module in dense.modules()]
    assert not [name for module in merged.modules() for name in vars(module) if name == "forward"]


def test_a_saved_folder_loads_as_the_plain_and_as_the_converted_model(pair, tmp_path):
    _, dense, model = pair
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(plain) is type(dense)
    same_state(plain.state_dict(), copy.deepcopy(model).merge_and_unload().state_dict())
    with model.active(8):
        close(logits(plain), logits(model))
    loaded = from_pretrained(tmp_path)
    same_state(loaded.state_dict(), model.state_dict())
    # to rounding: a file's weights lie at other addresses, where other kernels round otherwise
    close(logits(loaded), logits(model))


def test_generation_with_and_without_a_cache(pair):
    _, _, model = pair
    prompt = tokens(2, 6, seed=3)
    arguments = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    cached = model.generate(prompt, **arguments)
    assert cached.shape[1] > 6
    assert torch.equal(model.generate(prompt, use_cache=False, **arguments), cached)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt2", {"resid_pdrop": 0.3}),
        ("bloom", {"hidden_dropout": 0.3}),
        ("falcon", {"hidden_dropout": 0.3, "parallel_attn": False}),
        ("opt", {"dropout": 0.3}),
        ("starcoder2", {"residual_dropout": 0.3}),
    ],
)
def test_in_training_mode_the_same_outputs_are_dropped(model_type, changes):
    dense = build(model_type, **changes)
    model = convert(dense)
    training = []
    for each in (dense, model):
        torch.manual_seed(5)
        with model.active(8):
            training.append(logits(each.train()))
    close(training[1], training[0])
    assert (training[0] - logits(dense.eval())).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_stays_tied(tied, tmp_path):
    dense = build("llama", tie_word_embeddings=tied)
    model = convert(dense)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    for each in (model, from_pretrained(tmp_path), plain, copy.deepcopy(model).merge_and_unload()):
        assert (each.lm_head.weight is each.get_input_embeddings().weight) == tied
        assert sum(p.numel() for name, p in each.named_parameters() if ".sam." not in name) == dense.num_parameters()
    close(logits(plain), logits(dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_half_precision(model_type, dtype):
    dense = build(model_type).to(dtype)
    model = convert(dense)
    with model.active(8):
        torch.testing.assert_close(logits(model), logits(dense), atol=4e-2, rtol=4e-2)
    sparse = model(input_ids=tokens(3, 17, seed=2), labels=tokens(3, 17, seed=2))
    assert sparse.logits.dtype == dtype and torch.isfinite(sparse.logits).all()
    sparse.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    family = FAMILIES[model_type]
    merged = model.merge_and_unload()
    orders = family.orders(dense, merged)
    same_state({n: family.in_old_order(n, v, orders) for n, v in merged.state_dict().items()}, dense.state_dict())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_gradient_checkpointing_changes_no_gradient(model_type):
    model = convert(build(model_type)).train()
    calls = []
    model.sam_layers[0].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        model.zero_grad()
        calls.clear()
        torch.manual_seed(0)
        model(input_ids=tokens(3, 17), labels=tokens(3, 17), use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert len(calls) == 1
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients()
    assert len(calls) == 2 and plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=name)


# Dynamo instantiates the autograd function of Bloom's activation itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("model_type", "top_k", "backend"),
    [
        ("llama", 8, "eager"),
        ("opt", 8, "eager"),
        pytest.param("llama", 4, "inductor", marks=pytest.mark.slow),
        pytest.param("opt", 4, "inductor", marks=pytest.mark.slow),
        pytest.param("bloom", 4, "inductor", marks=pytest.mark.slow),
    ],
)
def test_compiled(model_type, top_k, backend):
    model = convert(build(model_type))
    with model.active(top_k):
        expected = logits(model)
        torch._dynamo.reset()
        close(logits(torch.compile(model, backend=backend)), expected)


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
    calibrate, seen = get_sam_model.__globals__["calibrate_layer"], []

    def fail_second(layer, x_Td, **settings):
        seen.append(layer)
        if len(seen) == 2:
            x_Td = x_Td * float("nan")
        return calibrate(layer, x_Td, **settings)

    monkeypatch.setitem(get_sam_model.__globals__, "calibrate_layer", fail_second)
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


SLOTS = ["llama", "gpt2", "phi3", "opt"]


@torch.no_grad()
@pytest.mark.parametrize("trains", ["full", "lora"])
@pytest.mark.parametrize("model_type", SLOTS)
def test_a_slot_model_is_the_full_model_restricted_to_what_is_held(model_type, trains, tmp_path):
    convert(build(model_type)).save_pretrained(tmp_path)
    full = from_pretrained(tmp_path)
    ours = client(tmp_path, full, HELD, 3, graph(0), trains)
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in full.parameters())
    close(logits(ours), logits(restrict(full, HELD, 3, graph(0))))


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("model_type", SLOTS)
def test_what_trains_has_one_owner_and_is_written_where_it_was_read(model_type, trains):
    """On a client, whose slots hold three of the experts."""
    held = ((0, 1, 4), (0, 1, 7))
    model = convert(build(model_type))
    to_slots(model, 3)
    add_assembler(model, seed=0)
    prepare(model, trains, rank=3, alpha=6.0, seed=7, dense=True)
    fields, shared = trained_fields(model, trains), shared_parameters(model, trains, dense=True)
    parameters = dict(model.named_parameters())
    owners = {name: torch.zeros(value.shape) for name, value in parameters.items()}
    for name in shared.values():
        owners[name] += 1
    for each in fields:
        for slot in range(3):
            each.read(owners[each.parameter], slot).add_(1)
    for name, value in parameters.items():
        assert (owners[name] == float(value.requires_grad)).all(), name
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(torch.randn(value.shape))
        before = {name: value.clone() for name, value in parameters.items()}
        units = read_units(fields, shared, parameters, held)
        for name in {each.parameter for each in fields} | set(shared.values()):
            parameters[name].zero_()
        write_units(units, fields, shared, parameters, held)
    same_state(parameters, before)
    if trains == "full" and model_type == "phi3":
        assert {u.tensor: v.shape for u, v in units.items() if getattr(u, "expert", None) == 7} == {
            "gate_up": (8, 2, 32), "down": (8, 32), "wg": (1, 32)
        }  # fmt: skip
