"""Distillation: the routed model comes nearer to the dense one, which stays what it is; a failure leaves no trace."""

import copy

import pytest
import torch
from reference import layer_input
from torch.nn import functional as F

from sam_ds.errors import InputError
from sam_ds.experts import distill as distillation
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.distill import DistillConfig, distill
from sam_ds.experts.units import prepare


def text(seed, rows=40):
    return torch.randint(3, 97, (rows, 32), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def converted(sharp):
    config = SamConfig(num_experts=8, top_k=3, standin_rank=4, allocation="uniform")
    return get_sam_model(copy.deepcopy(sharp), config, calibration=text(0), progress=False)


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


@torch.no_grad()
def kl(model, ids):
    with model.active(8):
        dense = model.eval()(ids).logits.log_softmax(-1)
    return float(F.kl_div(model(ids).logits.log_softmax(-1), dense, log_target=True, reduction="sum") / ids.numel())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_routed_model_comes_nearer_to_the_dense_which_stays_as_it_is(model):
    before, far = state(model), kl(model, text(5))
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    losses = distill(model.train(), text(0), DistillConfig(steps=40), progress=False)
    assert len(losses) == 40 and sum(losses[-5:]) < sum(losses[:5])
    assert model.training and kl(model, text(5)) < far
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {"basis_dq", "core_SQp", "core_all_Qp", "spread_pd", "threshold_K"}
    assert {name.rpartition(".")[2] for name in changed} == parts
    for layer in model.sam_layers:
        assert not layer.sam.core_SQp[: layer.roots].any() and not layer.sam.core_SQp.requires_grad
        torch.testing.assert_close(layer.sam.core_all_Qp, layer.sam.core_SQp.sum(0))


def test_the_budget_holds_on_the_text(model):
    distill(model, text(0), DistillConfig(steps=10, gates=True), progress=False)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(0)])
        assert layer.visited(x_Td).float().sum(1).mean() == pytest.approx(layer.top_k, abs=0.02)


def test_gates_train_on_request(model):
    before = [layer.sam.wg.clone() for layer in model.sam_layers]
    distill(model, text(0), DistillConfig(steps=5, gates=True), progress=False)
    assert all(not torch.equal(layer.sam.wg, wg) for layer, wg in zip(model.sam_layers, before, strict=True))


def test_an_update_of_the_experts_is_folded_in_on_request(model):
    before = state(model)
    distill(model, text(0), DistillConfig(steps=5, lora_rank=2), progress=False)
    assert all(layer.lora is None for layer in model.sam_layers)
    experts = [layer.matrices()[0] for layer in model.sam_layers]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.isfinite(matrix).all() for matrix in experts)
    ours = [name for name, value in model.state_dict().items() if ".sam." not in name]
    assert sum(not torch.equal(model.state_dict()[name], before[name]) for name in ours) >= 2 * len(experts)


def test_the_same_seed_gives_the_same_model(model):
    other = copy.deepcopy(model)
    for one in (model, other):
        distill(one, text(0), DistillConfig(steps=3), progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_what_goes_wrong_leaves_the_model_as_it_was(model):
    before = state(model)
    with pytest.raises(InputError, match="diverged at step .* lower rate than 1e\\+30"):
        distill(model, text(0), DistillConfig(steps=30, rate=1e30, lora_rank=2), progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(layer.lora is None and not layer.sam.basis_dq.requires_grad for layer in model.sam_layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_rank", [0, 2])
def test_half_precision_learns_too(model, dtype, lora_rank):
    model = model.to(dtype)
    losses = distill(model, text(0), DistillConfig(steps=30, lora_rank=lora_rank), progress=False)
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(layer.sam.core_SQp.dtype == dtype and torch.isfinite(layer.sam.core_SQp).all()
               for layer in model.sam_layers)  # fmt: skip


@pytest.mark.parametrize("where", ["_loss", "set_thresholds"])
def test_an_interruption_leaves_the_model_as_it_was(model, monkeypatch, where):
    before = state(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        distill(model, text(0), DistillConfig(steps=2, lora_rank=2, gates=True), progress=False)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_no_gradient_is_needed_before_or_left_behind(model):
    model.sam_layers[0].sam.wg.grad = torch.ones_like(model.sam_layers[0].sam.wg)
    with torch.no_grad():
        distill(model, text(0), DistillConfig(steps=2, gates=True), progress=False)
    left = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(left) == [next(name for name in left if name.endswith("sam.wg"))]
    assert (next(iter(left.values())) == 1).all()


def test_bad_input_is_refused(model, tiny_llama):
    for bad, words in ({"steps": 0}, "steps .* at least 1, got 0"), ({"rate": 0.0}, "rate .* got 0.0"):
        with pytest.raises(InputError, match=words):
            DistillConfig(**bad)
    with pytest.raises(InputError, match="not converted"):
        distill(tiny_llama(), text(0), DistillConfig())
    for bad, words in (
        (text(0)[:0], "text is empty"), (-text(0), "token id -96"), (text(0) + 97, "vocabulary ends at 96"),
        ([text(0), text(0)[:, :20]], "unequal lengths"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            distill(model, bad, DistillConfig(), progress=False)
    prepare(model, "lora", rank=2, alpha=2.0, seed=0)
    with pytest.raises(InputError, match="low-rank updates already"):
        distill(model, text(0), DistillConfig())
    bare = get_sam_model(
        tiny_llama(), SamConfig(num_experts=8, top_k=3, standin="none"), calibration=text(0), progress=False
    )
    with pytest.raises(InputError, match="nothing to distill"):
        distill(bare, text(0), DistillConfig())
