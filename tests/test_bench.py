"""The benchmarks: what they print at a tiny size; never how long it took."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from reference import exact_design

from sam_ds.bench.cluster import synthetic_rows
from sam_ds.bench.estimators import _design
from sam_ds.bench.timing import Timed, interleave, rows
from sam_ds.cli import main
from sam_ds.federation import participation
from sam_ds.federation.participation import sample_experts


def test_interleaving_alternates_the_order_and_drops_the_warm_up() -> None:
    order: list[tuple[str, int]] = []
    calls = {name: lambda number, name=name: order.append((name, number)) or name for name in "ab"}
    timed = interleave(calls, rounds=2)
    assert order == [("a", -1), ("b", -1), ("b", 0), ("a", 0), ("a", 1), ("b", 1)]
    assert timed["a"].returned == ["a", "a"] and len(timed["b"].seconds) == 2


def test_rows_compare_medians_with_the_peer() -> None:
    timed = {"ours": Timed(seconds=[1.0, 2.0, 9.0], returned=[]), "peer": Timed(seconds=[4.0] * 3, returned=[])}
    assert rows(timed, "peer")[0] == {"call": "ours", "median_s": 2.0, "low_s": 1.5, "high_s": 5.5, "time": 0.5}


def test_cluster_prints_one_json_object_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("k_means_constrained")
    arguments = ["bench", "cluster", "--m", "64", "--d", "16", "--experts", "4", "--groups", "4", "--rounds", "2"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["parameters"] | {"m": 64, "experts": 4, "rounds": 2, "seed": 0} == result["parameters"]
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["cores"] >= 1
    assert result["ratios"]["inertia"] == pytest.approx(1.0, abs=0.1) and result["ratios"]["time"] > 0
    assert main(arguments) == 0
    assert "ratios: time" in capsys.readouterr().out


def test_cluster_reads_the_rows_of_a_model(tiny, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("k_means_constrained")
    assert main(["bench", "cluster", "--model", str(tiny.model), "--experts", "4", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len({row["points"] for row in result["rows"]}) > 1


@pytest.mark.parametrize(("arguments", "words"), [
    (["--m", "10", "--experts", "4"], "use one of"),
    (["--rounds", "0"], "--rounds"),
    (["--d", "0"], "--d"),
    (["--model", "no such folder"], "cannot be loaded"),
])  # fmt: skip
def test_bad_input_ends_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("k_means_constrained")
    assert main(["bench", "cluster", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_synthetic_rows_are_unit_rows_of_a_seed() -> None:
    points_md = synthetic_rows(32, 8, groups=4, seed=1)
    torch.testing.assert_close(points_md.norm(dim=1), torch.ones(32))
    assert torch.equal(points_md, synthetic_rows(32, 8, groups=4, seed=1))


def estimators(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    assert main(["bench", "estimators", "--rounds", "2", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {row.pop("rule"): row for row in result["rows"]}


@pytest.mark.parametrize("seed", ["0", "7"])
def test_estimators_trade_bias_for_variance(seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimators(capsys, "--seed", seed)
    assert found == estimators(capsys, "--seed", seed)
    assert found["ht"]["bias2"] < 1e-25
    for rule in ("hajek", "clipped", "none"):
        assert found[rule]["bias2"] > 0.01 and found[rule]["variance"] < 0.5 * found["ht"]["variance"]
        assert found[rule]["mse"] == pytest.approx(found[rule]["bias2"] + found[rule]["variance"])
    loose, tight = (estimators(capsys, "--seed", seed, "--clip", clip)["clipped"] for clip in ("16", "2"))
    # No 1/p is above 16 = 4 / 2 clients x 8 / 1.
    assert loose["variance"] == pytest.approx(found["ht"]["variance"]) and loose["bias2"] < 1e-25
    assert tight["bias2"] > found["clipped"]["bias2"] and tight["variance"] < found["clipped"]["variance"]


def test_estimators_enumerate_the_design_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (0, 1, 2, 3):
        h_E, chances = _design(np.random.default_rng(seed))
        with monkeypatch.context() as patch:
            patch.setattr(participation, "_GRAIN", 16)
            want = exact_design(lambda rng, h_E=h_E: sample_experts(h_E, rng))
        assert chances == pytest.approx({subset: float(chance) for subset, chance in want.items() if chance > 1e-9})


@pytest.mark.parametrize(("arguments", "words"), [(["--clip", "0.5"], "clip is 0.5"), (["--spread", "-1"], "--spread")])
def test_estimators_refuse(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "estimators", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_wire_keeps_to_its_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "wire", "--mib", "1", "--units", "20", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 1 <= found["ratios"]["scattered_bytes"] <= 1.1 and 1 <= found["ratios"]["blocks_bytes"] <= 1.002
    assert main(["bench", "wire", "--blocks", "1.5"]) == 2
