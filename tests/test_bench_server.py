"""The benchmarks of the server: that what they time is the real thing, and counts what it says."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
from in_process import Federation

from sam_ds.bench import cohorts
from sam_ds.bench.aggregate import KINDS, fold, make_replies
from sam_ds.bench.virtual_grid import VirtualGrid
from sam_ds.cli import main
from sam_ds.federation.grid import identify
from sam_ds.wire.payload import decode_units, unit_name

TINY = {"layers": 2, "experts": 4, "held": 2, "d": 16, "n": 8}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_folded_is_the_sum_of_the_replies(kind: str) -> None:
    replies = make_replies(kind, argparse.Namespace(**TINY, seed=3))
    found, want = fold(replies, 8), {}
    for blobs in replies.blobs:
        for unit, delta in decode_units(blobs).items():
            # Each comes twice, |D_i| / sum |D_j| is 1/8 and p 1/2.
            want[unit] = want.get(unit, 0.0) + 2 * delta.astype(np.float64) / 8 / 0.5
    assert found.deltas.keys() == want.keys()
    for unit, delta in found.deltas.items():
        np.testing.assert_allclose(delta, want[unit], rtol=1e-5, atol=1e-6)
    width = 16  # of --d and of a low-rank slice
    values = 2 * 2 * 3 * 8 * width // (4 if kind == "rows" else 1)
    assert all(0.95 * values < nonzero <= values for nonzero in replies.nonzero)
    assert replies.model_bytes == 4 * 2 * 4 * 3 * 8 * width


def test_aggregate_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    assert main(["bench", "aggregate", *sizes, "--replies", "4", "--kinds", "raw,int8", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["kind"] for row in result["rows"]] == ["raw", "int8"] and result["ratios"]["raw time"] > 0
    assert main(["bench", "aggregate", "--kinds", "raw,none"]) == 2
    assert "--kinds must be from" in capsys.readouterr().err


def test_cohorts_of_plans_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all send everything a cohort is the round; one client alone has nobody to hide with."""
    monkeypatch.setattr(cohorts, "TIERS", {"all": (16, 16, 16), "few": (4, 4, 4)})
    monkeypatch.setattr(cohorts, "CASES", ((6, 3), (5, 1), (40, 20)))
    rows = cohorts.run(argparse.Namespace(layers=2, least=4, floor=0.1, rounds=3, seed=0))["rows"]
    whole, few, lone, _, many, sparse = rows
    assert (whole["alone"], whole["few"], whole["median"], whole["dense"], whole["keys"]) == (0, 1, 3, 1, 2)
    assert lone["alone"] == lone["few"] == 1 and lone["keys"] == 0
    assert (many["few"], many["smallest"], many["keys"]) == (0, 20, 19)
    assert few["dense"] == sparse["dense"] == 4 and 0 < few["alone"] < 1 and sparse["median"] < 10


def test_a_virtual_grid_is_answered_like_a_real_one(tiny, tmp_path) -> None:
    """All replies are valid, and no client computes."""
    federation = Federation.of(tiny.config(tmp_path), tiny.base)
    server, strategy = federation.server, federation.strategy
    shapes = {unit_name(unit): value.shape for unit, value in server.state.units.items()}
    grid = VirtualGrid(server.dealt(), shapes, server.layers, server.num_experts)
    identify(0)
    before = dict(server.state.units)
    strategy.start(grid)
    assert [record["answers"] for record in federation.records("round")[1:]] == [3, 3]
    assert all(record["status"] == "ok" for record in federation.records("client"))
    assert any((value != before[unit]).any() for unit, value in server.state.units.items())
    assert (server.state.examples == 100).all()
    assert grid.seconds > 0 and grid.registration > 0 and grid.asked > 0


@pytest.mark.slow
def test_scale_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", "--cases", "40:4,80:4,80:8", "--rounds", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["clients"], row["drawn"]) for row in result["rows"]] == [(40, 4), (80, 4), (80, 8)]
    assert [row["clients"] for row in result["extrapolated"]] == [10**3, 10**4, 10**5, 10**6]
    assert main(["bench", "scale", "--cases", "4:40"]) == 2
