"""A graph for a domain that no client held: random, by the assembler from unlabelled text alone, or trained on it.

The model is one that a federation without that domain left behind (`RUN/model`). Random graphs have `--edges` a layer,
the assembler's as many of the server's, or all where it has fewer; all route with the same budget. Only the assembler
is trained, on the domain's train text, its graph drawn anew and explored at every step. What zero-shot recovers is its
share of the way from the random graphs to the trained one, in nats a token.

Where experts send messages the assembler writes gains too: rows tell what the graph alone recovers, over the gains that
all share, and what the gains alone do, over the random graphs. Whether the text has a part in what the graph does,
other graphs over the shared gains tell: the server's, and those that the assembler makes of the other domains' texts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from sam_ds.bench.options import add_rounds, add_seed, check_sizes
from sam_ds.data.batches import batch_indices
from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError, nearest
from sam_ds.evaluation.nll import token_nll
from sam_ds.evaluation.reading import token_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained, readable
from sam_ds.experts.model import SamMixin
from sam_ds.experts.personal import personal_graph
from sam_ds.graph.assembler import hard_graph
from sam_ds.graph.dag import explore, full_graph, random_graph

_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the model folder of a federation with method = 'sam'")
    parser.add_argument("--data", required=True, help="folder of <domain>/{train,test}.*, or 'embedded'")
    parser.add_argument("--domain", required=True, help="the one left out")
    parser.add_argument("--edges", type=int, required=True, help="B, edges a layer")
    parser.add_argument("--active", type=int, help="experts a token visits; by default as the model does")
    parser.add_argument("--tokens", type=int, default=2048, help="of unlabelled text that the assembler is shown")
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=100, help="of the assembler's training on the domain")
    parser.add_argument("--lr", type=float, default=3e-3, help="of that training")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: graphs, with the sparse perplexity of the domain. Ratios: the share of the gap that zero-shot recovers, its
    parts where experts send messages, and what the server's graph and other texts' recover. `--rounds`: random graphs.
    """
    check_sizes(options, "tokens", "test_tokens", "steps")
    corpus = load_corpus(options.data, public_every=0)
    if options.domain not in corpus.domains:
        hint = nearest(options.domain, corpus.domains)
        raise InputError(f"--domain {options.domain!r} is none of {', '.join(corpus.domains)}{hint}")
    with readable(options.model):
        model = from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    config, splits = model.sam_config, corpus.domains[options.domain]
    window = window_of(model)
    personal = {
        name: personal_graph(
            model, token_rows({name: texts.train}, tokenizer, window=window, tokens=options.tokens), edges=options.edges
        )
        for name, texts in corpus.domains.items()
    }
    own = personal.pop(options.domain)
    test_BS = token_rows({options.domain: splits.test}, tokenizer, window=window, tokens=options.test_tokens)
    rng = np.random.default_rng(options.seed)
    layers = len(model.sam_layers)
    drawn = [
        _stacked([random_graph(config.num_experts, options.edges, config.roots, rng) for _ in range(layers)])
        for _ in range(options.rounds)
    ]
    graphs: dict[str, tuple[Tensor, Tensor | None]] = {
        f"random {index}": (graph_LEE, None) for index, graph_LEE in enumerate(drawn)
    }
    graphs["all edges"] = _stacked([full_graph(config.num_experts, config.roots)] * layers), None
    graphs["the server's"] = model.graph(), None
    graphs |= {f"of {name}": (other.graph_LEE, None) for name, other in personal.items()}
    if config.semantics == "message":
        graphs |= {f"random {index}, own gains": (graph_LEE, own.condition) for index, graph_LEE in enumerate(drawn)}
        graphs["zero-shot, shared gains"] = own.graph_LEE, None
    graphs["zero-shot"] = own.graph_LEE, own.condition
    with model.active(options.active or config.top_k):
        rows: list[dict[str, Any]] = [
            {"graph": name, "perplexity": _perplexity(model, test_BS, *graph)} for name, graph in graphs.items()
        ]
        train_BS = token_rows({options.domain: splits.train}, tokenizer, window=window, tokens=64 * options.tokens)
        trained_LEE = _trained(model, own.condition, train_BS, options)
        rows.append({"graph": "trained", "perplexity": _perplexity(model, test_BS, trained_LEE, own.condition)})
    nats = {row["graph"]: math.log(row["perplexity"]) for row in rows}
    count = range(options.rounds)
    start = _mean(nats[f"random {index}"] for index in count)
    gap = start - nats["trained"]
    ends = {"recovered": nats["zero-shot"], "by_the_servers": nats["the server's"]}
    if personal:
        ends["by_others"] = _mean(nats[f"of {name}"] for name in personal)
    if config.semantics == "message":
        ends["by_graph"] = nats["zero-shot, shared gains"]
        ends["by_gains"] = _mean(nats[f"random {index}, own gains"] for index in count)
    ratios = {name: (start - end) / gap if gap > 0 else math.nan for name, end in ends.items()}
    return {"rows": rows, "ratios": ratios | {"gap_nats": gap}}


def _trained(model: SamMixin, condition: Tensor, train_BS: Tensor, options: argparse.Namespace) -> Tensor:
    """(L, E, E) the graph after the assembler alone has learned from the domain's text."""
    allowed_LEE = model.graph().numpy()
    roots = model.sam_config.roots
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert model.sam_assembler is not None, "personal_graph has asked it"
    assembler = model.sam_assembler.requires_grad_(True)
    optimizer = torch.optim.AdamW(assembler.parameters(), lr=options.lr, weight_decay=0.0)
    order = batch_indices(len(train_BS), _BATCH, options.steps, (options.seed,))
    with _conditioned(model, condition):
        for step, picked in enumerate(tqdm(order, desc="train the assembler", unit="step", leave=False)):
            hard_LEE = hard_graph(assembler, condition, allowed_LEE, options.edges, roots)
            rng = np.random.default_rng([options.seed, step])
            drawn = [
                explore(mask_EE, allowed_EE, 0.05, rng, options.edges, roots)
                for mask_EE, allowed_EE in zip(hard_LEE, allowed_LEE, strict=True)
            ]
            with model.over(_stacked(drawn)):
                rows_BS = train_BS[torch.from_numpy(picked)]
                model(input_ids=rows_BS, labels=rows_BS, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.from_numpy(hard_graph(assembler, condition, allowed_LEE, options.edges, roots))


@contextmanager
def _conditioned(model: SamMixin, condition: Tensor) -> Iterator[None]:
    """Let the gates' gradient reach the assembler inside the block."""
    model.sam_condition = condition
    try:
        yield
    finally:
        model.sam_condition = None
        for layer in model.sam_layers:
            layer.edge_logits_SS = None


def _perplexity(model: SamMixin, test_BS: Tensor, graph_LEE: Tensor, condition: Tensor | None) -> float:
    with torch.no_grad(), model.over(graph_LEE, condition):
        window = test_BS.shape[1]
        nll_sum, tokens = token_nll(model, list(test_BS), window=window, stride=window, batch=_BATCH)
    return math.exp(nll_sum / tokens)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _stacked(masks: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(masks))
