"""What finished cells come to: the rows of a table, ratios at equal cost, curves.

At equal upload, traffic (up and down) or FLOPs a peer is read at the first of its evaluated rounds that has spent at
least as much as ours has at the end, or ours, where it has spent more than the peer's whole run, on the line between
its evaluated rounds around that: a curve that falls ever more slowly is below it, so the rounding is never in our
favour.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sam_ds.bench.suite import MODELS, SPENT, Cell, Comparison, Table
from sam_ds.evaluation.figure import figure
from sam_ds.evaluation.svg import lines

Curve = Sequence[Mapping[str, Any]]
Done = Sequence[tuple[Cell, dict[str, Any]]]
"""Cells of a table that have finished, each with its record."""


def rows_of(table: Table, done: Done) -> list[dict[str, Any]]:
    """One for every setting and variant that has a cell: means over the seeds, and the standard deviation of merged."""
    rows = []
    for setting in table.settings:
        for variant in table.variants:
            own = [(c, r) for c, r in done if (c.variant, c.setting) == (variant, setting)]
            if not own:
                continue
            last = [record["curve"][-1] for _, record in own]
            rows.append({
                "setting": setting, "variant": variant, "seeds": len(own),
                "merged": float(np.mean([point["merged"] for point in last])),
                "sd": float(np.std([point["merged"] for point in last], ddof=1)) if len(own) > 1 else 0.0,
                "worst": float(np.mean([_worst(cell, record["after"]) for cell, record in own])),
                "sparse": _mean_of([point["sparse"] for point in last]),
                "sparse_worst": _mean_of([
                    record["sparse_after"] and _worst(cell, record["sparse_after"]) for cell, record in own
                ]),
                "forgetting": _mean_of([record["forgetting"] for _, record in own]),
                "MB_up": float(np.mean([point["up"] for point in last])) / 1e6,
                "MB_down": float(np.mean([point["down"] for point in last])) / 1e6,
                "TFLOPs": float(np.mean([point["flops"] for point in last])) / 1e12,
                "lr": own[0][1]["lr"], "minutes": float(np.mean([record["seconds"] for _, record in own])) / 60,
            })  # fmt: skip
    return rows


def compared(comparison: Comparison, done: Done) -> list[dict[str, Any]]:
    """One for every setting that both have cells of: mean ratio over the seeds, and whether the sign is the seeds'."""
    by = {(cell.setting, cell.config.seed, cell.variant): record["curve"] for cell, record in done}
    found = []
    for setting in dict.fromkeys(setting for setting, _, _ in by):
        ratios = []
        for seed in sorted({seed for own, seed, _ in by if own == setting}):
            ours, peer = (by.get((setting, seed, name)) for name in (comparison.ours, comparison.peer))
            if ours is not None and peer is not None:
                mine, yours = equal_points(ours, peer, comparison.axis)
                theirs = best(yours) if comparison.model == "merged" else yours["sparse"] or yours["merged"]
                ratios.append(mine[comparison.model] / theirs)
        if ratios:
            error = float(np.std(ratios, ddof=1) / len(ratios) ** 0.5) if len(ratios) > 1 else None
            found.append({
                "name": f"{comparison.name}: {setting}", "ratio": float(np.mean(ratios)), "ratios": ratios,
                "standard_error": error, "same_sign": len({ratio > 1 for ratio in ratios}) == 1,
            })  # fmt: skip
    return found


def equal_points(ours: Curve, peer: Curve, axis: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Where on two curves both have spent as much, rounded against ours."""
    if axis == "rounds":
        return ours[-1], peer[-1]
    spent = SPENT[axis]
    budget = min(spent(ours[-1]), spent(peer[-1]))
    return _at(ours, spent, budget), next(point for point in peer if spent(point) >= budget)


def _at(curve: Curve, spent: Callable[[Mapping[str, Any]], float], budget: float) -> Mapping[str, Any]:
    """The point of a curve that has spent this much, on the line between the two around it."""
    after = next(point for point in curve if spent(point) >= budget)
    if spent(after) == budget:
        return after
    before = [point for point in curve if spent(point) < budget][-1]
    share = (budget - spent(before)) / (spent(after) - spent(before))
    return {
        name: before[name] + share * (after[name] - before[name])
        for name in MODELS if before.get(name) is not None and after.get(name) is not None
    }  # fmt: skip


def best(point: Mapping[str, Any]) -> float:
    """The better of the two models of a peer: that of a mask is the masked one."""
    return min(float(point[name]) for name in MODELS if point[name] is not None)


def end_of(record: Mapping[str, Any]) -> float:
    """What a trial comes to: inf where it diverged."""
    value = best(record["curve"][-1]) if "curve" in record else math.inf
    return value if math.isfinite(value) else math.inf


def drawn(table: Table, done: Done) -> str:
    """Curves of every setting, the mean over the seeds, as one SVG; empty where no setting has two of them.

    Without their common start, beside which all differences between them are small.
    """
    drawings = {}
    axes = (("up", 1e6, "MB uploaded"), ("flops", 1e12, "TFLOPs of clients"), ("round", 1, "round"))
    for setting, (kind, value_of), (axis, unit, label) in itertools.product(table.settings, _DRAWN.items(), axes):
        series: dict[str, list[tuple[float, float]]] = {variant: [] for variant in table.variants}
        for variant in table.variants:
            own = [(c, r["curve"]) for c, r in done if (c.variant, c.setting) == (variant, setting)]
            if own and all(value_of(cell, curve[-1]) is not None for cell, curve in own):
                series[variant] = [
                    (float(np.mean([point[axis] for point in points])) / unit,
                     float(np.mean([value_of(own[0][0], point) for point in points])))
                    for points in zip(*(curve for _, curve in own), strict=True) if points[0][axis] > 0
                ]  # fmt: skip
        if sum(map(bool, series.values())) > 1:
            # Bytes of whole and of low-rank updates lie orders of magnitude apart.
            drawings[f"{setting}: {kind} by {label}"] = lines(series, label, kind, log_x=axis == "up")
    return figure(drawings, table.variants, columns=len(axes)) if drawings else ""


def _worst(cell: Cell, scores: Mapping[str, float]) -> float:
    """The highest perplexity of a domain that clients have."""
    return max(value for domain, value in scores.items() if domain not in cell.config.federation.forgetting)


_DRAWN: Mapping[str, Callable[[Cell, Mapping[str, Any]], Any]] = {
    "merged headline": lambda _, point: point["merged"],
    "merged worst domain": lambda cell, point: _worst(cell, point["domains"]),
    "sparse headline": lambda _, point: point["sparse"],
    # Of what older records do not have there is no curve.
    "sparse worst domain": lambda cell, point: (domains := point.get("sparse_domains")) and _worst(cell, domains),
}


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
