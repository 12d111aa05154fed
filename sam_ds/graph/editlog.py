"""The edits of a run in order, for whoever was away, and graphs as packed bits.

A copy of the graph is known by how many edits it holds: the log only grows, so a copy of any age catches up with the
edits from its count on. A client's own graph is part of the server's and is sent as one bit for each edge there.

Letters: L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sam_ds.errors import InputError
from sam_ds.graph.dag import BoolArray
from sam_ds.graph.edits import Edit, IntArray, apply

_KINDS = ("prune", "promote")


@dataclass(frozen=True, slots=True)
class EditLog:
    """The edits that were kept, each with the round after which it was made."""

    entries: tuple[tuple[int, Edit], ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def append(self, round_: int, edits: Sequence[Edit]) -> EditLog:
        """The log with the edits of a later round. Raises InputError for a round before the last one."""
        if self.entries and round_ < self.entries[-1][0]:
            raise InputError(f"edits of round {round_} cannot follow those of round {self.entries[-1][0]}")
        return EditLog((*self.entries, *((round_, edit) for edit in edits)))

    def since(self, count: int) -> list[Edit]:
        """What a copy that holds `count` edits lacks. Raises InputError where there are fewer."""
        if not 0 <= count <= len(self):
            raise InputError(f"a graph of {count} edits is not of this log, which has {len(self)}")
        return [edit for _, edit in self.entries[count:]]

    def array(self) -> IntArray:
        """(edits, 5): round, layer, tail, head, kind (1 = promote)."""
        rows = [(r, e.layer, e.tail, e.head, _KINDS.index(e.kind)) for r, e in self.entries]
        return np.array(rows, dtype=np.int64).reshape(-1, 5)

    @classmethod
    def of_array(cls, array: IntArray) -> EditLog:
        """The inverse of `array`. Raises InputError for what is none."""
        if array.dtype != np.int64 or array.ndim != 2 or array.shape[1] != 5 or not np.isin(array[:, 4:], (0, 1)).all():
            raise InputError(f"an edit log is an int64 array (edits, 5) with kinds 0 and 1, got {array.dtype} "
                             f"{array.shape}")  # fmt: skip
        log = cls()
        for round_, layer, tail, head, kind in array.tolist():
            log = log.append(round_, [Edit(layer=layer, tail=tail, head=head, kind=_KINDS[kind])])  # type: ignore[arg-type]
        return log


def catch_up(graph_LEE: BoolArray, log: EditLog, count: int) -> BoolArray:
    """The graph of the log's end, from a copy that holds `count` of its edits. Raises InputError as `apply` does."""
    return apply(graph_LEE, log.since(count))


def every_edge(layers: int, num_experts: int) -> BoolArray:
    """(L, E, E) all that is strictly upper triangular."""
    return np.triu(np.ones((layers, num_experts, num_experts), dtype=np.bool_), 1)


def pack_edges(mask_LEE: BoolArray, within_LEE: BoolArray) -> npt.NDArray[np.uint8]:
    """A bit for each edge of `within`, in the order of (layer, tail, head); `mask` is a part of it."""
    assert not (mask_LEE & ~within_LEE).any(), "a graph has edges that the one it is sent in has not"
    return np.packbits(mask_LEE[within_LEE])


def unpack_edges(bits: npt.NDArray[np.uint8], within_LEE: BoolArray) -> BoolArray:
    """The inverse of `pack_edges`. Raises InputError for another number of bytes."""
    edges = int(within_LEE.sum())
    if bits.dtype != np.uint8 or bits.shape != (-(-edges // 8),):
        raise InputError(f"{edges} edges are {-(-edges // 8)} bytes, got {bits.dtype} {bits.shape}")
    mask_LEE = np.zeros_like(within_LEE)
    mask_LEE[within_LEE] = np.unpackbits(bits, count=edges).astype(np.bool_)
    return mask_LEE
