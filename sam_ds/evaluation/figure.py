"""Drawings as one SVG file that stands alone: a grid, each under its title, with the style a page would give them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from xml.etree import ElementTree

_STYLE = """
svg { background: #fff; }
text { font: 11px system-ui, sans-serif; fill: #667085; }
.title { font-size: 13px; fill: #1c2330; }
.arc { fill: none; stroke: #3366cc; stroke-width: 1.2; }
.node { fill: #667085; }
.root { fill: #e07a1f; }
"""
_GAP, _TITLE = 24, 22


def figure(drawings: Mapping[str, str]) -> str:
    """The drawings (`evaluation.svg`), by title, all of one size: at most four in a row."""
    parsed = {title: ElementTree.fromstring(drawing) for title, drawing in drawings.items()}
    width, height = map(float, next(iter(parsed.values())).attrib["viewBox"].split()[2:])
    columns = min(4, math.ceil(math.sqrt(len(parsed))))
    rows = math.ceil(len(parsed) / columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _TITLE + _GAP) + _GAP)
    root = ElementTree.Element(
        "svg", {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {size[0]:g} {size[1]:g}",
                "width": f"{size[0]:g}", "height": f"{size[1]:g}"},
    )  # fmt: skip
    ElementTree.SubElement(root, "style").text = _STYLE
    for index, (title, drawing) in enumerate(parsed.items()):
        x = _GAP + index % columns * (width + _GAP)
        y = _GAP + index // columns * (height + _TITLE + _GAP)
        ElementTree.SubElement(root, "text", {"class": "title", "x": f"{x:g}", "y": f"{y + 12:g}"}).text = title
        drawing.attrib.update(x=f"{x:g}", y=f"{y + _TITLE:g}", width=f"{width:g}", height=f"{height:g}")
        root.append(drawing)
    return ElementTree.tostring(root, encoding="unicode") + "\n"
