"""The layer: all experts visited is the dense FFN, a route is what its formula says, a slot model is a masked one."""

import copy

import numpy as np
import pytest
import torch
from reference import moe_output

from sam_ds.errors import InputError
from sam_ds.experts import grouped
from sam_ds.experts.config import SamConfig
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.model import inject_layers, wrap_ffns
from sam_ds.experts.surgery import find_ffns, matrix, permute_neurons
from sam_ds.graph.dag import random_graph


def fill(layer, seed):
    """Random stand-ins, gate and graph, so that nothing is zero by accident."""
    generator = torch.Generator().manual_seed(seed)
    parts = layer.sam
    with torch.no_grad():
        parts.wg.copy_(torch.randn(parts.wg.shape, generator=generator))
        for buffer in (parts.core_SQp, parts.basis_dq, parts.spread_pd):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        parts.core_SQp[: layer.roots] = 0
        parts.core_all_Qp.copy_(parts.core_SQp.sum(0))
        graph = random_graph(layer.slots, 2 * layer.slots, layer.roots, np.random.default_rng(seed))
        parts.adjacency_SS.copy_(torch.from_numpy(graph))
        parts.threshold_K.fill_(0.0)


@pytest.fixture(params=["llama", "gpt2", "llama routed by threshold"])
def pair(request, tiny_llama, tiny_gpt2):
    """A dense model and its converted copy, gates filled at random."""
    dense = tiny_gpt2() if request.param == "gpt2" else tiny_llama()
    routing = "threshold" if request.param.endswith("threshold") else "top_k"
    model = copy.deepcopy(dense)
    config = SamConfig(num_experts=8, top_k=5, roots=2, standin_rank=4, routing=routing)
    ffns = find_ffns(model)
    layers = wrap_ffns(ffns, config)
    inject_layers(model, config, ffns, layers)
    for index, layer in enumerate(layers):
        fill(layer, index)
    return dense, model


def ids(seed=0):
    return torch.randint(0, 97, (3, 17), generator=torch.Generator().manual_seed(seed))


def test_all_experts_visited_is_the_dense_model_in_logits_and_gradients(pair):
    dense, model = pair
    with model.active(8):
        ours = model(input_ids=ids(), labels=ids())
        ours.loss.backward()
    theirs = dense(input_ids=ids(), labels=ids())
    theirs.loss.backward()
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-6, rtol=1e-5)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kernel", [False, True])
def test_a_routed_layer_is_its_formula(pair, lora, kernel, monkeypatch):
    monkeypatch.setattr(grouped, "_worth_grouping", lambda *_: kernel)
    _, model = pair
    layer = model.sam_layers[0]
    if lora:
        layer.lora = LoraSlices(
            hidden=32, neurons=64, gated=layer.ffn_names[1] is not None, rank=4, alpha=8.0, seed=0
        )
        for parameter in layer.lora.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    layer.top_k = 5
    x_Td = torch.randn(11, 32, requires_grad=True)
    y_Td = layer(x_Td)
    expected_Td = moe_output(layer, x_Td)
    torch.testing.assert_close(y_Td, expected_Td, atol=1e-5, rtol=1e-4)
    weight = torch.randn_like(y_Td)
    ours = torch.autograd.grad((y_Td * weight).sum(), [x_Td, *matrices(layer)], retain_graph=True)
    theirs = torch.autograd.grad((expected_Td * weight).sum(), [x_Td, *matrices(layer)])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def matrices(layer):
    return [layer.get_submodule(name).weight for name in layer.ffn_names if name is not None]


def test_the_gate_gradient_is_the_derivative_of_the_formula(pair):
    """d loss / d wg by autograd of the layer = the chain rule written out with g and <dy, f_e - s_e>."""
    _, model = pair
    layer = model.sam_layers[0]
    layer.edge_logits_SS = torch.randn(8, 8, requires_grad=True)
    x_Td = torch.randn(11, 32)
    weight = torch.randn(11, 32)
    ours = torch.autograd.grad((layer(x_Td) * weight).sum(), [layer.sam.wg, layer.edge_logits_SS])
    theirs = torch.autograd.grad((moe_output(layer, x_Td) * weight).sum(), [layer.sam.wg, layer.edge_logits_SS])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert a.abs().max() > 0


def test_the_gate_never_bends_what_the_experts_see(pair):
    _, model = pair
    layer = model.sam_layers[0]
    x_Td = torch.randn(5, 32, requires_grad=True)
    layer.scores(x_Td).sum().backward()
    assert x_Td.grad is None


def test_counting_is_asked_for_and_adds_up(pair):
    from sam_ds.clients.tier_engine import no_counts

    _, model = pair
    layer = model.sam_layers[0].train()
    layer.counters = no_counts(8)
    x_Td = torch.randn(11, 32)
    layer(x_Td)
    layer(x_Td)
    routing = layer.routing(layer.scores(x_Td))
    assert int(layer.counters.used_SS.sum()) == 2 * int((routing.chosen_TJ >= 0).sum())


def test_permuting_neurons_keeps_the_function(pair):
    dense, _ = pair
    before = dense(input_ids=ids()).logits
    for index, ffn in enumerate(find_ffns(dense)):
        permute_neurons(ffn, torch.randperm(ffn.neurons, generator=torch.Generator().manual_seed(index)))
    torch.testing.assert_close(dense(input_ids=ids()).logits, before, atol=1e-6, rtol=1e-5)


def test_weights_are_views(pair):
    _, model = pair
    layer = model.sam_layers[0]
    up_dm, _, down_md = layer.matrices()
    with torch.no_grad():
        layer.slots_in(up_dm)[3].fill_(7.0)
        layer.slots_out(down_md)[3].fill_(5.0)
    neurons = slice(3 * layer.neurons, 4 * layer.neurons)
    assert (matrix(layer.get_submodule(layer.ffn_names[0]))[:, neurons] == 7.0).all()
    assert (matrix(layer.get_submodule(layer.ffn_names[2]))[neurons] == 5.0).all()


def test_a_number_of_experts_that_does_not_divide_names_those_that_do(tiny_llama):
    with pytest.raises(InputError, match=r"num_experts=7 does not divide the 64 neurons .*: 2, 4, 8, 16, 32, 64"):
        wrap_ffns(find_ffns(tiny_llama()), SamConfig(num_experts=7, top_k=3, roots=1))


def test_a_model_without_a_known_ffn_says_what_was_looked_for():
    with pytest.raises(InputError, match="up_proj/gate_proj/down_proj"):
        find_ffns(torch.nn.Linear(3, 3))
