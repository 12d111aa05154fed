"""Small drawings as inline SVG text: lines, bars, expert graphs, heat maps. Colours come from the page's CSS.

Series are the classes c0..c5, from the seventh on with dashes. Every text that came from outside is escaped here, so a
caller passes plain strings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
Edge = tuple[int, int]

_SERIES = 6
_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2, 5 times a power of ten) that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def powers(low: float, high: float) -> list[float]:
    """Powers of ten, two or more, that cover [low, high], both above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def series_class(index: int) -> str:
    """The CSS classes of a series: its colour, and dashes where the colours are used again."""
    return f"c{index % _SERIES}" + (" again" if index >= _SERIES else "")


def short(value: float) -> str:
    """Three or four significant digits with k, M, G, T for thousands; what is not finite as it is."""
    if not math.isfinite(value):
        return str(value)
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    return f"{value:.4g}"


def legend(names: Sequence[str]) -> str:
    """The names of the series with their colours."""
    items = (f'<span><i class="{series_class(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """`lines` under their legend; a note where there is no point yet."""
    if not any(math.isfinite(x) and math.isfinite(y) for points in series.values() for x, y in points):
        return '<p class="none">no figures yet</p>'
    return legend(list(series)) + lines(series, x_label, y_label)


def lines(series: Mapping[str, Points], x_label: str, y_label: str, *, log_x: bool = False) -> str:
    """Lines with a dot at each point, of which there is one or more; those that are not finite are left out, on a
    logarithmic axis those at x <= 0 too."""
    finite = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)]
        for name, points in series.items()
    }  # fmt: skip
    points = [point for line in finite.values() for point in line]
    smallest, largest = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks = powers(smallest, largest) if log_x else ticks(min(0.0, smallest), largest)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    scale = math.log10 if log_x else float

    def at(x: float, y: float) -> tuple[float, float]:
        across = (scale(x) - scale(x_ticks[0])) / (scale(x_ticks[-1]) - scale(x_ticks[0]))
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for y in y_ticks:
        row = at(x_ticks[0], y)[1]
        parts.append(
            f'<path class="grid" d="M{_LEFT} {row:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 6}" y="{row + 4:.1f}" text-anchor="end">{short(y)}</text>'
        )
    for x in x_ticks:
        column = at(x, y_ticks[0])[0]
        parts.append(
            f'<text x="{column:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{short(x)}</text>'
        )
    for index, (name, line) in enumerate(finite.items()):
        color = series_class(index)
        where = [at(x, y) for x, y in sorted(line)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
        parts.append(f'<path class="line {color}" d="M{path}"/>' if where else "")
        parts += [
            f'<circle class="{color}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
            f"<title>{escape(name)}: {short(value[1])} at {short(value[0])}</title></circle>"
            for (x, y), value in zip(where, sorted(line), strict=True)
        ]
    parts.append(
        f'<text x="{(_WIDTH + _LEFT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    return _svg(_WIDTH, _HEIGHT, "".join(parts), f"{y_label} against {x_label}")


def stacked_bars(rows: Mapping[str, Sequence[float]], names: Sequence[str], unit: str) -> str:
    """One horizontal bar a row, cut into the series `names`; the total stands behind it."""
    if not rows:
        return '<p class="none">no figures yet</p>'
    longest = max(sum(values) for values in rows.values()) or 1.0
    width, label, height = 720, 150, 22
    parts = []
    for index, (row, values) in enumerate(rows.items()):
        x, y = float(label), index * height
        parts.append(f'<text x="{label - 8}" y="{y + 15}" text-anchor="end">{escape(row)}</text>')
        for series, value in enumerate(values):
            wide = value / longest * (width - label - 100)
            parts.append(
                f'<rect class="c{series % _SERIES}" x="{x:.1f}" y="{y + 4}" width="{wide:.1f}" height="14">'
                f"<title>{escape(names[series])}: {short(value)} {escape(unit)}</title></rect>"
            )
            x += wide
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{short(sum(values))} {escape(unit)}</text>')
    head = legend(names) if len(names) > 1 else ""
    return head + _svg(width, len(rows) * height + 4, "".join(parts), f"{', '.join(names)} in {unit}")


def arc_diagram(
    experts: int,
    roots: int,
    edges: Sequence[Edge],
    use: Mapping[Edge, float],
    marked: Mapping[Edge, str],
    title: str,
) -> str:
    """Experts on a line, every edge an arc from left to right.

    use: opacity of an edge in [0, 1] (1 where it is not given); marked: CSS class of edges that were edited.
    """
    gap, radius = 18, 4
    width, base = gap * (experts + 1), gap * experts / 2 + 12
    parts = []
    for tail, head in edges:
        x0, x1 = gap * (tail + 1), gap * (head + 1)
        half = (x1 - x0) / 2
        kind = marked.get((tail, head), "")
        opacity = 1.0 if kind else 0.08 + 0.82 * use.get((tail, head), 1.0)
        parts.append(
            f'<path class="arc {kind}" style="opacity:{opacity:.2f}" '
            f'd="M{x0} {base:g}A{half:g} {half:g} 0 0 1 {x1} {base:g}"/>'
        )
    for expert in range(experts):
        kind = "root" if expert < roots else "node"
        x = gap * (expert + 1)
        parts.append(
            f'<circle class="{kind}" cx="{x}" cy="{base:g}" r="{radius}"/>'
            f'<text x="{x}" y="{base + 16:g}" text-anchor="middle">{expert}</text>'
        )
    return _svg(width, base + 22, "".join(parts), title)


def heat_map(values: Sequence[Sequence[float]], title: str) -> str:
    """Cells of a square matrix, the largest the darkest (square root scale); zeros are not drawn."""
    largest = max((value for row in values for value in row), default=0.0) or 1.0
    cell, size = 12, len(values)
    parts = [f'<rect class="frame" x="0" y="0" width="{cell * size}" height="{cell * size}"/>']
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value > 0:
                parts.append(
                    f'<rect class="c0" x="{cell * j}" y="{cell * i}" width="{cell}" height="{cell}" '
                    f'style="opacity:{math.sqrt(value / largest):.2f}"><title>{i} → {j}: {short(value)}'
                    f"</title></rect>"
                )
    return _svg(cell * size, cell * size, "".join(parts), title)


def _svg(width: float, height: float, content: str, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{escape(title)}">{content}</svg>'
    )
