"""Aggregation that a few hostile clients cannot carry away, one unit at a time.

| robust         | of each unit                                              | source                        |
|----------------|-----------------------------------------------------------|-------------------------------|
| `norm_clip`    | a delta longer than norm_bound x the median of the norms  | Sun et al., 1911.07963        |
|                | is scaled down to that; then the rule as usual            |                               |
| `trimmed_mean` | of each coordinate, the mean without int(trim x replies)  | Yin et al., 1803.01498; `trim`|
|                | of the smallest and as many of the largest                | is Flower's FedTrimmedAvg beta|
| `median`       | of each coordinate, the median                            | Yin et al., 1803.01498        |

`norm_clip` keeps the weights of its rule, and so its bias is the clipping's alone; but a weight holds |D_i|, which is a
client's own word. The other two use neither p nor |D_i|: every reply that holds the unit counts the same, as a mean of
deltas on the scale of `hajek`. So they lean to clients that are likely to hold an expert, give a small client the say
of a large one, and are not the mean where replies are skewed: bias, for a bound on what a lie can do.

All count the replies *of a unit*: more than half of those must be honest (for `trimmed_mean`, all but `trim` of them),
and sparse clients leave a unit few. A delta that is zero, of an expert that saw no token, is a reply too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic

import numpy as np
from numpy.typing import NDArray

from sam_ds.federation.aggregation import Aggregated, AggregationConfig, Aggregator, U, check_reply


def new_aggregator(
    config: AggregationConfig, *, total_weight: float, folder: Path
) -> Aggregator[Any] | RobustAggregator[Any]:
    """The aggregator that the configuration asks for; `folder`, which is there, is for those that keep replies."""
    if config.robust == "none":
        return Aggregator(config, total_weight=total_weight)
    return RobustAggregator(config, total_weight=total_weight, folder=folder)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """One unit of one reply: where its delta lies, and what it weighs."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    norm: float
    weight: float
    probability: float

    def read(self) -> NDArray[Any]:
        count = math.prod(self.shape)
        return np.fromfile(self.path, self.dtype, count, offset=self.offset).reshape(self.shape)


class RobustAggregator(Generic[U]):
    """Keeps accepted replies in `folder`, a file each, and reads them back unit by unit: no more of them is in memory
    than one unit of each. Interface, arguments and errors of `Aggregator`.

    `trimmed_mean` and `median` give the same bytes in any order of `add`, `norm_clip` in plan order.
    """

    def __init__(self, config: AggregationConfig, *, total_weight: float, folder: Path) -> None:
        self._config = replace(config, rule="none") if config.replaces_rule else config
        self._total_weight = total_weight
        self._folder = folder
        self._kept: dict[U, list[_Kept]] = {}
        self._replies = 0

    def add(self, deltas: Mapping[U, NDArray[Any]], *, weight: float, probability: Callable[[U], float]) -> None:
        check_reply(self._config, deltas, weight=weight, probability=probability)
        for unit, delta in deltas.items():
            assert unit not in self._kept or self._kept[unit][0].shape == delta.shape, f"shape of {unit}"
        path = self._folder / f"delta-{self._replies}.bin"
        self._replies += 1
        with open(path, "wb") as file:
            for unit, delta in deltas.items():
                kept = _Kept(
                    path=path, offset=file.tell(), shape=delta.shape, dtype=delta.dtype,
                    norm=float(np.linalg.norm(delta.astype(np.float64))), weight=weight,
                    probability=1.0 if self._config.rule == "none" else probability(unit),
                )  # fmt: skip
                file.write(delta.tobytes())
                self._kept.setdefault(unit, []).append(kept)

    def result(self) -> Aggregated[U]:
        return self._trimmed() if self._config.replaces_rule else self._clipped()

    def _clipped(self) -> Aggregated[U]:
        fold: Aggregator[U] = Aggregator(self._config, total_weight=self._total_weight)
        for unit, replies in self._kept.items():
            # The lower of two middle ones: their mean would let one of two replies set the bound.
            middle = sorted(kept.norm for kept in replies)[(len(replies) - 1) // 2]
            bound = self._config.norm_bound * middle
            for kept in replies:
                delta = kept.read()
                if kept.norm > bound:
                    delta = delta * (bound / kept.norm)
                fold.add({unit: delta}, weight=kept.weight, probability={unit: kept.probability}.__getitem__)
        return fold.result()

    def _trimmed(self) -> Aggregated[U]:
        deltas = {}
        for unit, replies in self._kept.items():
            values = np.stack([kept.read() for kept in replies])
            values.sort(axis=0)
            cut = self._config.cut(len(replies))
            inner = values[cut : len(replies) - cut].mean(axis=0, dtype=np.float64)
            deltas[unit] = np.asarray(inner, dtype=np.result_type(replies[0].dtype, np.float32))
        counts = {unit: len(replies) for unit, replies in self._kept.items()}
        return Aggregated(
            deltas=deltas, effective_sample_size=float(min(counts.values(), default=0)),
            mean_effective_sample_size=sum(counts.values()) / max(len(counts), 1),
            largest_weight=float(bool(counts)), received=counts,
        )  # fmt: skip
