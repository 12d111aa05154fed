"""How the report and the summary write tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sam_ds.evaluation.svg import short


def html_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; every cell is escaped."""
    head = "".join(f"<th>{escape(str(cell))}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def html_note(text: str) -> str:
    """A line of small print, escaped."""
    return f'<p class="note">{escape(text)}</p>'


def show_perplexity(value: float) -> str:
    """Two decimals where they mean something."""
    return f"{value:.2f}" if value < 1000 else short(value)


def show_change(before: float, after: float) -> str:
    """Relative change in per cent."""
    return f"{after / before - 1:+.1%}"


def show_ratio(count: Mapping[str, int]) -> str:
    """Message bytes over raw bytes, in per cent."""
    return f"{count['message'] / count['raw']:.0%}" if count["raw"] else "0%"


def show_megabytes(count: float) -> str:
    """Bytes in MB (10^6)."""
    return f"{count / 1e6:.1f} MB"


def show_seconds(value: float) -> str:
    """A duration in the unit that reads best."""
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
