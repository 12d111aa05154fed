"""The perplexities of a run: figures at the top, table before and after, curves."""

from __future__ import annotations

import itertools
from html import escape

from sam_ds.evaluation.formats import (
    html_note,
    html_table,
    show_change,
    show_megabytes,
    show_perplexity,
    show_ratio,
    show_seconds,
)
from sam_ds.evaluation.records import Record, Records
from sam_ds.evaluation.svg import line_chart


def _score_pairs(records: Records) -> list[tuple[str, Record, Record]]:
    """(kind, before, after) of the evaluations that there are."""
    pairs = [(kind, *records.before_and_after(kind)) for kind in ("merged", "sparse")]
    return [
        (kind, before, after) for kind, before, after in pairs if before is not None and after is not None
    ]


def score_header(records: Records) -> list[str]:
    """Titles of the columns of `score_rows`."""
    return [text for kind, _, _ in _score_pairs(records) for text in (f"{kind} before", "after", "change")]


def score_rows(records: Records) -> list[list[str]]:
    """One row a domain, then the headline and what was forgotten."""
    rows = []
    pairs = _score_pairs(records)
    for name in [*records.run["data"]["domains"], "headline", "forgetting"]:
        cells = [name]
        for _, before, after in pairs:
            was, now = (
                (s["domains"].get(name) if name in s["domains"] else s.get(name)) for s in (before, after)
            )
            cells += (
                ["-"] * 3
                if was is None or now is None
                else [show_perplexity(was), show_perplexity(now), show_change(was, now)]
            )
        if any(cell != "-" for cell in cells[1:]):
            rows.append(cells)
    return rows


def headline_section(records: Records) -> str:
    """The figures one looks for first."""
    tiles = []
    for kind, before, after in _score_pairs(records):
        note = _from(before["headline"], after["headline"])
        tiles.append((f"perplexity, {kind}", show_perplexity(after["headline"]), note))
        if kind == "merged" and before["forgetting"] is not None:
            note = _from(before["forgetting"], after["forgetting"])
            tiles.append(("on domains nobody holds", show_perplexity(after["forgetting"]), note))
    wall = records.end["wall_seconds"] if records.end else sum(r["wall_seconds"] for r in records.rounds)
    up, down = records.bytes_total("bytes_up"), records.bytes_total("bytes_down")
    kept = sum(edit["kept"] for _, edit in records.edits)
    tiles += [
        ("rounds", str(len(records.trained)), f"{len(records.run['clients'])} clients"),
        ("uploaded", show_megabytes(up["message"]), f"{show_ratio(up)} of the raw tensors"),
        ("downloaded", show_megabytes(down["message"]), f"{show_ratio(down)} of the raw tensors"),
        ("wall time", show_seconds(wall), f"orchestration {records.orchestration_share():.1%}"),
        ("edits kept", str(kept), f"of {len(records.edits)} tried"),
    ]
    cards = "".join(
        f'<div class="tile"><small>{escape(name)}</small><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></div>"
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cards}</div>'


def _from(before: float, after: float) -> str:
    return f"from {show_perplexity(before)} ({show_change(before, after)})"


def scores_section(records: Records) -> str:
    """Perplexity of every domain, before and after."""
    pairs = _score_pairs(records)
    if not pairs:
        return '<p class="none">not evaluated yet</p>'
    text = "test text" if records.end else "validation text, first and last evaluation so far"
    note = (
        f"On {text}. Merged: the dense model after folding, all experts. Sparse: "
        f"{records.run['model']['top_k']} of {records.run['model']['experts']} experts a token, by the graph."
    )
    return html_table(["domain", *score_header(records)], score_rows(records)) + html_note(note)


def curves_section(records: Records) -> str:
    """Perplexity against rounds and against megabytes uploaded."""
    uploaded = list(itertools.accumulate(record["bytes_up"]["message"] / 1e6 for record in records.rounds))
    charts = []
    for x_label, xs in (
        ("round", [r["round"] for r in records.rounds]),
        ("MB uploaded (messages)", uploaded),
    ):
        series: dict[str, list[tuple[float, float]]] = {}
        for kind, what in itertools.product(("merged", "sparse"), ("headline", "forgetting")):
            line = [
                (x, record[kind][what])
                for x, record in zip(xs, records.rounds, strict=True)
                if record[kind] is not None and record[kind][what] is not None
            ]
            if line:
                series[f"{kind}, {what}"] = line
        charts.append(f"<figure>{line_chart(series, x_label, 'perplexity')}</figure>")
    domains = {
        domain: [
            (r["round"], r["merged"]["domains"][domain]) for r in records.rounds if r["merged"] is not None
        ]
        for domain in records.run["data"]["domains"]
    }
    rows = [
        [domain, *(show_perplexity(value) for _, value in line)] for domain, line in domains.items() if line
    ]
    evaluated = [f"round {r['round']}" for r in records.rounds if r["merged"] is not None]
    table = (
        f"<details><summary>merged, by domain</summary>{html_table(['domain', *evaluated], rows)}</details>"
    )
    return f'<div class="pair">{"".join(charts)}</div>{table}' + html_note("Validation text.")
