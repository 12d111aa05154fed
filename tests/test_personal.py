"""A text's own graph and experts: by the formulas, the same for client and server, nothing left behind."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from in_process import Federation
from reference import gate_scores, has_path, layer_input
from transformers import AutoTokenizer

from sam_ds import from_pretrained, personal_graph
from sam_ds.cli import main
from sam_ds.data.batches import pack
from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import perplexity_by_domain
from sam_ds.evaluation.reading import token_rows, typical_rows
from sam_ds.experts.personal import describe_text
from sam_ds.federation.judging import evaluate, loss_in_use
from sam_ds.federation.run import prepare
from sam_ds.graph.dag import check_graph, random_graph

LARGE = 5  # a client of the tier that holds all experts


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """With an assembler that has moved away from its prior."""
    server = Federation.of(tiny.config(tmp_path_factory.mktemp("run"), "federation.edges=9"), tiny.base).server
    with torch.no_grad():
        server.assembler().heads.mul_(1000)
    return server


@pytest.fixture(scope="module")
def folder(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "model"
    server.save_model(folder)
    return folder


@pytest.fixture(scope="module")
def talking(tiny, tmp_path_factory):
    """The same, whose experts send messages with gains of a text's own."""
    run = tmp_path_factory.mktemp("talking")
    config = tiny.config(run, "federation.edges=9", "sam.semantics=message")
    server = Federation.of(config, prepare(config)).server
    for weight in (server.assembler().heads, server.assembler().gain_heads):
        torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(0))
    server.save_model(run / "model")
    return run / "model"


def rows(count=3, seed=0):
    return torch.randint(3, 90, (count, 24), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_an_edit_is_judged_by_what_every_domain_uses(server):
    """The mean over the domains of the loss over each one's own best edges of the edited graph."""
    edited = np.zeros_like(server.state.graph)
    edited[:, 0, server.config.sam.roots :] = True  # every token may go anywhere, from the first root
    loss, found = loss_in_use(server), []
    for graph in (server.state.graph, edited):
        own = []
        for name in server.corpus.domains:
            seen, rows = server.public.of_domains[name], server.public.validation_of_domains[name]
            condition = personal_graph(server.model, seen, edges=9).condition
            with server.model.over(torch.from_numpy(graph)):
                mine = personal_graph(server.model, seen, edges=9)
            assert torch.allclose(mine.condition, condition), "a text is known over all edges"
            with server.model.over(mine.graph_LEE, mine.condition):
                own.append(float(server.model(input_ids=rows, labels=rows).loss))
        found.append(loss(graph))
        assert found[-1] == pytest.approx(np.mean(own), rel=1e-5)
    assert found[0] != found[1]
    assert server.model.sam_condition is None


@torch.no_grad()
def test_the_graph_is_that_of_the_formulas(folder):
    model = from_pretrained(folder).eval()
    personal = personal_graph(model, rows(10), edges=9, experts=4)
    graph_LEE = model.graph()
    model.set_graph(torch.ones(2, 8, 8, dtype=torch.bool).triu(1))
    conditions = []
    for layer in model.sam_layers:
        score_TE = gate_scores(layer, layer_input(model, layer, [rows(10)])).float()
        mean_E = score_TE.mean(0)
        conditions.append(torch.cat([(mean_E - mean_E.mean()) / mean_E.std(correction=0), torch.tensor([4 / 8])]))
    logits_LEE = model.sam_assembler(torch.stack(conditions))
    for layer in range(2):
        own_EE = personal.graph_LEE[layer]
        check_graph(own_EE.numpy(), 2)
        assert own_EE.sum() == 9 and not (own_EE & ~graph_LEE[layer]).any()
        left_EE = graph_LEE[layer] & ~own_EE
        left_EE[:, :2] = False
        for tail, head in left_EE.nonzero().tolist():
            assert logits_LEE[layer, tail, head] <= logits_LEE[layer, :, head][own_EE[:, head]].max() + 1e-4


@torch.no_grad()
@pytest.mark.parametrize("semantics", ["reach", "message"])
def test_the_experts_to_hold_are_those_that_lower_the_loss_of_the_text(folder, talking, semantics):
    """As many of the best, each beside the roots alone, as make the loss lowest; paths may lead over the others."""
    model = from_pretrained({"reach": folder, "message": talking}[semantics]).train()
    personal = {most: personal_graph(model, rows(10), edges=9, experts=most) for most in (2, 4, 8)}
    assert model.training
    model.eval()

    def loss(held, own):
        with model.over(own.graph_LEE, own.condition):
            for layer, mask_EE, experts in zip(model.sam_layers, own.graph_LEE.numpy(), held, strict=True):
                layer.sam.adjacency_SS.zero_()
                for tail, head in itertools.combinations(experts, 2):
                    layer.sam.adjacency_SS[tail, head] = has_path(mask_EE, tail, head, set(range(8)) - set(experts))
            return float(model(input_ids=rows(10), labels=rows(10)).loss)

    counts = set()
    for most, own in personal.items():
        every = (tuple(range(8)),) * 2
        orders = [
            sorted(range(2, 8), key=lambda expert, index=index: loss(
                [*every[:index], (0, 1, expert), *every[index + 1 :]], own))
            for index in range(2)
        ]  # fmt: skip
        found = {
            count: loss([(0, 1, *sorted(order[:count])) for order in orders], own)
            for count in range(min(1, most - 2), most - 1)
        }
        best = min(found, key=found.__getitem__)
        assert own.held == tuple((0, 1, *sorted(order[:best])) for order in orders)
        counts.add(best)
    assert len(counts) > 1


def test_another_text_another_graph_and_nothing_is_left_behind(folder):
    model = from_pretrained(folder).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one, same, other = (personal_graph(model, rows(seed=seed), edges=9) for seed in (0, 0, 1))
    assert torch.equal(one.graph_LEE, same.graph_LEE) and not torch.equal(one.graph_LEE, other.graph_LEE)
    assert one.held == ((0, 1, 2, 3, 4, 5, 6, 7),) * 2
    assert model.training and all(layer.counters is None for layer in model.sam_layers)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with model.over(one.graph_LEE):
        assert torch.equal(model.graph(), one.graph_LEE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_client_that_holds_everything_is_described_as_the_server_would(server, new_worker):
    worker = new_worker()
    _, scores_LE, rates_LE = worker.register(LARGE, "large", "full")
    model = from_pretrained(worker.folder).eval()
    ids_BS, layers = torch.from_numpy(worker.rows(LARGE)), model.sam_layers
    mine = describe_text(layers, [layer.sam.wg for layer in layers], [layer.top_k for layer in layers],
                         lambda: model(input_ids=ids_BS))  # fmt: skip
    np.testing.assert_allclose(scores_LE, mine[0], atol=1e-5)
    np.testing.assert_allclose(rates_LE, mine[1], atol=1e-6)


def test_what_cannot_be_is_refused(tiny, folder, tiny_llama):
    model = from_pretrained(folder)
    for made, ids_BS, sizes, words in (
        (tiny_llama(), rows(), {}, "not converted"),
        (from_pretrained(tiny.base), rows(), {}, "no assembler"),
        (model, rows(), {"edges": 5}, "edges must be at least 6"),
        (model, rows(), {"experts": 1}, "experts must be from roots=2"),
        (model, rows(), {"experts": 9}, "to num_experts=8, got 9"),
        (model, rows(0), {}, "text is empty"),
        (model, rows() + 10_000, {}, "vocabulary ends at"),
    ):
        with pytest.raises(InputError, match=words):
            personal_graph(made, ids_BS, **({"edges": 9} | sizes))


def test_the_sparse_score_of_a_domain_is_over_its_graph(server):
    """Made of the domain's public text, with as many edges as a client has."""
    found = evaluate(server, "valid", 128)
    graphs, differ = [], []

    def score(name, texts):
        return perplexity_by_domain(
            server.model, server.tokenizer, {name: texts}, window=32, stride=16, batch=8, max_tokens=128
        )[name].perplexity  # fmt: skip

    for name, splits in server.corpus.domains.items():
        ids_BS = torch.from_numpy(pack(splits.public, server.tokenizer, 32, limit_tokens=2048))
        graphs.append(personal_graph(server.model, ids_BS, edges=9).graph_LEE)
        with server.model.over(graphs[-1]):
            own = score(name, splits.valid)
        assert found["sparse"]["domains"][name] == pytest.approx(own)
        differ.append(own != score(name, splits.valid))
    # The words of a domain may go the same ways over either graph.
    assert any(differ)
    assert not torch.equal(graphs[0], graphs[1])
    assert torch.equal(server.model.graph(), torch.from_numpy(server.state.graph))


def test_the_command_prints_graph_and_experts(tiny, folder, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("sail mast harbour\n\nanchor tide deck " * 20)
    for data, least in ((text, 50), (tiny.corpus, 300)):
        arguments = ["assemble", str(folder), "--data", str(data), "--experts", "4", "--edges", "9", "--tokens", "300"]
        assert main([*arguments, "--json"]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["tokens"] >= least - 5
        for layer in result["layers"]:
            assert len(layer["edges"]) == 9 and layer["held"][:2] == [0, 1] and 2 < len(layer["held"]) <= 4
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        held = " ".join(map(str, result["layers"][1]["held"]))
        assert lines[-2] == f"layer 1: model.layers.1.mlp: holds {held}"
        tail, head = result["layers"][1]["edges"][0]
        assert lines[-1].startswith(f"  9 edges: {tail}>{head} ")


def test_perplexity_over_the_graph_that_was_asked_for(tiny, folder, tmp_path, capsys):
    model, tokenizer = from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    domains = load_corpus(str(tiny.corpus), public_every=0).domains

    def random(edges, seed):
        rng = np.random.default_rng(seed)
        return torch.from_numpy(np.stack([random_graph(8, edges, 2, rng) for _ in range(2)]))

    model.set_graph(random(14, 1))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = set()
    for graph, flags in (("saved", ""), ("full", ""), ("random", "--edges 9 --seed 3"), ("zero-shot", "--edges 9")):
        arguments = ["--graph", graph, *flags.split(), "--window", "32", "--stride", "32", "--json"]
        assert main(["perplexity", str(tmp_path), str(tiny.corpus), *arguments]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        for name, splits in domains.items():
            ids_BS = token_rows({name: splits.train}, tokenizer, window=64, tokens=2048)
            own = {
                "saved": model.graph(), "full": torch.ones(2, 8, 8, dtype=torch.bool).triu(1),
                "random": random(9, 3), "zero-shot": personal_graph(model, ids_BS, edges=9).graph_LEE,
            }[graph]  # fmt: skip
            with model.over(own):
                score = perplexity_by_domain(model, tokenizer, {name: splits.test}, window=32, stride=32, batch=8,
                                             max_tokens=None)  # fmt: skip
            assert result["domains"][name]["perplexity"] == pytest.approx(score[name].perplexity)
        assert (result["graph"], result["edges"]) == (graph, 9 if flags else None)
        found.add(result["headline"])
    assert len(found) == 4


def test_graphs_that_cannot_be_are_refused(tiny, folder, capsys):
    for model, flags, words in (
        (folder, "--graph random", "needs --edges"),
        (folder, "--edges 9", "not saved"),
        (folder, "--graph full --dense", "leave out --graph full"),
        (folder, "--graph zero-shot --edges 9 --split train", "give --split valid or test"),
        (folder, "--graph zero-shot --edges 5", "edges must be at least 6"),
        (folder, "--graph random --edges 5", "at least 6 edges"),
        (folder, "--graph random --edges 9 --seed -1", "--seed must be at least 0"),
        (tiny.base, "--graph zero-shot --edges 9", "no assembler"),
        (tiny.model, "--graph full", "is of a converted model"),
    ):
        sizes = ["--window", "32", "--stride", "32"]
        assert main(["perplexity", str(model), str(tiny.corpus), *sizes, *flags.split()]) == 2
        assert words in capsys.readouterr().err


def test_bad_input_ends_with_2_and_says_what(tiny, folder, tmp_path, capsys):
    (tmp_path / "mine.pdf").write_text("x")
    (tmp_path / "none.txt").write_text("\n\n")
    given = {"model": folder, "--data": tiny.corpus, "--edges": 9}
    for change, words in (
        ({"model": tiny.base}, "no assembler"),
        ({"model": tiny.model}, "is not a converted model"),
        ({"--data": tmp_path / "mine.pdf"}, "no text that can be read"),
        ({"--data": tmp_path / "none.txt"}, "there is no text in"),
        ({"--data": tmp_path / "nowhere"}, "no such folder"),
        ({"--edges": 5}, "edges must be at least 6"),
        ({"--experts": 1}, "experts must be from"),
        ({"--tokens": 0}, "--tokens must be at least 1"),
    ):
        flags = dict(given | change)
        model = flags.pop("model")
        assert main(["assemble", str(model), *[str(part) for pair in flags.items() for part in pair]]) == 2
        assert words in capsys.readouterr().err


def test_typical_rows_are_from_all_over_the_text(folder):
    """As many tokens as asked for, or all there are; the first rows are of the first document alone."""
    tokenizer, window = AutoTokenizer.from_pretrained(folder), 16
    first, second = "rose soil leaf root " * 200, "one two three four " * 200
    texts = {"mine": [first, second]}
    numbers = set(tokenizer(second)["input_ids"]) - set(tokenizer(first)["input_ids"])
    for pick, spread in ((token_rows, False), (typical_rows, True)):
        rows_BS = pick(texts, tokenizer, window=window, tokens=20 * window)
        assert 19 * window <= rows_BS.numel() <= 21 * window
        found = [bool(numbers & set(row)) for row in rows_BS.tolist()]
        assert not any(found) if not spread else 0.3 < np.mean(found) < 0.7
    everything = typical_rows(texts, tokenizer, window=window, tokens=10**6)
    assert torch.equal(everything, token_rows(texts, tokenizer, window=window, tokens=10**6))
