"""Calls timed in turn: on a shared machine only what ran at the same time can be compared."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """`seconds` of every timed round and what the call `returned` in it."""

    seconds: list[float]
    returned: list[Any]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))


def interleave(
    calls: Mapping[str, Callable[[int], Any]], *, rounds: int, warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:  # fmt: skip
    """Each call once a round, with the number of the round; every other round in the opposite order.

    The warm-up rounds have negative numbers and are not kept. `time.process_time` as the clock leaves out the time that
    others had the processor, where all that is timed runs on one thread.
    """
    names = list(calls)
    timed = {name: Timed(seconds=[], returned=[]) for name in names}
    for number in range(-warmup, rounds):
        for name in names if number % 2 else reversed(names):
            _synchronize()
            start = clock()
            returned = calls[name](number)
            _synchronize()
            if number >= 0:
                timed[name].seconds.append(clock() - start)
                timed[name].returned.append(returned)
    return timed


def rows(timed: Mapping[str, Timed], peer: str) -> list[dict[str, Any]]:
    """A row a call: median, the middle half of the seconds, and the ratio of its median to that of `peer`."""
    table = []
    for name, own in timed.items():
        low, high = np.percentile(own.seconds, (25, 75))
        table.append({
            "call": name, "median_s": own.median, "low_s": float(low), "high_s": float(high),
            "time": own.median / timed[peer].median,
        })  # fmt: skip
    return table


def machine() -> dict[str, Any]:
    """What a figure depends on beside the code."""
    facts = {
        "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
