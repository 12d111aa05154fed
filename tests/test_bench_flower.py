"""`sam-ds bench flower` at a tiny size: what it prints, never how long it took."""

from __future__ import annotations

import json

import pytest
from in_process import SETTINGS

from sam_ds.cli import main


def test_wrong_sizes(capsys):
    assert main(["bench", "flower", "--clients", "0"]) == 2
    assert "--clients" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_flower(tiny, capsys):
    keys = [*SETTINGS, f'model="{tiny.model}"', f'data="{tiny.corpus}"', "federation.clients=3",
            "federation.edit_every=2"]  # fmt: skip
    arguments = ["bench", "flower", "--clients", "2", "--parameters", "10", "--rounds", "1", "--json"]
    assert main([*arguments, *(part for key in keys for part in ("--set", key))]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["call"] for row in result["rows"]] == ["empty grid", "process relay", "process alone"]
    for row in result["rows"]:
        assert 0 <= row["training_s"] < row["median_s"] and row["messages"] == 2
    assert list(result["ratios"]) == ["process alone / process relay"]
