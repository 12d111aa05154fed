"""Conversion over the model families: what each stores its FFN as makes no difference to what it computes, saves and
gives back."""

import copy

import pytest
import torch
from families import FAMILIES, build, close, convert, logits, same_state, tokens
from reference import masked_dense
from transformers import AutoModelForCausalLM

from sam_ds.experts.checkpoint import from_pretrained


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
