"""`sam-ds bench zero_shot`: the graphs it compares are what it says, and only the assembler learns."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

from sam_ds.bench.zero_shot import _most_reached, _perplexity
from sam_ds.cli import main
from sam_ds.data.corpus import load_corpus
from sam_ds.evaluation.reading import token_rows, typical_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.model import add_assembler
from sam_ds.experts.personal import personal_graph
from sam_ds.federation.setup import prepare_base
from sam_ds.graph.dag import contract


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
    assert main(["bench", "zero_shot", "--model", str(folder), *arguments, "--steps", "40", "--lr", "1e-2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["graph"]: row["perplexity"] for row in found["rows"]}
    assert list(rows) == ["random 0", "random 1", "all edges", "the server's", "of gardens", "of numbers",
                          "all experts", "experts of gardens", "experts of numbers", "zero-shot",
                          "trained"]  # fmt: skip
    drawn = (math.log(rows["random 0"]) + math.log(rows["random 1"])) / 2
    gap = found["ratios"]["gap_nats"]
    assert gap == pytest.approx(drawn - math.log(rows["trained"]))
    others = (math.log(rows["of gardens"]) + math.log(rows["of numbers"])) / 2
    assert found["ratios"]["by_others"] == pytest.approx((drawn - others) / gap)
    assert found["ratios"]["recovered"] == pytest.approx((drawn - math.log(rows["zero-shot"])) / gap)
    assert found["ratios"]["over_all_experts"] == pytest.approx((drawn - math.log(rows["all experts"])) / gap)
    chosen = (math.log(rows["experts of gardens"]) + math.log(rows["experts of numbers"])) / 2
    assert found["ratios"]["over_experts_of_others"] == pytest.approx((drawn - chosen) / gap)
    counts = {row["graph"]: row["experts"] for row in found["rows"]}
    assert counts["all experts"] == 8 and 2 < counts["zero-shot"] <= 8
    # Without a step the trained graph is the assembler's.
    folder = left_behind(tiny.base, spread=30)
    judged = []

    def perplexity(model, test_BS, graph_LEE, condition, held):
        judged.append((graph_LEE, held))
        return _perplexity(model, test_BS, graph_LEE, condition, held)

    monkeypatch.setattr("sam_ds.bench.zero_shot._perplexity", perplexity)
    assert main(["bench", "zero_shot", "--model", str(folder), *arguments, "--steps", "1", "--lr", "1e-12"]) == 0
    rows = {row["graph"]: row["perplexity"] for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["trained"] == rows["all experts"] != rows["random 0"]
    graphs, model = dict(zip(rows, judged, strict=True)), from_pretrained(folder, dtype=torch.float32)
    texts, tokenizer = load_corpus(tiny.corpus, public_every=0).domains, AutoTokenizer.from_pretrained(folder)
    for domain in ("gardens", "numbers", "ships"):
        ids_BS = typical_rows({domain: texts[domain].train}, tokenizer, window=window_of(model), tokens=128)
        with model.active(4):
            own = personal_graph(model, ids_BS, edges=6, experts=8)
        graph, chosen = ("zero-shot", "zero-shot") if domain == "ships" else (f"of {domain}", f"experts of {domain}")
        assert torch.equal(graphs[graph][0], own.graph_LEE) and graphs[chosen][1] == own.held
    assert any(not torch.equal(graphs["zero-shot"][0], graphs[row][0]) for row in ("of gardens", "of numbers"))


def test_with_messages_graph_and_gains_are_told_apart(tiny, left_behind, tmp_path, capsys):
    config = tiny.config(tmp_path / "run", "sam.semantics=message")
    folder = left_behind(prepare_base(config, tmp_path / "run", load_corpus(config.data)))
    assert main(["bench", "zero_shot", "--model", str(folder), "--data", str(tiny.corpus), "--domain", "ships",
                 "--edges", "8", "--active", "4", "--tokens", "128", "--test-tokens", "256", "--rounds", "2",
                 "--steps", "40", "--lr", "3e-2", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    nats = {row["graph"]: math.log(row["perplexity"]) for row in found["rows"]}
    assert list(nats) == ["random 0", "random 1", "all edges", "the server's", "of gardens", "of numbers",
                          "random 0, own gains", "random 1, own gains", "all experts, shared gains", "all experts",
                          "experts of gardens", "experts of numbers", "zero-shot", "trained"]  # fmt: skip
    for one, other in (("random 0", "random 0, own gains"), ("all experts, shared gains", "all experts")):
        assert nats[one] != nats[other]
    start, gap = (nats["random 0"] + nats["random 1"]) / 2, found["ratios"]["gap_nats"]
    assert gap == pytest.approx(start - nats["trained"])
    by_gains = start - (nats["random 0, own gains"] + nats["random 1, own gains"]) / 2
    assert found["ratios"] == pytest.approx({
        "recovered": (start - nats["zero-shot"]) / gap, "by_graph": (start - nats["all experts, shared gains"]) / gap,
        "over_all_experts": (start - nats["all experts"]) / gap,
        "over_experts_of_others": start / gap - (nats["experts of gardens"] + nats["experts of numbers"]) / 2 / gap,
        "by_gains": by_gains / gap, "by_the_servers": (start - nats["the server's"]) / gap,
        "by_others": start / gap - (nats["of gardens"] + nats["of numbers"]) / 2 / gap, "gap_nats": gap,
    })  # fmt: skip


def test_an_unknown_domain_and_a_number_of_experts_that_chooses_nothing_are_refused(tiny, folder, capsys):
    arguments = ["--model", str(folder), "--data", str(tiny.corpus), "--domain", "ship", "--edges", "8"]
    assert main(["bench", "zero_shot", *arguments]) == 2
    assert "did you mean 'ships'" in capsys.readouterr().err
    arguments[5] = "ships"
    for experts in ("0", "2", "8"):
        assert main(["bench", "zero_shot", *arguments, "--experts", experts]) == 2
        assert f"below its 8 experts, got {experts}" in capsys.readouterr().err


def test_a_subset_is_judged_beside_random_ones_and_those_of_other_texts(tiny, folder, capsys):
    """What is not held is stood in for: the model without edges to it."""
    assert main(["bench", "zero_shot", "--model", str(folder), "--data", str(tiny.corpus), "--domain", "ships",
                 "--edges", "8", "--active", "4", "--experts", "4", "--tokens", "128", "--test-tokens", "256",
                 "--rounds", "3", "--steps", "1", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    held = {row["held"]: row["perplexity"] for row in found["rows"] if "held" in row}
    nats = {name: math.log(value) for name, value in held.items()}
    assert list(held) == ["random 0", "random 1", "random 2", "the most used", "the most reached", "of gardens",
                          "of numbers", "zero-shot", "all"]  # fmt: skip
    start = sum(nats[f"random {index}"] for index in range(3)) / 3
    gap = start - nats["all"]
    assert gap > 0
    expected = {
        "subset_recovered": (start - nats["zero-shot"]) / gap,
        "subset_by_most_used": (start - nats["the most used"]) / gap,
        "subset_by_most_reached": (start - nats["the most reached"]) / gap,
        "subset_by_others": (start - (nats["of gardens"] + nats["of numbers"]) / 2) / gap,
        "subset_gap_nats": gap,
    }
    ratios = found["ratios"]
    assert {name: ratios[name] for name in expected} == pytest.approx(expected)
    model, tokenizer = from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    splits, window = load_corpus(tiny.corpus, public_every=0).domains["ships"], window_of(model)
    ids_BS = typical_rows({"ships": splits.train}, tokenizer, window=window, tokens=128)
    test_BS = token_rows({"ships": splits.test}, tokenizer, window=window, tokens=256)
    with model.active(4):
        own = personal_graph(model, ids_BS, edges=8, experts=4)
    reached = _most_reached(model, ids_BS, own.graph_LEE, 4)
    assert len(reached) == 2 and all(len(experts) == 4 and list(experts[:2]) == [0, 1] for experts in reached)
    with torch.no_grad(), model.active(4), model.over(own.graph_LEE, own.condition):
        for layer, experts in zip(model.sam_layers, own.held, strict=True):
            among = contract(layer.sam.adjacency_SS.numpy(), experts)
            layer.sam.adjacency_SS.zero_()
            for row, tail in enumerate(experts):
                for column, head in enumerate(experts):
                    layer.sam.adjacency_SS[tail, head] = bool(among[row, column])
        nll = model(input_ids=test_BS, labels=test_BS).loss
    assert math.exp(nll) == pytest.approx(held["zero-shot"], rel=1e-4)
    assert len({round(value, 9) for value in held.values()}) > 4
