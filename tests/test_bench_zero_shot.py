"""`sam-ds bench zero_shot`: the graphs it compares are what it says, and only the assembler learns."""

from __future__ import annotations

import json
import math

import pytest
import torch

from sam_ds.cli import main
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.model import add_assembler


@pytest.fixture
def folder(tiny, tmp_path):
    """A converted model with an assembler, as a federation leaves it behind."""
    from transformers import AutoTokenizer

    model = from_pretrained(tiny.base, dtype=torch.float32)
    add_assembler(model, seed=0)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny.base).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_zero_shot_graph_is_judged_beside_random_and_trained_ones(tiny, folder, capsys):
    arguments = ["bench", "zero_shot", "--model", str(folder), "--data", str(tiny.corpus), "--domain", "ships",
                 "--edges", "8", "--active", "4", "--tokens", "128", "--test-tokens", "256", "--rounds", "2",
                 "--json"]  # fmt: skip
    assert main([*arguments, "--steps", "6"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["graph"]: row["perplexity"] for row in found["rows"]}
    assert list(rows) == ["random 0", "random 1", "all edges", "zero-shot", "trained"]
    drawn = (math.log(rows["random 0"]) + math.log(rows["random 1"])) / 2
    assert found["ratios"]["gap_nats"] == pytest.approx(drawn - math.log(rows["trained"]))
    # Without a step the trained graph is the zero-shot one.
    assert main([*arguments, "--steps", "1", "--lr", "1e-12"]) == 0
    rows = {row["graph"]: row["perplexity"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["trained"] == rows["zero-shot"] != rows["random 0"]


def test_an_unknown_domain_is_refused(tiny, folder, capsys):
    arguments = ["--model", str(folder), "--data", str(tiny.corpus), "--domain", "ship", "--edges", "8"]
    assert main(["bench", "zero_shot", *arguments]) == 2
    assert "did you mean 'ships'" in capsys.readouterr().err
