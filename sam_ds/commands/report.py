"""`sam-ds report RUN`: the page of a run and its table."""

from __future__ import annotations

import argparse
from pathlib import Path

from sam_ds.errors import InputError
from sam_ds.evaluation.report import summary_table, write_report


def run(options: argparse.Namespace) -> int:
    """Write RUN/report.html and print the table. Raises InputError for a folder that is no run."""
    metrics = Path(options.folder) / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{options.folder} is not a run folder: it has no metrics.jsonl")
    write_report(metrics, metrics.parent / "report.html")
    print(summary_table(metrics))
    return 0
