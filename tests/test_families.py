"""Conversion over the model families: what each stores its FFN as makes no difference to what it computes, saves and
gives back; and what cannot be converted is refused and left alone."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from reference import masked_dense
from transformers import AutoConfig, AutoModelForCausalLM

from sam_ds.experts.model import SamConfig, from_pretrained, get_sam_model

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
    assert torch.equal(logits(loaded), logits(model))


def test_generation_with_and_without_a_cache(pair):
    _, _, model = pair
    prompt = tokens(2, 6, seed=3)
    arguments = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    cached = model.generate(prompt, **arguments)
    assert cached.shape[1] > 6
    assert torch.equal(model.generate(prompt, use_cache=False, **arguments), cached)
