"""A graph for a domain that no client held: random, from unlabelled text alone, or trained on it.

The model is one that a federation without that domain left behind (`RUN/model`). Random graphs have `--edges` a layer,
the assembler's as many of the server's, or all where it has fewer; all route with the same budget. Only the assembler
is trained, on the domain's train text, its graph drawn anew and explored at every step. What zero-shot recovers is its
share of the way from the random graphs to the trained one, in nats a token. It is the assembler's graph and gains over
the experts that the text's own loss chooses (`experts/personal.py`).

Which part does it, other rows tell: the same over all experts; of these the graph over the gains that all share, and
the gains over the random graphs. Whether the text has a part in it: the server's graph, those that the assembler makes
of the other domains' texts, and this one over the experts that those texts choose.

With `--experts` a client also holds only so many a layer, the others are stood in for: at most so many, chosen by its
text, beside random ones, those used most on the calibration text (the first), those that the text reaches most over its
graph, and those chosen by other texts, all over its own graph and gains. `subset_recovered` is the share of the way
from the random ones to all experts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

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
from sam_ds.evaluation.reading import token_rows, typical_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained, readable
from sam_ds.experts.model import SamMixin
from sam_ds.experts.personal import PersonalGraph, describe_text, holding, personal_graph
from sam_ds.graph.assembler import hard_graph
from sam_ds.graph.dag import explore, full_graph, random_graph, reach_mass

Held: TypeAlias = Sequence[Sequence[int]]
"""Of each layer the experts that are held."""
_BATCH = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the model folder of a federation with method = 'sam'")
    parser.add_argument("--data", required=True, help="folder of <domain>/{train,test}.*, or 'embedded'")
    parser.add_argument("--domain", required=True, help="the one left out")
    parser.add_argument("--edges", type=int, required=True, help="B, edges a layer")
    parser.add_argument("--experts", type=int, help="that a client can hold a layer; by default all")
    parser.add_argument("--active", type=int, help="experts a token visits; by default as the model does")
    parser.add_argument("--tokens", type=int, default=2048, help="of unlabelled text that the assembler is shown")
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=100, help="of the assembler's training on the domain")
    parser.add_argument("--lr", type=float, default=3e-3, help="of that training")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: graphs, with the sparse perplexity of the domain. Ratios: the share of the gap that zero-shot recovers, its
    parts where experts send messages, and what the server's graph and other texts' recover; the same of subsets.
    `--rounds`: random graphs and subsets.
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
    if options.experts is not None and not config.roots < options.experts < config.num_experts:
        raise InputError(f"--experts must be above the model's {config.roots} roots and below its "
                         f"{config.num_experts} experts, got {options.experts}")  # fmt: skip
    window = window_of(model)
    texts = {
        name: typical_rows({name: splits.train}, tokenizer, window=window, tokens=options.tokens)
        for name, splits in corpus.domains.items()
    }
    test_BS = token_rows({options.domain: splits.test}, tokenizer, window=window, tokens=options.test_tokens)
    rng = np.random.default_rng(options.seed)
    layers = len(model.sam_layers)
    drawn = [
        _stacked([random_graph(config.num_experts, options.edges, config.roots, rng) for _ in range(layers)])
        for _ in range(options.rounds)
    ]
    with model.active(options.active or config.top_k):
        personal = {
            name: personal_graph(model, ids_BS, edges=options.edges, experts=config.num_experts)
            for name, ids_BS in texts.items()
        }
        own = personal.pop(options.domain)
        graphs = _graphs(model, own, personal, drawn)
        rows: list[dict[str, Any]] = [
            {"graph": name, "experts": len(graph[2][0]), "perplexity": _perplexity(model, test_BS, *graph)}
            for name, graph in graphs.items()
        ]
        held = _subset_rows(model, texts, test_BS, options, rng) if options.experts else []
        train_BS = token_rows({options.domain: splits.train}, tokenizer, window=window, tokens=64 * options.tokens)
        trained_LEE = _trained(model, own.condition, train_BS, options)
        rows.append({"graph": "trained", "experts": config.num_experts,
                     "perplexity": _perplexity(model, test_BS, trained_LEE, own.condition, _every(model))})  # fmt: skip
    nats = {row["graph"]: math.log(row["perplexity"]) for row in rows}
    count = range(options.rounds)
    start = _mean(nats[f"random {index}"] for index in count)
    gap = start - nats["trained"]
    ends = {
        "recovered": nats["zero-shot"], "over_all_experts": nats["all experts"], "by_the_servers": nats["the server's"],
    }  # fmt: skip
    if personal:
        ends["by_others"] = _mean(nats[f"of {name}"] for name in personal)
        ends["over_experts_of_others"] = _mean(nats[f"experts of {name}"] for name in personal)
    if config.semantics == "message":
        ends["by_graph"] = nats["all experts, shared gains"]
        ends["by_gains"] = _mean(nats[f"random {index}, own gains"] for index in count)
    ratios = {name: (start - end) / gap if gap > 0 else math.nan for name, end in ends.items()}
    return {"rows": rows + held, "ratios": ratios | {"gap_nats": gap} | _subset_ratios(held)}


def _graphs(
    model: SamMixin, own: PersonalGraph, personal: Mapping[str, PersonalGraph], drawn: Sequence[Tensor]
) -> dict[str, tuple[Tensor, Tensor | None, Held]]:
    """What is compared but for the trained one: edges, a condition for gains of one's own, experts."""
    config, every = model.sam_config, _every(model)
    graphs: dict[str, tuple[Tensor, Tensor | None, Held]] = {
        f"random {index}": (graph_LEE, None, every) for index, graph_LEE in enumerate(drawn)
    }
    graphs["all edges"] = _stacked([full_graph(config.num_experts, config.roots)] * len(every)), None, every
    graphs["the server's"] = model.graph(), None, every
    graphs |= {f"of {name}": (other.graph_LEE, None, every) for name, other in personal.items()}
    if config.semantics == "message":
        graphs |= {
            f"random {index}, own gains": (graph_LEE, own.condition, every) for index, graph_LEE in enumerate(drawn)
        }
        graphs["all experts, shared gains"] = own.graph_LEE, None, every
    graphs["all experts"] = own.graph_LEE, own.condition, every
    graphs |= {f"experts of {name}": (own.graph_LEE, own.condition, other.held) for name, other in personal.items()}
    return graphs | {"zero-shot": (own.graph_LEE, own.condition, own.held)}


def _subset_rows(
    model: SamMixin, texts: Mapping[str, Tensor], test_BS: Tensor, options: argparse.Namespace, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Rows of a client of the domain that holds `--experts` a layer, by which these are."""
    config, count = model.sam_config, options.experts
    personal = {
        name: personal_graph(model, ids_BS, edges=options.edges, experts=count) for name, ids_BS in texts.items()
    }
    own, layers, roots = personal.pop(options.domain), range(len(model.sam_layers)), config.roots
    subsets: dict[str, Held] = {
        f"random {index}": [
            [*range(roots), *np.sort(rng.choice(np.arange(roots, config.num_experts), count - roots, replace=False))]
            for _ in layers
        ]
        for index in range(options.rounds)
    }
    subsets["the most used"] = [range(count)] * len(layers)
    subsets["the most reached"] = _most_reached(model, texts[options.domain], own.graph_LEE, count)
    subsets |= {f"of {name}": other.held for name, other in personal.items()} | {"zero-shot": own.held}
    subsets["all"] = _every(model)
    return [
        {"held": name, "perplexity": _perplexity(model, test_BS, own.graph_LEE, own.condition, held)}
        for name, held in subsets.items()
    ]


def _most_reached(model: SamMixin, ids_BS: Tensor, graph_LEE: Tensor, count: int) -> list[Sequence[int]]:
    """Of each layer the roots and what has the largest reach mass, by which participation draws experts."""
    layers, roots = model.sam_layers, model.sam_config.roots
    with torch.no_grad():
        gates, budgets = [layer.sam.wg for layer in layers], [layer.top_k for layer in layers]
        rates_LE = describe_text(layers, gates, budgets, lambda: model(input_ids=ids_BS, use_cache=False))[1]
    held: list[Sequence[int]] = []
    for mask_EE, rates_E in zip(graph_LEE.numpy(), rates_LE.double().numpy(), strict=True):
        reach_E = reach_mass(mask_EE, rates_E, roots)
        held.append([*range(roots), *sorted(roots + np.argsort(-reach_E[roots:], kind="stable")[: count - roots])])
    return held


def _subset_ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The shares of the gap between random subsets and all experts that other subsets recover."""
    nats = {row["held"]: math.log(row["perplexity"]) for row in rows}
    if not nats:
        return {}
    start = _mean(value for name, value in nats.items() if name.startswith("random "))
    ends = {
        "subset_recovered": nats["zero-shot"], "subset_by_most_used": nats["the most used"],
        "subset_by_most_reached": nats["the most reached"],
    }  # fmt: skip
    if others := [value for name, value in nats.items() if name.startswith("of ")]:
        ends["subset_by_others"] = _mean(others)
    gap = start - nats["all"]
    shares = {name: (start - end) / gap if gap > 0 else math.nan for name, end in ends.items()}
    return shares | {"subset_gap_nats": gap}


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


def _perplexity(
    model: SamMixin, test_BS: Tensor, graph_LEE: Tensor, condition: Tensor | None, held: Held
) -> float:  # fmt: skip
    with torch.no_grad(), model.over(graph_LEE, condition), ExitStack() as holds:
        for layer, experts in zip(model.sam_layers, held, strict=True):
            holds.enter_context(holding(layer, experts))
        window = test_BS.shape[1]
        nll_sum, tokens = token_nll(model, list(test_BS), window=window, stride=window, batch=_BATCH)
    return math.exp(nll_sum / tokens)


def _every(model: SamMixin) -> Held:
    """All experts of every layer."""
    return [range(model.sam_config.num_experts)] * len(model.sam_layers)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _stacked(masks: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(masks))
