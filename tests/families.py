"""Tiny models of the families, and where each stores its FFN."""

import copy
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model

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
