"""`sam-ds inspect MODEL`: what a converted model looks like inside, and with --data what it does with text."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoTokenizer

from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.experts import LayerFacts, describe, percent
from sam_ds.evaluation.figure import figure
from sam_ds.evaluation.reading import token_rows, window_of
from sam_ds.evaluation.svg import arc_diagram
from sam_ds.experts.checkpoint import from_pretrained, readable


def run(options: argparse.Namespace) -> int:
    """Raises InputError for a folder that is not converted, data that cannot be read and a file that cannot be
    written."""
    if options.tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {options.tokens}")
    if options.svg is not None and not Path(options.svg).absolute().parent.is_dir():
        raise InputError(f"--svg {options.svg}: there is no folder {Path(options.svg).parent}; make it first")
    corpus = None if options.data is None else load_corpus(options.data, public_every=0)
    with readable(options.model):
        model = from_pretrained(options.model, dtype=torch.float32).eval()
    ids_BS = None
    if corpus is not None:
        with readable(options.model):
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        texts = {name: splits.valid for name, splits in corpus.domains.items()}
        ids_BS = token_rows(texts, tokenizer, window=window_of(model), tokens=options.tokens)
    layers = describe(model, ids_BS)
    if options.svg is not None:
        try:
            Path(options.svg).write_text(_drawing(layers), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--svg {options.svg} cannot be written: {error}") from error
    tokens = 0 if ids_BS is None else ids_BS.numel()
    if options.json:
        records = [asdict(layer) for layer in layers]
        print(json.dumps({"model": options.model, "data": options.data, "tokens": tokens, "layers": records}))
        return 0
    for index, layer in enumerate(layers):
        print(f"layer {index}: {layer.summary()}")
        print("  visits in %: " + " ".join(f"{100 * share:.0f}" for share in layer.usage))
    print(f"visits of {tokens} tokens of valid text" if tokens else
          "visits of the calibration text, over the full graph; --data measures them on text of yours")  # fmt: skip
    return 0


def _drawing(layers: list[LayerFacts]) -> str:
    """The graphs; the more tokens take an edge, the darker it is, where that is known."""
    drawings = {}
    for index, layer in enumerate(layers):
        most = max(layer.used or (), default=0) or 1
        use = {} if layer.used is None else {e: n / most for e, n in zip(layer.edges, layer.used, strict=True)}
        captured = "" if layer.mass is None else f", mass captured {percent(layer.mass)}"
        title = f"layer {index}: {len(layer.edges)} edges{captured}"
        drawings[title] = arc_diagram(layer.experts, layer.roots, layer.edges, use, {}, title)
    return figure(drawings)
