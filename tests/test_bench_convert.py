"""The conversion benchmark and its baselines, against formulas on a tiny model; never how good a method is."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sam_ds.bench import convert as bench_convert
from sam_ds.bench.conversion import SAM, Cell, active_of, distillation_of, measure, sam_share, settings_of
from sam_ds.cli import main
from sam_ds.discovery.kmeans import balanced_kmeans
from sam_ds.errors import InputError
from sam_ds.evaluation.baselines import BASELINES, baseline_flops, largest_k
from sam_ds.evaluation.baselines.cmoe import nearest_members, shared
from sam_ds.evaluation.baselines.masked import Calibration, Mask, convert
from sam_ds.evaluation.baselines.random_split import random_labels
from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.config import SamConfig
from sam_ds.experts.surgery import find_ffns

EXACT = sorted(set(BASELINES) - {"llama_moe"})


def ids(rows: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (rows, 32), generator=torch.Generator().manual_seed(seed))


def seen(model: Any, *, num_experts: int = 8, k: int = 3) -> Calibration:
    ffn = find_ffns(model)[0]
    x_Td = torch.randn(64, ffn.hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Calibration(
            ffn=ffn, x_Td=x_Td, hidden_Tm=hidden_of(ffn, x_Td), num_experts=num_experts, k=k, seed=0
        )  # fmt: skip


def fitted(name: str, calibration: Calibration) -> Mask:
    with torch.no_grad():
        return BASELINES[name].fit(calibration)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_all_experts_are_the_dense_model(name: str, family: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)()
    with torch.no_grad():
        expected = model(input_ids=ids(4)).logits
        k = largest_k(BASELINES[name], find_ffns(model), num_experts=8, share=1.0)
        convert(model, BASELINES[name], ids(), num_experts=8, k=k, seed=0)
        torch.testing.assert_close(model(input_ids=ids(4)).logits, expected, rtol=1e-4, atol=1e-5)


def test_weighted_experts_are_counted_with_their_gate_even_where_all_are_visited(tiny_llama) -> None:
    ffns = find_ffns(tiny_llama())
    assert largest_k(BASELINES["llama_moe"], ffns, num_experts=8, share=1.0) == [7, 7]
    assert largest_k(BASELINES["emoe"], ffns, num_experts=8, share=1.0) == [8, 8]


@pytest.mark.parametrize("name", sorted(BASELINES))
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_no_more_flops_than_the_share_and_one_expert_more_is_too_many(name: str, share: float, tiny_llama) -> None:
    method = BASELINES[name]
    ffn = find_ffns(tiny_llama())[0]
    experts = 64 if method.per_neuron else 8
    (k,) = largest_k(method, [ffn], num_experts=8, share=share)
    dense = 2 * 3 * 32 * 64
    router = {"emoe": 2 * 32 * 8, "random": 2 * 32 * 8, "llama_moe": 2 * 32 * 8, "moefication": 2 * 8 * (32 + 8),
              "static": 0, "flap": 32}  # fmt: skip
    for visited, fits in ((k, True), (k + 1, False)):
        own = router.get(name, 2 * 2 * 32 * (8 - shared(visited)))
        counted = dense * visited / experts + own
        assert baseline_flops(method, ffn, num_experts=experts, k=visited) == pytest.approx(counted)
        assert (counted <= share * dense) == fits


@pytest.mark.parametrize("routing", ["top_k", "threshold"])
def test_ours_counts_what_the_text_visits(tiny_llama, routing: str) -> None:
    model = tiny_llama()
    ffns = find_ffns(model)
    for share in (0.9, 0.6):
        cell = Cell(method=f"sam:standin=mean:routing={routing}", experts=8, share=share, seed=0)
        most = active_of(cell, ffns)
        config = SamConfig(num_experts=8, top_k=int(most[0]), standin="mean")
        assert sam_share(config, ffns, most) <= share < sam_share(config, ffns, [most[0] + 0.5, most[1] + 0.5])
        found = measure(cell, model, ids(64), {"text": ids(4, seed=2)})
        assert found["flops"] <= share and 0 < found["mass"] < 1
        assert found["flops"] == pytest.approx(sam_share(config, ffns, [8 * found["active"]] * 2))
        if routing == "top_k":
            assert sum(found["k"]) == round(sum(most)) and found["active"] == pytest.approx(np.mean(found["k"]) / 8)


def test_a_cell_may_ask_for_distillation(tiny_llama) -> None:
    """What it does for quality is told by test_distill.py: to a random model's perplexity, nothing."""
    model, text = tiny_llama(), {"text": ids(8, seed=2)}
    methods = ("", ":distill=2", ":distill=2:distill_lora=2")
    cells = [Cell(method=f"sam:standin_rank=4{rest}", experts=8, share=0.6, seed=0) for rest in methods]
    assert len({measure(cell, model, ids(64), text)["perplexity"] for cell in cells}) == 3
    for method, words in (
        ("sam:distill=long", "distill must be of type int"), ("sam:distill=0", "steps .* at least 1"),
        ("sam:distill_lora=2", "give distill=STEPS too"), ("sam:distill=2:standin=none", "nothing to distill"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            distillation_of(Cell(method=method, experts=8, share=0.6, seed=0))


def test_a_share_that_leaves_nothing_is_refused(tiny_llama) -> None:
    ffns = find_ffns(tiny_llama())
    with pytest.raises(InputError, match="share = 0.01 .*emoe.*larger share"):
        largest_k(BASELINES["emoe"], ffns, num_experts=8, share=0.01)
    with pytest.raises(InputError, match="share = 0.01 .*larger share"):
        active_of(Cell(method=SAM, experts=8, share=0.01, seed=0), ffns)


def test_layers_are_fitted_behind_the_layers_already_converted(tiny_llama) -> None:
    model, ids_BS = tiny_llama(), ids()
    layers = convert(model, BASELINES["flap"], ids_BS, num_experts=8, k=[20, 20], seed=0)
    inputs: list[torch.Tensor] = []
    handle = layers[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        model(input_ids=ids_BS)
        handle.remove()
        assert layers[1].mask is not None and layers[1].mask.bias_d is not None
        hidden_Tm = hidden_of(layers[1].ffn, inputs[0])
        removed_m = 1 - layers[1].mask.factor(inputs[0])
        bias_d = (hidden_Tm.mean(0) * removed_m) @ layers[1].ffn.weights()[2]
    torch.testing.assert_close(layers[1].mask.bias_d, bias_d, rtol=1e-4, atol=1e-6)


def test_emoe_scores_are_mean_pre_activations(tiny_llama) -> None:
    calibration = seen(tiny_llama())
    factor_Tm = fitted("emoe", calibration).factor(calibration.x_Td)
    gate_dm = calibration.ffn.weights()[1]
    assert gate_dm is not None
    pre_Tm = (calibration.x_Td @ gate_dm).detach()
    # The experts can be read off the mask: neurons that are always visited together.
    labels_m = (factor_Tm.t()[:, None] == factor_Tm.t()[None]).all(-1).float().argmax(1)
    experts = labels_m.unique()
    assert len(experts) == 8
    for token in range(64):
        scores = torch.stack([pre_Tm[token, labels_m == e].mean() for e in experts])
        visited = torch.stack([factor_Tm[token, labels_m == e].mean() for e in experts])
        assert set(scores.topk(3).indices.tolist()) == set(visited.nonzero()[:, 0].tolist())


def test_moefication_starts_from_mean_keys_and_trains_from_there(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = seen(tiny_llama())
    trained_Tm = fitted("moefication", calibration).factor(calibration.x_Td)
    monkeypatch.setattr("sam_ds.evaluation.baselines.keys._RATE", 0.0)
    start_Tm = fitted("moefication", calibration).factor(calibration.x_Td)
    assert torch.equal(trained_Tm.sum(1), torch.full((64,), 3 * 8.0)) and not torch.equal(trained_Tm, start_Tm)
    gate_dm = calibration.ffn.weights()[1]
    assert gate_dm is not None
    rows_md = F.normalize(gate_dm.t(), dim=1).detach()
    labels_m = balanced_kmeans(rows_md, 8, seed=0).labels_m
    for token in range(64):
        x_d = calibration.x_Td[token] / calibration.x_Td[token].norm()
        scores = torch.stack([torch.tanh(rows_md[labels_m == e].mean(0) @ x_d) for e in range(8)])
        assert set(labels_m[start_Tm[token] == 1].tolist()) == set(scores.topk(3).indices.tolist())


def test_cmoe_visits_the_most_active_neurons_always_and_routes_by_a_representative(tiny_llama) -> None:
    calibration = seen(tiny_llama(), k=4)
    factor_Tm = fitted("cmoe", calibration).factor(calibration.x_Td)
    assert torch.equal(factor_Tm.sum(1), torch.full((64,), 4 * 8.0))
    rate_m = torch.zeros(64)
    for hidden_m in calibration.hidden_Tm:
        rate_m[hidden_m.abs().topk(10).indices] += 1 / 64
    always = (factor_Tm == 1).all(0)
    assert set(rate_m.argsort(descending=True, stable=True)[:16].tolist()) <= set(always.nonzero()[:, 0].tolist())
    points_md, labels_m = torch.randn(12, 5), torch.arange(12) % 3
    centers_Ed = torch.stack([points_md[labels_m == e].mean(0) for e in range(3)])
    for expert, member in enumerate(nearest_members(points_md, labels_m, centers_Ed).tolist()):
        own = [m for m in range(12) if labels_m[m] == expert]
        assert member == min(own, key=lambda m: float((points_md[m] - centers_Ed[expert]).norm()))


def test_static_and_flap_keep_by_energy_and_by_fluctuation(tiny_llama) -> None:
    calibration = seen(tiny_llama(), num_experts=64, k=20)
    down_md = calibration.ffn.weights()[2].detach()
    norm_m = torch.tensor([float(row.norm()) ** 2 for row in down_md])
    h_Tm = calibration.hidden_Tm
    for name, score_m in (("static", (h_Tm**2).mean(0) * norm_m), ("flap", h_Tm.var(0, unbiased=True) * norm_m)):
        mask = fitted(name, calibration)
        kept = mask.factor(calibration.x_Td).nonzero()[:, 0]
        assert set(kept.tolist()) == set(score_m.topk(20).indices.tolist())
        if name == "flap":
            removed = [m for m in range(64) if m not in kept]
            bias_d = sum(h_Tm[:, m].mean() * down_md[m] for m in removed)
            torch.testing.assert_close(mask.bias_d, bias_d, rtol=1e-4, atol=1e-6)


def test_random_split_is_balanced_and_llama_moe_weighs_to_a_mean_of_one(tiny_llama) -> None:
    calibration = seen(tiny_llama())
    labels_m = random_labels(calibration)
    assert torch.equal(labels_m.bincount(), torch.full((8,), 8))
    factor_Tm = fitted("llama_moe", calibration).factor(calibration.x_Td)
    weight_TE = torch.stack([factor_Tm[:, labels_m == e][:, 0] for e in range(8)], dim=1)
    assert ((weight_TE > 0).sum(1) == 3).all()
    torch.testing.assert_close(weight_TE.sum(1), torch.full((64,), 3.0))
    # Ridge regression as the formula says, in float64.
    x_Td = calibration.x_Td.double()
    down_md = calibration.ffn.weights()[2].detach()
    norms_TE = torch.stack([
        (calibration.hidden_Tm[:, labels_m == e] @ down_md[labels_m == e]).norm(dim=1) for e in range(8)
    ], dim=1)  # fmt: skip
    gram_dd = x_Td.t() @ x_Td
    strength = 1e-3 * gram_dd.diagonal().mean()
    wg_dE = torch.linalg.inv(gram_dd + strength * torch.eye(32)) @ x_Td.t() @ norms_TE.double().log()
    top = (x_Td @ wg_dE).topk(3, dim=1)
    expected_TE = torch.zeros_like(x_Td[:, :8]).scatter_(1, top.indices, 3 * F.softmax(top.values, dim=1))
    torch.testing.assert_close(weight_TE.double(), expected_TE, rtol=1e-3, atol=1e-3)
    random_Tm = fitted("random", calibration).factor(calibration.x_Td)
    top = (x_Td @ torch.linalg.inv(gram_dd + strength * torch.eye(32)) @ x_Td.t() @ norms_TE.double()).topk(3, dim=1)
    expected_TE = torch.zeros_like(expected_TE).scatter_(1, top.indices, 1.0)
    assert (random_Tm.double() == expected_TE[:, labels_m]).float().mean() > 0.99


def test_mass_is_the_energy_of_the_visited_neurons(tiny_llama) -> None:
    model, test_BS = tiny_llama(num_hidden_layers=1), ids(2, seed=3)
    cell = Cell(method="static", experts=None, share=0.5, seed=0)
    found = measure(cell, model, ids(), {"text": test_BS})
    layers = convert(converted := copy.deepcopy(model), BASELINES["static"], ids(), num_experts=0, k=[32], seed=0)
    assert layers[0].mask is not None
    kept_m = layers[0].mask.factor(torch.zeros(1, 32))
    inputs: list[torch.Tensor] = []
    layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0].reshape(-1, 32)))
    with torch.no_grad():
        converted(input_ids=test_BS)
        energy_Tm = hidden_of(layers[0].ffn, inputs[0]) ** 2 * layers[0].ffn.weights()[2].norm(dim=1) ** 2
    expected = ((energy_Tm * kept_m).sum(1) / energy_Tm.sum(1)).mean()
    assert found["mass"] == pytest.approx(float(expected), rel=1e-4)
    assert measure(Cell(method="static", experts=None, share=1.0, seed=0), model, ids(), {"text": test_BS})[
        "mass"
    ] == pytest.approx(1.0)


def arguments(tiny: Any, out: Path, *more: str) -> list[str]:
    return [
        "bench", "convert", "--model", str(tiny.model), "--data", str(tiny.corpus), "--experts", "4,8", "--shares",
        "1,0.6", "--seeds", "2", "--tokens", "1536", "--test-rows", "2", "--window", "32", "--out", str(out), *more,
    ]  # fmt: skip


def test_finished_cells_are_read_back_and_the_table_has_all_methods(
    tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cells.jsonl"
    assert main(arguments(tiny, out, "--methods", "emoe,static", "--json")) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(out.read_text().splitlines()) == 2 * 2 * (2 + 1)  # seeds, shares; E for emoe, none for static
    assert first["ratios"] == {} and {row["method"] for row in first["rows"]} == {"emoe", "static"}
    for row in first["rows"]:
        assert row["flops"] <= row["share"] and row["seeds"] == 2 and row["low"] <= row["ratio"] <= row["high"]
        if row["share"] == 1:
            assert row["ratio"] == pytest.approx(1.0, rel=1e-4) and row["mass"] == pytest.approx(1.0)

    asked: list[str] = []

    def count(cell: Cell, *args: Any, **more: Any) -> dict[str, Any]:
        asked.append(cell.method)
        return measure(cell, *args, **more)

    monkeypatch.setattr(bench_convert, "measure", count)
    ours = "sam:standin=mean"
    assert main(arguments(tiny, out, "--methods", f"{ours},emoe,static", "--seeds", "1", "--json")) == 0
    second = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked == [ours] * 4
    assert {row["method"] for row in second["rows"]} == {ours, "emoe", "static"}
    assert set(second["ratios"]) == {"E=4 1", "E=4 0.6", "E=8 1", "E=8 0.6"}
    assert second["ratios"]["E=8 1"] == pytest.approx(1.0, rel=1e-4)
    # Anew where it is asked for, and not at all where other text is meant.
    assert main(arguments(tiny, out, "--methods", ours, "--seeds", "1", "--again")) == 0
    assert asked == [ours] * 8 and "E=8 0.6" in capsys.readouterr().out
    assert main(arguments(tiny, out, "--methods", "static", "--domains", "ships", "--seeds", "1")) == 0
    assert asked == [ours] * 8 + ["static"] * 2


@pytest.mark.parametrize(("more", "words"), [
    (["--methods", "emoo"], "'emoo'; did you mean 'emoe'"),
    (["--methods", "emoe:k=3"], "only sam takes settings"),
    (["--methods", "sam:standing=mean"], "did you mean 'standin'"),
    (["--methods", "sam:top_k=3"], "'top_k=3', which sets no field"),
    (["--methods", "sam:roots=two"], "'roots=two': roots must be of type int"),
    (["--methods", "sam:standin=median"], "'median'"),
    (["--shares", "0.5,1.5"], "--shares must be above 0 and at most 1"),
    (["--shares", "half"], "--shares must be numbers parted by commas, got 'half'"),
    (["--experts", "5"], "do not split into 5"),
    (["--experts", "1"], "--experts must be at least 2"),
    (["--seeds", "0"], "--seeds must be at least 1, got 0"),
    (["--test-rows", "0"], "--test-rows must be at least 1"),
    (["--window", "1"], "--window must be at least 2"),
    (["--domains", "shops"], "'shops', which .* did you mean 'ships'"),
    (["--model", "no such folder"], "cannot be loaded"),
    (["--shares", "0.01"], "share = 0.01 "),
])  # fmt: skip
def test_bad_input_ends_with_2(
    more: list[str], words: str, tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tiny, tmp_path / "cells.jsonl", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(words, error), error


def test_a_file_of_something_else_is_refused(tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cells.jsonl"
    out.write_text('{"round": 1}\n')
    assert main(arguments(tiny, out)) == 2
    assert "line 1 is not a cell" in capsys.readouterr().err
    assert out.read_text() == '{"round": 1}\n'


def test_settings_are_of_their_fields_types() -> None:
    assert settings_of("sam:standin=mean:roots=3:density=0.25") == {"standin": "mean", "roots": 3, "density": 0.25}
    assert settings_of("sam") == settings_of("emoe") == {}
