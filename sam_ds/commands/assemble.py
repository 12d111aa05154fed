"""`sam-ds assemble MODEL --data DATA`: the graph and the experts for a text of yours, without training."""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoTokenizer

from sam_ds.errors import InputError
from sam_ds.evaluation.reading import texts_of, typical_rows, window_of
from sam_ds.experts.checkpoint import from_pretrained, readable
from sam_ds.experts.personal import personal_graph


def run(options: argparse.Namespace) -> int:
    """Raises InputError for a folder that is not converted, text that cannot be read and what `personal_graph`
    refuses."""
    if options.tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {options.tokens}")
    texts = texts_of(options.data)
    with readable(options.model):
        model = from_pretrained(options.model, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids_BS = typical_rows(texts, tokenizer, window=window_of(model), tokens=options.tokens)
    personal = personal_graph(model, ids_BS, edges=options.edges, experts=options.experts)
    layers = [
        {"path": path, "held": list(held), "edges": mask_EE.nonzero().tolist()}
        for path, held, mask_EE in zip(model._sam_original, personal.held, personal.graph_LEE, strict=True)
    ]
    if options.json:
        print(json.dumps({"model": options.model, "data": options.data, "tokens": ids_BS.numel(), "layers": layers}))
        return 0
    for index, layer in enumerate(layers):
        print(f"layer {index}: {layer['path']}: holds {' '.join(map(str, layer['held']))}")
        edges = " ".join(f"{tail}>{head}" for tail, head in layer["edges"])
        print(f"  {len(layer['edges'])} edges: {edges}")
    return 0
