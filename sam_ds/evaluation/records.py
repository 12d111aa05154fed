"""`metrics.jsonl` read back: the records of a run by kind, also of a run that is still under way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_ds.errors import InputError

Record = dict[str, Any]
BYTES = ("raw", "encoded", "message")


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """`run` opens the file, `end` closes it (None while the run goes on); `rounds` starts with round 0."""

    run: Record
    rounds: list[Record]
    clients: list[Record]
    refused: list[Record]
    """Messages that answered nothing: of nodes, beside the replies that a round waited for."""
    end: Record | None

    @property
    def trained(self) -> list[Record]:
        """The rounds in which something was trained."""
        return [record for record in self.rounds if record["round"] > 0]

    @property
    def rejected(self) -> list[Record]:
        """Of clients that were drawn: replies that were not folded, or did not come."""
        return [record for record in self.clients if record["status"] != "ok"]

    @property
    def edits(self) -> list[tuple[int, Record]]:
        """(round, edit) of the whole run."""
        return [(record["round"], edit) for record in self.rounds for edit in record["edits"]]

    def graph_after(self) -> list[list[list[int]]]:
        """(L, E, E) the graph at the end, or so far: the first one with the edits that were kept."""
        if self.end is not None:
            graph: list[list[list[int]]] = self.end["graph"]
            return graph
        graph = [[list(row) for row in layer] for layer in self.run["graph"]]
        for _, edit in self.edits:
            if edit["kept"]:
                graph[edit["layer"]][edit["tail"]][edit["head"]] = int(edit["kind"] == "promote")
        return graph

    def before_and_after(self, kind: str) -> tuple[Record | None, Record | None]:
        """Scores ("merged" or "sparse") on test text; until then, of the first and last evaluated round."""
        if self.end is not None:
            return self.end[f"{kind}_before"], self.end[f"{kind}_after"]
        scores = [record[kind] for record in self.rounds if record[kind] is not None]
        return (scores[0], scores[-1]) if scores else (None, None)

    def bytes_total(self, way: str) -> dict[str, int]:
        """Bytes of all rounds, `way` = "bytes_up" or "bytes_down", counted three ways."""
        return {name: sum(record[way][name] for record in self.rounds) for name in BYTES}

    def orchestration_share(self) -> float:
        """Seconds that are neither clients' work nor evaluation, over the wall time of the rounds."""
        if self.end is not None:
            return float(self.end["orchestration_share"])
        wall = sum(record["wall_seconds"] for record in self.trained)
        return sum(record["orchestration_seconds"] for record in self.trained) / wall if wall else 0.0


def read(path: Path) -> Records:
    """The records of a run. A last line that is only half written is left out.

    Raises InputError for a file that is missing, has no `run` record or is damaged before its last line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the metrics {str(path)!r}: {error.strerror}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"line {number} of {str(path)!r} is not JSON: {error}") from error
    by_kind: dict[str, list[Record]] = {"run": [], "round": [], "client": [], "refused": [], "end": []}
    for record in records:
        by_kind[record["kind"]].append(record)
    if not by_kind["run"]:
        raise InputError(
            f"{str(path)!r} has no record of kind 'run': is it the metrics.jsonl of a run folder?"
        )
    return Records(
        run=by_kind["run"][0],
        rounds=sorted(by_kind["round"], key=lambda record: record["round"]),
        clients=by_kind["client"],
        refused=by_kind["refused"],
        end=by_kind["end"][-1] if by_kind["end"] else None,
    )
