"""`sam-ds perplexity MODEL DATA`: token-weighted perplexity of each domain and the headline."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import DomainScore, headline, perplexity_by_domain
from sam_ds.evaluation.reading import token_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained, is_converted, readable
from sam_ds.experts.model import SamMixin
from sam_ds.experts.personal import personal_graph
from sam_ds.graph.dag import full_graph, random_graph

_TEXT_TOKENS = 2048
"""That the assembler knows a domain by."""


def run(options: argparse.Namespace) -> int:
    """Raises InputError for a model or data that cannot be read, for windows that make no sense and for a graph that
    there cannot be."""
    if not 1 <= options.stride <= options.window:
        raise InputError(f"--stride must be from 1 to --window {options.window}, got {options.stride}")
    _check_graph(options)
    corpus = load_corpus(options.data, public_every=0)
    with readable(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        converted = is_converted(options.model)
        if options.graph != "saved" and not converted:
            raise InputError(f"--graph {options.graph} is of a converted model, and {options.model} is none")
        model: PreTrainedModel
        if converted and not options.dense:
            model = from_pretrained(options.model, dtype=torch.float32)
        else:
            # A converted folder is a plain checkpoint too: loaded as such, it is the dense model.
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model.eval()
    scores: dict[str, DomainScore] = {}
    for name, splits in corpus.domains.items():
        graph: AbstractContextManager[None] = nullcontext()
        if options.graph != "saved":
            assert isinstance(model, SamMixin)
            graph = model.over(*_graph(options, model, tokenizer, splits.train))
        with graph:
            scores |= perplexity_by_domain(
                model, tokenizer, {name: getattr(splits, options.split)}, window=options.window, stride=options.stride,
                batch=options.batch, max_tokens=options.max_tokens,
            )  # fmt: skip
    result = {
        "model": options.model, "split": options.split, "sparse": converted and not options.dense,
        "graph": options.graph, "edges": options.edges,
        "headline": headline(scores, list(scores)),
        "domains": {
            name: {"perplexity": score.perplexity, "tokens": score.tokens} for name, score in scores.items()
        },
    }  # fmt: skip
    if options.json:
        print(json.dumps(result))
        return 0
    for name, score in scores.items():
        print(f"{name:16} {score.perplexity:10.3f}   {score.tokens} tokens")
    print(f"{'headline':16} {result['headline']:10.3f}   exp of the mean over domains of the NLL")
    return 0


def _check_graph(options: argparse.Namespace) -> None:
    limited = options.graph in ("random", "zero-shot")
    if limited != (options.edges is not None):
        raise InputError(f"--graph {options.graph} needs --edges B" if limited else
                         f"--edges {options.edges} is of --graph random or zero-shot, not {options.graph}")  # fmt: skip
    if options.seed < 0:
        raise InputError(f"--seed must be at least 0, got {options.seed}")
    if options.dense and options.graph != "saved":
        raise InputError(f"--dense visits all experts, whatever the graph: leave out --graph {options.graph}")
    if options.graph == "zero-shot" and options.split == "train":
        raise InputError("--graph zero-shot reads train text: give --split valid or test")


def _graph(
    options: argparse.Namespace, model: SamMixin, tokenizer: Any, texts: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """(L, E, E) of a domain, and what the assembler knows of it."""
    experts, roots, layers = model.sam_config.num_experts, model.sam_config.roots, len(model.sam_layers)
    if options.graph == "zero-shot":
        ids_BS = token_rows({"train": texts}, tokenizer, window=window_of(model), tokens=_TEXT_TOKENS)
        own = personal_graph(model, ids_BS, edges=options.edges)
        return own.graph_LEE, own.condition
    if options.graph == "full":
        masks = [full_graph(experts, roots)] * layers
    else:
        rng = np.random.default_rng(options.seed)
        masks = [random_graph(experts, options.edges, roots, rng) for _ in range(layers)]
    return torch.from_numpy(np.stack(masks)), None
