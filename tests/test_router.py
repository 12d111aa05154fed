"""Gates: every router scores as its formula says, is fitted for the mass lost, and keeps the budget it was given."""

import copy

import pytest
import torch
from reference import expert_output, gate_scores, layer_input, moe_output, neurons_output

from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import ROUTERS, SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.router import Features, fit_router
from sam_ds.experts.surgery import find_ffns


def text(seed, rows=40):
    return torch.randint(3, 97, (rows, 32), generator=torch.Generator().manual_seed(seed))


def convert(sharp, **changes):
    settings = {"num_experts": 8, "top_k": 4, "standin_rank": 4, "router_rank": 6, "allocation": "uniform"}
    config = SamConfig(**settings | changes)
    return get_sam_model(copy.deepcopy(sharp), config, calibration=text(0), progress=False).eval()


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_a_router_scores_and_routes_as_its_formula_says(sharp, router, tmp_path):
    model = convert(sharp, router=router)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(1, rows=1)])
        torch.testing.assert_close(layer.scores(x_Td), gate_scores(layer, x_Td), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer(x_Td), moe_output(layer, x_Td), atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path).eval()
    assert again.sam_config == model.sam_config
    torch.testing.assert_close(again(text(1)).logits, model(text(1)).logits, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_scores_are_fp32_in_a_model_of_half_precision_and_under_autocast(sharp, router):
    model = convert(sharp, router=router)
    x_Td = torch.randn(9, 32)
    exact_TE = model.sam_layers[0].scores(x_Td)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_TE = model.sam_layers[0].scores(x_Td)
    half_TE = model.to(torch.bfloat16).sam_layers[0].scores(x_Td.bfloat16())
    assert scores_TE.dtype == half_TE.dtype == torch.float32
    for ours_TE in (scores_TE, half_TE):
        assert (ours_TE - exact_TE).norm() < 0.05 * exact_TE.norm()
    assert torch.isfinite(model(text(1)).logits).all()


@torch.no_grad()
@pytest.mark.parametrize("router", ROUTERS)
def test_a_threshold_keeps_the_budget_on_the_calibration_text(sharp, router):
    model = convert(sharp, router=router)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(0)])
        for k in (1, 3, 4, 6, 8):
            assert layer.visited(x_Td, k).float().sum(1).mean() == pytest.approx(k, abs=0.02)
        # On other text it is near.
        other_Td = layer_input(model, layer, [text(2)])
        assert layer.visited(other_Td, 4).float().sum(1).mean() == pytest.approx(4, abs=0.3)


@torch.no_grad()
def test_a_layer_that_may_visit_all_is_not_held_back_by_a_threshold(sharp):
    layer = convert(sharp).sam_layers[0]
    layer.top_k = 8
    assert layer.routing(layer.scores(torch.randn(50, 32) * 5)).visited_TS.all()


@torch.no_grad()
def test_tokens_get_more_experts_where_more_is_lost(sharp):
    """Routes by threshold keep more of the mass than routes of a fixed number, at the same mean."""
    model = convert(sharp)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(0)])
        f_TEd = torch.stack([expert_output(layer, e, x_Td) for e in range(8)], dim=1)
        mass_TE = (f_TEd - f_TEd.mean(0)).square().sum(2)
        fixed_TE = torch.zeros_like(mass_TE).scatter(1, layer.scores(x_Td)[:, 1:].topk(3).indices + 1, 1.0)
        fixed_TE[:, 0] = 1
        assert (mass_TE * layer.visited(x_Td, 4)).sum() > (mass_TE * fixed_TE).sum()
        assert layer.visited(x_Td, 4).sum(1).unique().numel() > 2


@torch.no_grad()
@pytest.mark.parametrize("router", ["linear", "roots", "low_rank"])
def test_a_fitted_gate_predicts_the_mass_better_than_its_mean(sharp, router):
    """On text not seen, the mlp's aside."""
    model = convert(sharp, router=router)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(9)])
        f_TEd = torch.stack([expert_output(layer, e, x_Td) for e in range(1, 8)], dim=1)
        lost_TE = (f_TEd - f_TEd.mean(0)).norm(dim=2)
        assert (layer.scores(x_Td)[:, 1:] - lost_TE).norm() < 0.98 * (lost_TE - lost_TE.mean(0)).norm()


@torch.no_grad()
def test_an_mlp_learns_a_mass_that_no_linear_gate_predicts(tiny_llama):
    (ffn, *_), generator = find_ffns(tiny_llama()), torch.Generator().manual_seed(0)
    x_Td = torch.randn(3000, 32, generator=generator)
    lost_TE = x_Td[:, :4].abs()
    hidden_Tm, errors = torch.zeros(9, 64), {}
    for router in ("linear", "mlp"):
        phi = Features(router, hidden=32, num_experts=4, root_neurons=0, rank=24, gated=True)
        rows_EF = fit_router(phi, ffn, x_Td[:2000], None, lost_TE[:2000], hidden_Tm=hidden_Tm, seed=0)
        errors[router] = (phi(x_Td[2000:], None, ffn.activation) @ rows_EF.t() - lost_TE[2000:]).square().mean()
    assert errors["mlp"] < 0.5 * errors["linear"]


@torch.no_grad()
def test_a_representative_is_a_neuron_of_its_expert(sharp):
    layer = convert(sharp, router="representative").sam_layers[0]
    x_Td = torch.randn(9, 32)
    hidden_TEn = neurons_output(layer, x_Td, slice(None)).abs().unflatten(1, (8, 8))
    difference_En = (hidden_TEn - layer.scores(x_Td)[:, :, None]).abs().amax(0)
    assert (difference_En.amin(1) < 1e-5).all()


@torch.no_grad()
def test_a_low_rank_router_is_the_best_of_its_rank(sharp):
    """Eckart and Young: the predictions of the linear router, less the directions in which they vary least."""
    model = convert(sharp, router="linear")
    full, low = model.sam_layers[0], convert(sharp, router="low_rank").sam_layers[0]
    x_Td = layer_input(model, full, [text(0)])
    exact_TE, scores_TE = full.scores(x_Td), low.scores(x_Td)
    left = torch.linalg.svdvals(exact_TE - exact_TE.mean(0))[6:].norm()
    assert (exact_TE - scores_TE).norm() <= 1.1 * left + 1e-3 * exact_TE.norm()
