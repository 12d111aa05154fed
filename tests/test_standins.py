"""Stand-ins and gate: the fits are the least squares they claim to be, and they pay off on text not seen."""

import copy
import itertools

import numpy as np
import pytest
import torch
from reference import expert_output, gate_features, layer_input, ridge_oracle, standin_output

from sam_ds.discovery.ridge import ridge
from sam_ds.experts.calibrate import coactivation
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.standins import fit_standins
from sam_ds.graph.route import route

E, ROOTS, D, Q = 4, 1, 8, 2


def linear_problem(rank=Q):
    """Every subset of the three experts that may be missing, each on the same balanced inputs (mean 0, X'X = c I),
    and a left-out output that is sum_{e missing} (b_e + U_e V x)."""
    generator = torch.Generator().manual_seed(0)
    square = torch.linalg.qr(torch.randn(D, D, generator=generator)).Q
    x_Td = torch.cat([square, -square])
    out_Eqd = torch.randn(E, rank, D, generator=generator)
    basis_dq = torch.randn(D, rank, generator=generator)
    shift_Ed = torch.randn(E, D, generator=generator)
    chunks = []
    for missing in itertools.product([False, True], repeat=E - ROOTS):
        unvisited_TE = torch.tensor([False, *missing]).expand(len(x_Td), E)
        residual_Td = sum(
            (shift_Ed[e] + x_Td @ basis_dq @ out_Eqd[e] for e in range(E) if unvisited_TE[0, e]),
            torch.zeros(len(x_Td), D),
        )
        chunks.append((x_Td, residual_Td, unvisited_TE))
    return chunks, shift_Ed, basis_dq, out_Eqd


def fit(chunks, mean_Ed, rank, outputs=D, bases=None):
    return fit_standins(lambda: iter(chunks), mean_Ed=mean_Ed, roots=ROOTS, rank=rank, outputs=outputs, bases=bases)


def parts_of(fitted):
    """(E, d) the constants and (E, d, d) the linear maps of the stand-ins."""
    w_EQd = fitted.core_EQp @ fitted.spread_pd
    return w_EQd[:, -1], fitted.basis_dq @ w_EQd[:, :-1]


def test_a_left_out_output_that_is_linear_of_the_rank_is_recovered():
    chunks, shift_Ed, basis_dq, out_Eqd = linear_problem()
    mean_Ed = torch.randn(E, D)
    mean_Ed[0] = 0
    fitted = fit(chunks, mean_Ed, Q)
    constant_Ed, linear_Edd = parts_of(fitted)
    torch.testing.assert_close((constant_Ed - mean_Ed)[ROOTS:], shift_Ed[ROOTS:], atol=5e-3, rtol=0)
    torch.testing.assert_close(linear_Edd[ROOTS:], (basis_dq @ out_Eqd)[ROOTS:], atol=5e-3, rtol=0)
    assert fitted.basis_dq.shape == (D, Q) and fitted.spread_pd.shape == (D, D)


def test_roots_have_no_standin_and_rank_zero_keeps_the_means():
    chunks, *_ = linear_problem()
    # a root is never left out, whatever a caller says of it
    chunks = [(x, residual, torch.ones_like(missing)) for x, residual, missing in chunks]
    mean_Ed = torch.randn(E, D)
    mean_Ed[0] = 0
    fitted = fit(chunks, mean_Ed, Q)
    assert not fitted.core_EQp[:ROOTS].any() and fitted.core_EQp[ROOTS:].flatten(2).any(2).all()
    kept = fit(chunks, mean_Ed, 0, outputs=E - ROOTS)
    assert kept.basis_dq.shape == (D, 0) and kept.core_EQp.shape == (E, 1, E - ROOTS)
    torch.testing.assert_close(parts_of(kept)[0], mean_Ed)


@pytest.mark.parametrize("rank", [0, Q])
def test_on_given_bases_only_the_core_is_fitted(rank):
    chunks, *_ = linear_problem()
    mean_Ed = torch.randn(E, D)
    mean_Ed[0] = 0
    first = fit(chunks, mean_Ed, rank, 3)
    bases = (first.basis_dq, first.spread_pd)
    assert torch.equal(fit(chunks, mean_Ed, rank, 3, bases).core_EQp, first.core_EQp)
    # Another output over the same inputs, in the directions that W keeps.
    doubled = [(x_Td, 2 * residual_Td, missing_TE) for x_Td, residual_Td, missing_TE in chunks]
    again = fit(doubled, 2 * mean_Ed, rank, 3, bases)
    assert again.basis_dq is first.basis_dq and again.spread_pd is first.spread_pd
    torch.testing.assert_close(again.core_EQp, 2 * first.core_EQp)


@pytest.mark.parametrize("outputs", [False, True])
def test_too_small_a_rank_leaves_more(outputs):
    chunks, *_ = linear_problem(rank=4)

    def error(rank):
        fitted = fit(chunks, torch.zeros(E, D), *((4, 2 * rank) if outputs else (rank, D)))
        constant_Ed, linear_Edd = parts_of(fitted)
        total = 0.0
        for x_Td, residual_Td, missing_TE in chunks:
            standins_TEd = constant_Ed + torch.einsum("td,edo->teo", x_Td, linear_Edd)
            total += float((residual_Td - (missing_TE[:, :, None] * standins_TEd).sum(1)).square().sum())
        return total

    errors = [error(rank) for rank in (0, 1, 2, 4)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3 * errors[0]


@pytest.mark.parametrize("strength", [1e-4, 1e-1, 10.0])
def test_ridge_is_least_squares_with_the_penalty_written_as_rows(strength):
    rng = np.random.default_rng(0)
    x_TF, y_TO = rng.normal(size=(30, 6)) * [1, 2, 3, 4, 5, 6], rng.normal(size=(30, 3))
    x, y = torch.from_numpy(x_TF), torch.from_numpy(y_TO)
    ours = ridge(x.t() @ x, x.t() @ y, strength)
    np.testing.assert_allclose(ours.numpy(), ridge_oracle(x_TF, y_TO, strength), atol=1e-10)


def text(seed, rows=40):
    return torch.randint(3, 97, (rows, 32), generator=torch.Generator().manual_seed(seed))


def convert(sharp, **changes):
    settings = {"num_experts": 8, "top_k": 4, "roots": 2, "standin_rank": 4, "allocation": "uniform"}
    config = SamConfig(**settings | changes)
    return get_sam_model(copy.deepcopy(sharp), config, calibration=text(0), progress=False)


@torch.no_grad()
def outputs(layer, x_Td):
    """(T, E, d) f_e(x)."""
    return torch.stack([expert_output(layer, e, x_Td) for e in range(layer.slots)], dim=1)


@torch.no_grad()
def test_mean_standins_are_the_mean_outputs(sharp):
    model = convert(sharp, standin="mean")
    for layer in model.sam_layers:
        # The inputs of a layer are those of the prefix already converted.
        f_TEd = outputs(layer, layer_input(model, layer, [text(0)]))
        x_1d = torch.randn(1, 32)
        for expert in range(2, 8):
            ours_d = standin_output(layer.sam, expert, x_1d)[0]
            torch.testing.assert_close(ours_d, f_TEd[:, expert].mean(0), atol=1e-5, rtol=1e-4)
        assert not layer.sam.core_SQp[:2].any()


@torch.no_grad()
@pytest.mark.parametrize("standin", ["mean", "none"])
def test_the_gate_is_the_ridge_regression_of_the_lost_mass(sharp, standin):
    model = convert(sharp, standin=standin)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(0)])
        f_TEd = outputs(layer, x_Td)
        center_Ed = f_TEd.mean(0) if standin == "mean" else torch.zeros(8, 32)
        lost_TE = (f_TEd - center_Ed).norm(dim=2)
        phi_TF = gate_features(layer, x_Td).double().numpy()
        rms_F = np.sqrt((phi_TF**2).mean(0))
        expected_FE = ridge_oracle(phi_TF / rms_F, lost_TE.double().numpy(), 1e-3) / rms_F[:, None]
        expected_TE = phi_TF @ expected_FE
        # Scores, not weights: features that say the same leave the weights open in fp32.
        error_TE = layer.scores(x_Td).numpy() - expected_TE
        assert np.linalg.norm(error_TE) < 1e-3 * np.linalg.norm(expected_TE)


@torch.no_grad()
def test_the_gate_visits_what_would_be_lost_better_than_chance(sharp):
    model = convert(sharp)
    generator = torch.Generator().manual_seed(0)
    for layer in model.sam_layers:
        x_Td = layer_input(model, layer, [text(9)])
        f_TEd = outputs(layer, x_Td)
        lost_TE = (f_TEd - f_TEd.mean(0)).norm(dim=2)

        def best(scores_TE, k, layer=layer):
            route_EE = torch.ones(8, 8, dtype=torch.bool).triu(1)
            return route(scores_TE, route_EE, roots=layer.roots, k=k).visited_TS

        def kept(scores_TE, layer=layer, lost_TE=lost_TE):
            visited_TE = best(scores_TE, layer.top_k)
            return float((lost_TE * visited_TE)[:, layer.roots :].sum())

        chance = [kept(torch.randn(lost_TE.shape, generator=generator)) for _ in range(10)]
        assert kept(layer.scores(x_Td)) > max(chance) + 5 * np.std(chance)
        assert kept(lost_TE) > kept(layer.scores(x_Td))


@torch.no_grad()
def test_standins_pay_on_text_not_seen(sharp):
    """The error of what is not visited, over the routes of the gate: linear < mean < none."""
    errors = {}
    for standin in ("none", "mean", "linear"):
        model = convert(sharp, standin=standin)
        layer = model.sam_layers[0]
        x_Td = layer_input(model, layer, [text(9)])
        with model.active(8):
            exact_Td = layer(x_Td)
        errors[standin] = [float((layer(x_Td) - exact_Td).square().mean())]
        # the same routes with the stand-ins taken out
        layer.sam.spread_pd.zero_()
        errors[standin].append(float((layer(x_Td) - exact_Td).square().mean()))
    assert errors["none"][0] == errors["none"][1]
    assert errors["mean"][0] < errors["mean"][1] and errors["linear"][0] < errors["linear"][1]
    assert errors["linear"][0] < errors["mean"][0] < errors["none"][0]


@torch.no_grad()
def test_the_sums_of_the_standins_are_those_of_the_parts(sharp):
    layer = convert(sharp).sam_layers[1]
    x_Td = torch.randn(7, 32)
    every_Td = sum(standin_output(layer.sam, e, x_Td) for e in range(8))
    ours_Td = layer.sam.standins(x_Td, torch.zeros(7, 8))
    torch.testing.assert_close(ours_Td, every_Td, atol=1e-4, rtol=1e-4)
    assert not standin_output(layer.sam, 0, x_Td).any() and standin_output(layer.sam, 7, x_Td).any()


def test_coactivation_is_the_lift_of_a_pair():
    visited_TE = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 0, 1]]).float()
    expected = torch.tensor([[1, 1, 1], [1, 2, 0], [1, 0, 2]]).float()
    torch.testing.assert_close(coactivation(visited_TE), expected)


def test_the_same_seed_gives_the_same_model(sharp):
    first, second, other = convert(sharp, seed=3), convert(sharp, seed=3), convert(sharp, seed=4)
    same = [torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)]
    assert all(same)
    assert any(
        not torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values(), strict=True)
    )
