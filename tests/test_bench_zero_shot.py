"""`sam-ds bench zero_shot`: the graphs it compares are what it says, and only the assembler learns."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from sam_ds.bench.zero_shot import _perplexity
from sam_ds.cli import main
from sam_ds.data.corpus import load_corpus
from sam_ds.evaluation.reading import token_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.model import add_assembler
from sam_ds.experts.personal import personal_graph
from sam_ds.federation.setup import prepare_base


@pytest.fixture
def left_behind(tmp_path):
    """A converted model with an assembler, as a federation leaves it behind."""

    def save(base, spread=1):
        model = from_pretrained(base, dtype=torch.float32)
        add_assembler(model, seed=0)
        # A fresh one is so close to its prior that every text has the same graph.
        model.sam_assembler.heads.data *= 100
        model.sam_assembler.encode.data *= spread
        if model.sam_assembler.config.messages:
            torch.nn.init.normal_(model.sam_assembler.gain_heads, generator=torch.Generator().manual_seed(0))
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.fixture
def folder(tiny, left_behind):
    return left_behind(tiny.base)


def test_a_zero_shot_graph_is_judged_beside_other_and_trained_ones(tiny, folder, left_behind, capsys, monkeypatch):
    arguments = ["--data", str(tiny.corpus), "--domain", "ships", "--edges", "6", "--active", "4", "--tokens", "128",
                 "--test-tokens", "256", "--rounds", "2", "--json"]  # fmt: skip
    assert main(["bench", "zero_shot", "--model", str(folder), *arguments, "--steps", "40", "--lr", "3e-2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["graph"]: row["perplexity"] for row in found["rows"]}
    assert list(rows) == ["random 0", "random 1", "all edges", "the server's", "of gardens", "of numbers", "zero-shot",
                          "trained"]  # fmt: skip
    drawn = (math.log(rows["random 0"]) + math.log(rows["random 1"])) / 2
    gap = found["ratios"]["gap_nats"]
    assert gap == pytest.approx(drawn - math.log(rows["trained"]))
    others = (math.log(rows["of gardens"]) + math.log(rows["of numbers"])) / 2
    assert found["ratios"]["by_others"] == pytest.approx((drawn - others) / gap)
    assert rows["the server's"] != rows["zero-shot"]
    # Without a step the trained graph is the zero-shot one.
    folder = left_behind(tiny.base, spread=30)
    judged = []

    def perplexity(model, test_BS, graph_LEE, condition):
        judged.append(graph_LEE)
        return _perplexity(model, test_BS, graph_LEE, condition)

    monkeypatch.setattr("sam_ds.bench.zero_shot._perplexity", perplexity)
    assert main(["bench", "zero_shot", "--model", str(folder), *arguments, "--steps", "1", "--lr", "1e-12"]) == 0
    rows = {row["graph"]: row["perplexity"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["trained"] == rows["zero-shot"] != rows["random 0"]
    graphs, model = dict(zip(rows, judged, strict=True)), from_pretrained(folder, dtype=torch.float32)
    texts, tokenizer = load_corpus(tiny.corpus, public_every=0).domains, AutoTokenizer.from_pretrained(folder)
    for row, domain in (("of gardens", "gardens"), ("of numbers", "numbers"), ("zero-shot", "ships")):
        ids_BS = token_rows({domain: texts[domain].train}, tokenizer, window=window_of(model), tokens=128)
        assert torch.equal(graphs[row], personal_graph(model, ids_BS, edges=6).graph_LEE)
    assert any(not torch.equal(graphs["zero-shot"], graphs[row]) for row in ("of gardens", "of numbers"))


def test_with_messages_graph_and_gains_are_told_apart(tiny, left_behind, tmp_path, capsys):
    config = tiny.config(tmp_path / "run", "sam.semantics=message")
    folder = left_behind(prepare_base(config, tmp_path / "run", load_corpus(config.data)))
    assert main(["bench", "zero_shot", "--model", str(folder), "--data", str(tiny.corpus), "--domain", "ships",
                 "--edges", "8", "--active", "4", "--tokens", "128", "--test-tokens", "256", "--rounds", "2",
                 "--steps", "40", "--lr", "3e-2", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    nats = {row["graph"]: math.log(row["perplexity"]) for row in found["rows"]}
    assert list(nats) == ["random 0", "random 1", "all edges", "the server's", "of gardens", "of numbers",
                          "random 0, own gains", "random 1, own gains", "zero-shot, shared gains", "zero-shot",
                          "trained"]  # fmt: skip
    for one, other in (("random 0", "random 0, own gains"), ("zero-shot, shared gains", "zero-shot")):
        assert nats[one] != nats[other]
    start, gap = (nats["random 0"] + nats["random 1"]) / 2, found["ratios"]["gap_nats"]
    assert gap == pytest.approx(start - nats["trained"])
    by_gains = start - (nats["random 0, own gains"] + nats["random 1, own gains"]) / 2
    assert found["ratios"] == pytest.approx({
        "recovered": (start - nats["zero-shot"]) / gap, "by_graph": (start - nats["zero-shot, shared gains"]) / gap,
        "by_gains": by_gains / gap, "by_the_servers": (start - nats["the server's"]) / gap,
        "by_others": start / gap - (nats["of gardens"] + nats["of numbers"]) / 2 / gap, "gap_nats": gap,
    })  # fmt: skip


def test_an_unknown_domain_is_refused(tiny, folder, capsys):
    arguments = ["--model", str(folder), "--data", str(tiny.corpus), "--domain", "ship", "--edges", "8"]
    assert main(["bench", "zero_shot", *arguments]) == 2
    assert "did you mean 'ships'" in capsys.readouterr().err
