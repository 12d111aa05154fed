"""`sam-ds bench flower` at a tiny size: what it prints, never how long it took."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sam_ds.cli import main


def test_wrong_sizes(capsys):
    assert main(["bench", "flower", "--clients", "0"]) == 2
    assert "--clients" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_flower(capsys):
    assert main(["bench", "flower", "--clients", "2", "--parameters", "10", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = [(row["call"], row["messages"]) for row in result["rows"]]
    assert rows == [("empty grid", 2), ("process relay", 1), ("process alone", 1)]
    for row in result["rows"]:
        assert 0 <= row["training_s"] < row["median_s"]
    assert list(result["ratios"]) == ["process alone / process relay"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flowers_simulation():
    """In a process of its own, as ray warns of what it will do one day."""
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "sam_ds", "bench", "flower", "--simulation", "--skip", "process", "--clients", "2",
               "--parameters", "10", "--rounds", "1", "--json"]  # fmt: skip
    # Ray's sockets take most of what the kernel allows for a path.
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    rows = [(row["call"], row["messages"]) for row in result["rows"]]
    assert rows == [("empty grid", 2), ("empty simulation", 2), ("train grid", 3), ("train simulation", 3)]
    assert all(row["training_s"] > 0 for row in result["rows"] if row["call"].startswith("train"))
    assert list(result["ratios"]) == ["empty simulation / empty grid", "train simulation / train grid"]
