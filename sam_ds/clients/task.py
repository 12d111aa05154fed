"""What a worker is asked and what it answers, and the ranks that work together on one task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from sam_ds.wire.payload import Unit

REGISTRATION_TOKENS = 2048
"""Of a client's text, from which its mean gate scores and visit rates are."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One client's work in one round."""

    round: int
    client: int
    tier: str
    trains: str
    held: tuple[tuple[int, ...], ...]
    """Experts in each layer, ascending, roots first."""
    sent: tuple[tuple[int, ...], ...]
    """Those of them whose update the client answers."""
    graph_LEE: NDArray[np.bool_]
    condition: NDArray[np.float32] | None
    """(L, E + 1) for the assembler; None where the method has none."""
    units: Mapping[Unit, NDArray[np.float32]]
    standins: NDArray[np.float32] | None = None
    """(L, E, Q, p) the stand-ins' cores since they were refitted; None: as they came with the base model."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a client answers."""

    deltas: dict[Unit, NDArray[np.float32]]
    counters: list[NDArray[np.int64]]
    """Per layer (3, S, S): used, offered, together, over the slots in the order of `Task.held`; empty if not routed."""
    examples: int
    tokens: int
    loss_first: float
    loss_last: float
    load_seconds: float
    train_seconds: float
    started: float
    """Seconds since the epoch, on this rank's clock."""


class WorkerGroup:
    """Ranks that train one client together; what DeepSpeed calls an mpu, the group as its data-parallel group."""

    def __init__(self, ranks: Sequence[int], group: Any) -> None:
        self.ranks = list(ranks)
        self.group = group
        # At stage 0 DeepSpeed sums the clip norm over the model-parallel group; None would mean all ranks of the
        # launch, which are training other clients.
        self._alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)

    @property
    def position(self) -> int:
        """This rank's place in the group."""
        return self.ranks.index(dist.get_rank())

    def get_data_parallel_group(self) -> Any:
        return self.group

    def get_data_parallel_world_size(self) -> int:
        return len(self.ranks)

    def get_data_parallel_rank(self) -> int:
        return self.position

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_group(self) -> Any:
        return self._alone
