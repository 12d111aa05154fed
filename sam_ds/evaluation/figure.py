"""Drawings as one SVG file that stands alone: a grid, each under its title, with the style a page would give them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from sam_ds.evaluation.svg import series_class

_COLORS = ("#3366cc", "#e07a1f", "#2a9d6f", "#a44fc4", "#c9304f", "#7a6a55")
_STYLE = """
svg { background: #fff; }
text { font: 11px system-ui, sans-serif; fill: #667085; }
.title { font-size: 13px; fill: #1c2330; }
.arc { fill: none; stroke: #3366cc; stroke-width: 1.2; }
.node { fill: #667085; }
.root { fill: #e07a1f; }
.grid { stroke: #e2e6ee; fill: none; }
""" + "".join(f".c{i} {{ fill: {color}; stroke: {color}; }}\n" for i, color in enumerate(_COLORS)) + """
.line { fill: none; stroke-width: 2; }
.again { stroke-dasharray: 5 4; }
"""  # fmt: skip
_GAP, _TITLE = 24.0, 22.0
_KEY = 150
"""Width of a series' name."""


def figure(drawings: Mapping[str, str], series: Sequence[str] = (), columns: int | None = None) -> str:
    """The drawings (`evaluation.svg`), by title, all of one size, under the names of the series that they share; at
    most four in a row, if not said otherwise."""
    parsed = {title: ElementTree.fromstring(drawing) for title, drawing in drawings.items()}
    width, height = map(float, next(iter(parsed.values())).attrib["viewBox"].split()[2:])
    columns = columns or min(4, math.ceil(math.sqrt(len(parsed))))
    rows = math.ceil(len(parsed) / columns)
    across = columns * (width + _GAP) + _GAP
    keys = max(1, int((across - 2 * _GAP) // _KEY))
    top = _GAP + math.ceil(len(series) / keys) * _TITLE
    size = (across, top + rows * (height + _TITLE + _GAP))
    root = ElementTree.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {size[0]:g} {size[1]:g}",
                "width": f"{size[0]:g}", "height": f"{size[1]:g}"},
    )  # fmt: skip
    ElementTree.SubElement(root, "style").text = _STYLE
    for index, name in enumerate(series):
        x, y = _GAP + index % keys * _KEY, _GAP + index // keys * _TITLE
        ElementTree.SubElement(root, "path", {"class": f"line {series_class(index)}", "d": f"M{x:g} {y:g}h22"})
        ElementTree.SubElement(root, "text", {"class": "title", "x": f"{x + 28:g}", "y": f"{y + 4:g}"}).text = name
    for index, (title, drawing) in enumerate(parsed.items()):
        x = _GAP + index % columns * (width + _GAP)
        y = top + index // columns * (height + _TITLE + _GAP)
        ElementTree.SubElement(root, "text", {"class": "title", "x": f"{x:g}", "y": f"{y + 12:g}"}).text = title
        drawing.attrib.update(x=f"{x:g}", y=f"{y + _TITLE:g}", width=f"{width:g}", height=f"{height:g}")
        root.append(drawing)
    return ElementTree.tostring(root, encoding="unicode") + "\n"
