"""The report of a run: one HTML file that needs nothing beside itself, and the table at the end of a run.

Everything in it is read from `metrics.jsonl`, so it can be written while the run goes on, and again later.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from sam_ds.evaluation.formats import show_megabytes
from sam_ds.evaluation.page import PAGE
from sam_ds.evaluation.records import read
from sam_ds.evaluation.scores import (
    curves_section,
    headline_section,
    score_header,
    score_rows,
    scores_section,
)
from sam_ds.evaluation.sections import (
    bytes_section,
    clients_section,
    compute_section,
    config_section,
    data_section,
    edits_section,
    graph_section,
    privacy_section,
    rejected_section,
    time_section,
    usage_section,
    warnings_section,
)


def write_report(metrics_jsonl: Path, out: Path) -> None:
    """Write the report of the run so far. Raises InputError for a file that holds no run."""
    records = read(metrics_jsonl)
    sections = [
        ("Headline", headline_section(records)),
        ("Perplexity before and after", scores_section(records)),
        ("Perplexity over the run", curves_section(records)),
        ("Expert graph", graph_section(records)),
        ("Edge usage", usage_section(records)),
        ("Topology edits and bounds", edits_section(records)),
        ("Bytes", bytes_section(records)),
        ("Time", time_section(records)),
        ("Client compute", compute_section(records)),
        ("Clients and tiers", clients_section(records)),
        ("Rejected replies", rejected_section(records)),
        ("Warnings", warnings_section(records)),
        ("Privacy", privacy_section(records)),
        ("Data", data_section(records)),
        ("Configuration", config_section(records)),
    ]
    run = records.run
    title = f"{run['method']} on {run['data']['name']}, {run['model']['name']}"
    state = "finished" if records.end else f"under way, {len(records.trained)} rounds so far"
    anchors = [name.lower().replace(" ", "-") for name, _ in sections]
    links = "".join(
        f'<a href="#{a}">{escape(name)}</a>' for a, (name, _) in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<section id="{anchor}"><h2>{escape(name)}</h2>{content}</section>'
        for anchor, (name, content) in zip(anchors, sections, strict=True)
    )
    text = PAGE.format(title=escape(title), state=escape(state), links=links, body=body)
    # Whole or not at all: somebody may be reading the last one.
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(out)


def summary_table(metrics_jsonl: Path) -> str:
    """The plain table printed at the end of a run: perplexity before and after, bytes, orchestration."""
    records = read(metrics_jsonl)
    rows = [["perplexity", *score_header(records)], *score_rows(records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    up, down = records.bytes_total("bytes_up"), records.bytes_total("bytes_down")
    lines += [
        "",
        f"{len(records.trained)} rounds   up {show_megabytes(up['message'])}   "
        f"down {show_megabytes(down['message'])}   "
        f"orchestration {records.orchestration_share():.1%} of the wall time"
        + ("" if records.end else "   (under way)"),
    ]
    return "\n".join(lines)
