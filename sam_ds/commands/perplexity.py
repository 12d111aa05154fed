"""`sam-ds perplexity MODEL DATA`: token-weighted perplexity of each domain and the headline."""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import headline, perplexity_by_domain
from sam_ds.experts.checkpoint import from_pretrained, is_converted, readable


def run(options: argparse.Namespace) -> int:
    """Raises InputError for a model or data that cannot be read and for windows that make no sense."""
    if not 1 <= options.stride <= options.window:
        raise InputError(f"--stride must be from 1 to --window {options.window}, got {options.stride}")
    corpus = load_corpus(options.data, public_every=0)
    with readable(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        converted = is_converted(options.model)
        if converted and not options.dense:
            model = from_pretrained(options.model, dtype=torch.float32)
        else:
            # A converted folder is a plain checkpoint too: loaded as such, it is the dense model.
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    texts = {name: getattr(splits, options.split) for name, splits in corpus.domains.items()}
    scores = perplexity_by_domain(
        model.eval(), tokenizer, texts, window=options.window, stride=options.stride, batch=options.batch,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    result = {
        "model": options.model, "split": options.split, "sparse": converted and not options.dense,
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
