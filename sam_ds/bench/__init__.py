"""`sam-ds bench NAME`: one part timed against a named peer on the same data; `examples/benchmarks/` has the figures.

A benchmark is a file here and its name in `BENCHMARKS`. It has `add_arguments(parser)` and `run(options) -> dict`
with `rows` (dicts of the same keys: the table) and `ratios` (ours / peer, what a target is set on). All of them have
`--json`; `bench/options.py` has the options that many share.
"""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from typing import Any

from sam_ds.bench.options import check_sizes
from sam_ds.bench.timing import machine

BENCHMARKS = ("aggregate", "cluster", "cohorts", "convert", "estimators", "faults", "federation", "flower", "fuzz",
              "layer", "memory", "moe", "scale", "tiers", "wire", "zero", "zero_shot")  # fmt: skip


def add_benchmarks(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark."""
    names = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name in BENCHMARKS:
        module = import_module(f"sam_ds.bench.{name}")
        text = (module.__doc__ or "").splitlines()[0]
        own = names.add_parser(name, help=text, description=text)
        module.add_arguments(own)
        own.add_argument("--json", action="store_true", help="print one JSON object")
        own.set_defaults(run=_run, measure=module.run)


def _run(options: argparse.Namespace) -> int:
    if "rounds" in options:
        check_sizes(options, "rounds")
    result = options.measure(options)
    hidden = ("command", "benchmark", "run", "measure", "json")
    parameters = {name: value for name, value in vars(options).items() if name not in hidden}
    if options.json:
        facts = {"benchmark": options.benchmark, "machine": machine(), "parameters": parameters}
        print(json.dumps(result | facts))
        return 0
    _print_table(result["rows"])
    for title, facts in (("ratios", result["ratios"]), ("machine", machine()), ("parameters", parameters)):
        print(f"{title}: " + ", ".join(f"{name} {_cell(value)}" for name, value in facts.items()))
    return 0


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
