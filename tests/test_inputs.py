"""Inputs of the layers: what a whole forward pass gives each, changed layers included, at two runs of each layer."""

import copy
from collections import Counter

import pytest
import torch
from families import FAMILIES, build, convert, tokens
from reference import layer_input
from torch import nn

from sam_ds.experts.inputs import layer_inputs
from sam_ds.experts.surgery import find_ffns

BATCHES = [tokens(5, 16, seed=4), tokens(18, 9, seed=5)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_inputs_are_those_of_whole_forward_passes(family):
    """Four layers; each FFN is changed once its own inputs are known. Afterwards nothing is left on the model."""
    layers = {"num_hidden_layers": 4} if "num_hidden_layers" in FAMILIES[family].sizes else {"n_layer": 4}
    model = build(family, **layers)
    ffns = find_ffns(model)
    assert len(ffns) == 4
    for ffn, x_Td in zip(ffns, layer_inputs(model, [ffn.entry for ffn in ffns], BATCHES), strict=True):
        torch.testing.assert_close(x_Td, layer_input(model, ffn.entry, BATCHES), atol=1e-5, rtol=1e-5)
        ffn.weights()[2].mul_(-1.5)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_inputs_of_a_converted_model_whose_layers_change():
    model = convert(build("opt"))
    for layer, x_Td in zip(model.sam_layers, layer_inputs(model, model.sam_layers, BATCHES), strict=True):
        torch.testing.assert_close(x_Td, layer_input(model, layer, BATCHES), atol=1e-5, rtol=1e-5)
        layer.top_k = 2


def test_each_layer_runs_twice_at_most(tiny_llama):
    model = tiny_llama(num_hidden_layers=6)
    runs = Counter()
    for index, block in enumerate(model.model.layers):
        # What only a real run of the block calls.
        block.self_attn.register_forward_hook(lambda *_, index=index: runs.update([index]))
    list(layer_inputs(model, [ffn.entry for ffn in find_ffns(model)], BATCHES[:1]))
    assert [runs[index] for index in range(6)] == [2, 2, 2, 2, 2, 1]


def test_two_layers_in_one_block_and_layers_in_no_list(tiny_llama):
    """Modules in one decoder layer are given both of theirs; where there is no list of layers every pass is whole."""
    model = tiny_llama(num_hidden_layers=3)
    modules = [inner for block in model.model.layers for inner in (block.self_attn.o_proj, block.mlp)]
    for module, x_Td in zip(modules, layer_inputs(model, modules, BATCHES), strict=True):
        torch.testing.assert_close(x_Td, layer_input(model, module, BATCHES), atol=1e-5, rtol=1e-5)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(97, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, input_ids, use_cache=None):
            return self.second(self.first(self.embed(input_ids)))

    chain = Chain()
    for module, x_Td in zip([chain.first, chain.second], layer_inputs(chain, [chain.first, chain.second], BATCHES),
                            strict=True):  # fmt: skip
        torch.testing.assert_close(x_Td, layer_input(chain, module, BATCHES))


def test_a_failure_leaves_nothing_on_the_model(tiny_llama):
    """A forward of a block's own, such as a library's hook sets, is put back."""
    model = tiny_llama(num_hidden_layers=3)
    own = copy.copy(model.model.layers[0].forward)
    model.model.layers[0].forward = own
    inputs = layer_inputs(model, [ffn.entry for ffn in find_ffns(model)], BATCHES)
    next(inputs)
    next(inputs)
    model.model.layers[1].mlp.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(inputs)
    assert vars(model.model.layers[0])["forward"] is own
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
