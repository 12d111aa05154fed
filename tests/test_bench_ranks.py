"""`sam-ds bench memory|moe|tiers|zero` at tiny sizes: what is counted is right; never how long it took."""

from __future__ import annotations

import json

import pytest

from sam_ds.cli import main

SIZES = ["--d", "64", "--m", "256", "--experts", "8", "--rounds", "1"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["bench", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.distributed
def test_moe_times_the_same_routes_in_both_layers(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "moe", *SIZES, "--tokens", "60", "--active", "3")
    calls = {"sam", "stock", "stock+roots", "views"}
    assert {(row["ep_size"], row["call"]) for row in result["rows"]} == {(ep, call) for ep in (1, 2) for call in calls}
    by = {(row["ep_size"], row["call"]): row["median_s"] for row in result["rows"]}
    assert result["ratios"]["stock+roots ep=2"] == pytest.approx(by[2, "sam"] / by[2, "stock+roots"])


@pytest.mark.distributed
def test_memory_compares_what_is_said_with_what_was_taken(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "memory", "--d", "64", "--m", "256", "--layers", "1", "--cases", "4")
    (row,) = result["rows"]
    kept = row["weights"] + row["adapters"] + row["optimizer"]
    assert row["estimated"] == kept + max(row["gradients"], row["activations"]) and row["adapters"] > 0
    assert row["measured"] == max(row["loading"], row["training"])
    assert result["ratios"] == {row["case"]: pytest.approx(row["estimated"] / row["measured"])}


@pytest.mark.parametrize(("arguments", "message"), [
    (["moe", "--experts", "7"], "--experts 7 does not divide --m"),
    (["moe", "--active", "2"], "--active must be between --roots 2"),
    (["moe", "--ep", "1,x"], "--ep must be numbers"),
    (["moe", "--ep", "4"], "ep_size=4 does not divide the 2 ranks"),
    (["moe", "--roots", "1"], "--experts less --roots must be a multiple of every --ep"),
    (["tiers", "--held", "16"], "--held must be above the root and below --experts 16"),
    (["tiers", "--layers", "0"], "--layers must be at least 1"),
    (["memory", "--cases", "0,11"], "--cases must be from 0 to 10"),
    (["memory", "--layers", "0"], "--layers must be at least 1"),
    (["zero", "--stages", "0,4"], "--stages must be of 0, 1, 2 and 3"),
    (["zero", "--ranks", "0"], "--ranks must be at least 1"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_client_of_a_quarter_holds_and_sends_a_quarter(capsys: pytest.CaptureFixture[str], trains: str) -> None:
    arguments = ("--layers", "2", "--tokens", "64", "--held", "2", "--trains", trains, "--standin-rank", "4")
    result = run(capsys, "tiers", *SIZES, *arguments)
    by = {row["what"]: row for row in result["rows"]}
    matrices = 2 * 3 * 64 * 256
    assert (by["weights"]["8"], by["weights"]["2"]) == (4 * matrices, matrices)
    trained = matrices if trains == "full" else 2 * 3 * 256 * 16
    assert 4 * trained < by["up"]["8"] < 4.2 * trained + 100 * 100
    for what in ("weights", "up", "down"):
        assert result["ratios"][what] == pytest.approx(0.25, abs=0.01)
    assert 0.25 < result["ratios"]["first"] < 1


@pytest.mark.distributed
def test_zero_3_halves_what_a_rank_holds(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "zero", *SIZES, "--layers", "2", "--stages", "0,3")
    by = {(row["trains"], row["stage"]): row for row in result["rows"]}
    # AdamW: two moments of every weight; in half precision an fp32 copy too.
    whole = by["fp32 full", 0]
    assert whole["moments"] == pytest.approx(2 * whole["parameters"], rel=0.01) and whole["copies"] == 0
    half = by["bf16 full", 0]
    assert half["copies"] == pytest.approx(2 * half["parameters"], rel=0.01)
    for case in ("bf16 full", "bf16 lora"):
        assert result["ratios"][f"{case} stage 3 / 0"] == pytest.approx(0.5, abs=0.02)
    assert result["ratios"]["nf4 / bf16 matrices stage 0"] == pytest.approx(0.26, abs=0.02)
