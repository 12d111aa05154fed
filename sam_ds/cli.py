"""`sam-ds` and `python -m sam_ds`: the commands. Exit codes: 0 done, 2 bad input."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from sam_ds.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="sam-ds", description="Self-assembling expert graphs.")
    commands = parser.add_subparsers(dest="command", required=True)
    perplexity = commands.add_parser("perplexity", help="token-weighted perplexity of a model on held-out text")
    perplexity.add_argument("model", help="folder or hub id; a converted folder is routed over its graph")
    perplexity.add_argument("data", help="folder of <domain>/{train,valid,test}.*, a datasets name, or 'embedded'")
    perplexity.add_argument("--split", choices=("train", "valid", "test"), default="test")
    perplexity.add_argument("--dense", action="store_true", help="visit all experts: the merged model")
    perplexity.add_argument("--window", type=int, default=256, help="tokens the model sees at once")
    perplexity.add_argument("--stride", type=int, default=256, help="new tokens a window scores")
    perplexity.add_argument("--batch", type=int, default=8, help="windows at once")
    perplexity.add_argument("--max-tokens", type=int, default=None, help="per domain; all of them by default")
    perplexity.add_argument("--json", action="store_true", help="print one JSON object")
    perplexity.set_defaults(run=_perplexity)
    report = commands.add_parser("report", help="write report.html of a run, also of one under way")
    report.add_argument("folder", metavar="RUN", help="the run folder")
    report.set_defaults(run=_report)
    bench = commands.add_parser("bench", help="time one part against a named peer on the same data")
    if arguments[:1] == ["bench"]:
        # Only then: the benchmarks import what they time, and the other commands start at once.
        from sam_ds.bench import add_benchmarks

        add_benchmarks(bench)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except InputError as error:
        print(f"sam-ds {options.command}: {error}", file=sys.stderr)
        return 2


def _perplexity(options: argparse.Namespace) -> int:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sam_ds.data.corpus import load_corpus
    from sam_ds.evaluation.domains import headline, perplexity_by_domain
    from sam_ds.experts.model import from_pretrained, is_converted

    if not 1 <= options.stride <= options.window:
        raise InputError(f"--stride must be from 1 to --window {options.window}, got {options.stride}")
    corpus = load_corpus(options.data, public_every=0)
    converted = is_converted(options.model)
    try:
        if converted and not options.dense:
            model = from_pretrained(options.model, dtype=torch.float32)
        else:
            # A converted folder is a plain checkpoint too: loaded as such, it is the dense model.
            model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    except (OSError, ValueError) as error:
        raise InputError(f"model {options.model!r} cannot be loaded: {str(error).splitlines()[0]}") from error
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


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from sam_ds.evaluation.report import summary_table, write_report

    metrics = Path(options.folder) / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{options.folder} is not a run folder: it has no metrics.jsonl")
    write_report(metrics, metrics.parent / "report.html")
    print(summary_table(metrics))
    return 0
