"""Training-free conversion against published baselines: perplexity / dense perplexity at an equal share of FFN FLOPs.

A method, E, a share and a seed are a cell. The cells of a seed have the same public calibration text, all cells the
same test text. The share is of the dense FFNs' FLOPs, router and stand-ins counted: each method visits as many experts
as fit. Every method fits a layer on the prefix already converted; ours finds all experts in the dense model before.

`sam` takes fields of SamConfig: `sam:standin=mean:features=activations` is a method of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sam_ds.bench.conversion import SAM, Cell, active_of, distillation_of, measure, score, settings_of
from sam_ds.bench.options import add_seed, numbers
from sam_ds.data.batches import pack
from sam_ds.data.corpus import load_corpus
from sam_ds.data.splits import Corpus
from sam_ds.discovery.kmeans import check_divides
from sam_ds.errors import InputError, nearest
from sam_ds.evaluation.baselines import BASELINES
from sam_ds.evaluation.domains import headline
from sam_ds.experts.checkpoint import readable
from sam_ds.experts.surgery import find_ffns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or hub id of a dense causal language model")
    parser.add_argument("--data", required=True, help="folder of <domain>/{train,test}.*, or 'embedded'")
    parser.add_argument("--methods", default=",".join((SAM, *BASELINES)), help="sam:FIELD=VALUE sets SamConfig's")
    parser.add_argument("--experts", default="16,64")
    parser.add_argument("--shares", default="0.75,0.5,0.25", help="of the dense FFNs' FLOPs")
    parser.add_argument("--seeds", type=int, default=3, help="as many, from --seed on")
    parser.add_argument("--domains", help="all of the data's by default")
    parser.add_argument("--tokens", type=int, default=18432, help="of calibration text, evenly over the domains")
    parser.add_argument("--distill-tokens", type=int, default=131072, help="of text for sam:distill=STEPS")
    parser.add_argument("--test-rows", type=int, default=8, help="rows of test text a domain")
    parser.add_argument("--window", type=int, default=256, help="tokens a row")
    parser.add_argument("--out", help="JSON lines, a cell a line: cells found there are not measured again")
    parser.add_argument("--again", action="store_true", help="measure the methods anew; a cell's last line counts")
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: method, E and share, over the seeds. Ratios: our best / the best baseline at the same E and share.

    The rows are of all methods that `--out` has of this model, text, E, share and seeds.
    """
    shares, experts = numbers("shares", options.shares, float), numbers("experts", options.experts, int)
    for share in shares:
        if not 0 < share <= 1:
            raise InputError(f"--shares must be above 0 and at most 1, which is the dense model, got {share}")
    for name, low in (("seeds", 1), ("tokens", 1), ("distill_tokens", 1), ("test_rows", 1), ("window", 2)):
        if getattr(options, name) < low:
            raise InputError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(options, name)}")
    methods = [name.strip() for name in options.methods.split(",")]
    for method in methods:
        settings_of(method)
    model, tokenizer = _load(options.model)
    corpus = load_corpus(options.data)
    domains = _domains(corpus, options.domains)
    about = {
        "model": Path(options.model).name, "text": corpus.fingerprint, "domains": domains, "tokens": options.tokens,
        "test_rows": options.test_rows, "window": options.window,
    }  # fmt: skip

    def about_of(cell: Cell) -> dict[str, Any]:
        return about | ({"distill_tokens": options.distill_tokens} if distillation_of(cell) else {})

    records = read_records(options.out, about_of)
    seeds = range(options.seed, options.seed + options.seeds)
    cells = list(dict.fromkeys(
        Cell(method=method, experts=None if _per_neuron(method) else e, share=share, seed=seed)
        for seed in seeds for e in experts for share in shares for method in methods
    ))  # fmt: skip
    ffns = find_ffns(model)
    for e in experts:
        if e < 2:
            raise InputError(f"--experts must be at least 2, got {e}")
        for ffn in ffns:
            check_divides(ffn.neurons, e)
    for cell in cells:
        # What makes no sense is refused before the first cell is measured.
        active_of(cell, ffns)
        distillation_of(cell)
    left = [cell for cell in cells if options.again or cell not in records]
    if left:
        test = {
            name: torch.from_numpy(pack(
                corpus.domains[name].test, tokenizer, options.window, limit_tokens=options.test_rows * options.window
            ))
            for name in domains
        }  # fmt: skip
        dense = headline(score(model, test), domains)
        rows, more_rows = (
            max(1, tokens // (options.window * len(domains))) for tokens in (options.tokens, options.distill_tokens)
        )
        for cell in tqdm(left, desc="convert", unit="cell"):
            start = time.perf_counter()
            calibration_BS = calibration_rows(corpus, domains, tokenizer, rows, options.window, seed=cell.seed)
            distill_BS = None
            if distillation_of(cell) is not None:
                distill_BS = calibration_rows(corpus, domains, tokenizer, more_rows, options.window, seed=cell.seed)
            found = measure(cell, model, calibration_BS, test, distill_BS=distill_BS)
            found |= {"ratio": found["perplexity"] / dense, "dense": dense, "seconds": time.perf_counter() - start}
            records[cell] = asdict(cell) | found | {"about": about_of(cell)}
            if options.out is not None:
                with Path(options.out).open("a") as lines:
                    lines.write(json.dumps(records[cell]) + "\n")
    shown = [
        record for cell, record in records.items()
        if cell.seed in seeds and cell.share in shares and (cell.experts is None or cell.experts in experts)
    ]  # fmt: skip
    table = summarize(shown)
    return {"rows": table, "ratios": compare(table), "dense": shown[0]["dense"]}


def calibration_rows(
    corpus: Corpus, domains: Sequence[str], tokenizer: Any, rows: int, window: int, *, seed: int
) -> Tensor:
    """(domains x rows, window) of the public documents, drawn with the seed. Mixed: where a method reads only the
    first tokens, they are of all domains. Raises InputError for a domain without a row of public text."""
    rng = np.random.default_rng(seed)
    found = []
    for name in domains:
        public = corpus.domains[name].public
        texts = [public[index] for index in rng.permutation(len(public))]
        found.append(pack(texts, tokenizer, window, limit_tokens=rows * window))
    return torch.from_numpy(rng.permutation(np.concatenate(found)))


def read_records(out: str | None, about_of: Callable[[Cell], Mapping[str, Any]]) -> dict[Cell, dict[str, Any]]:
    """The cells of this model and text that the file has, the last line of each. A file that is not there has none;
    raises InputError for a line that is no cell."""
    if out is None or not Path(out).exists():
        return {}
    records = {}
    for number, line in enumerate(Path(out).read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            cell = Cell(**{field.name: record[field.name] for field in fields(Cell)})
            same = record["about"] == about_of(cell)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"--out {out}, line {number} is not a cell of this benchmark: remove the line, or give "
                             "another file") from error  # fmt: skip
        if same:
            records[cell] = record
    return records


def summarize(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a method, E and share: means over the seeds, and the ratio's lowest and highest."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["experts"], record["share"], record["method"]), []).append(record)
    table = []
    for (experts, share, method), own in sorted(groups.items(), key=lambda item: (item[0][0] or 0, -item[0][1])):
        ratios = [record["ratio"] for record in own]
        means = {name: float(np.mean([record[name] for record in own])) for name in ("flops", "active", "mass")}
        table.append({
            "experts": experts or "neurons", "share": share, "method": method, **means,
            "ratio": float(np.mean(ratios)), "low": min(ratios), "high": max(ratios), "seeds": len(own),
        })  # fmt: skip
    return table


def compare(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """At each E and share: the lowest of our mean ratios / the lowest of the baselines', those on neurons included.

    What was distilled is left out: the baselines are not trained either.
    """
    found = {}
    for experts, share in dict.fromkeys((row["experts"], row["share"]) for row in table):
        near = [
            row for row in table
            if row["share"] == share and row["experts"] in (experts, "neurons") and ":distill" not in row["method"]
        ]  # fmt: skip
        ours = [row["ratio"] for row in near if row["method"].split(":")[0] == SAM]
        theirs = [row["ratio"] for row in near if row["method"].split(":")[0] != SAM]
        if ours and theirs:
            found[f"E={experts} {share:g}"] = min(ours) / min(theirs)
    return found


def _per_neuron(method: str) -> bool:
    return method in BASELINES and BASELINES[method].per_neuron


def _domains(corpus: Corpus, text: str | None) -> list[str]:
    if text is None:
        return list(corpus.domains)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in corpus.domains:
            raise InputError(f"--domains has {name!r}, which {corpus.name!r} has not{nearest(name, corpus.domains)}; "
                             f"its domains: {', '.join(corpus.domains)}")  # fmt: skip
    return names


def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with readable(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)
