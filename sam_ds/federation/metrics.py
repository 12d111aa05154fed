"""What a run writes down: `metrics.jsonl`, one record a round and one a client, and the accounts behind it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_ds.evaluation.costs import ffn_flops, training_flops
from sam_ds.experts.config import SamConfig
from sam_ds.experts.layer import SamFFN
from sam_ds.federation.participation import ClientPlan
from sam_ds.federation.server import Server
from sam_ds.federation.state import ServerState, write_atomically, writing


class MetricsLog:
    """Appends records; the file is readable while the run goes on."""

    def __init__(self, path: Path, domains: list[str]) -> None:
        self.path = path
        self._domains = domains
        """Main domain of every client."""
        self._bytes: dict[str, dict[str, int]] = {}

    def rewind(self, round_: int) -> None:
        """Forget what was written after this round: a resumed run writes it again."""
        records = read_records(self.path) if self.path.exists() else []
        kept = [r for r in records if r["kind"] != "end" and r.get("round", 0) <= round_]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and flush it; those of clients are on the disk when the record of their round is."""
        if record["kind"] == "client":
            record["domain"] = self._domains[record["client"]]
            for way in ("bytes_up", "bytes_down"):
                total = self._bytes.setdefault(way, {"raw": 0, "encoded": 0, "message": 0})
                for name in total:
                    total[name] += record[way][name]
        with writing(self.path), open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            if record["kind"] != "client":
                os.fsync(file.fileno())

    def write_round(
        self, round_: int, scores: dict[str, Any], facts: dict[str, Any], times: dict[str, float], state: ServerState
    ) -> None:
        """The record that closes a round, with the bytes of its clients."""
        zero = {"raw": 0, "encoded": 0, "message": 0}
        facts = facts | facts.pop("aggregation", {})
        self.write(
            {
                "kind": "round", "round": round_, **times, "bytes_up": self._bytes.pop("bytes_up", zero),
                "bytes_down": self._bytes.pop("bytes_down", zero), **scores,
                "validation_loss": state.losses[-1], "edits": [], "gamma": None, "warnings": [],
                "edges": state.graph.sum((1, 2)).tolist(),
            } | facts
        )  # fmt: skip


class RoundClock:
    """Splits the wall time of a round: evaluation, clients at work, and what is left: orchestration."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._work: list[tuple[float, float]] = []

    def busy(self, metrics: Mapping[str, float]) -> None:
        """A client worked from `started` for its load and train seconds."""
        start = float(metrics["started"])
        self._work.append((start, start + float(metrics["load-seconds"]) + float(metrics["train-seconds"])))

    def times(self, evaluation_seconds: float) -> dict[str, float]:
        """Seconds: `wall`, `evaluation`, `work` (at least one client is loading or training), `orchestration`."""
        wall = time.perf_counter() - self._began
        work = end = 0.0
        for start, stop in sorted(self._work):
            work += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return {
            "wall_seconds": wall, "evaluation_seconds": evaluation_seconds, "work_seconds": work,
            "orchestration_seconds": max(0.0, wall - evaluation_seconds - work),
        }  # fmt: skip


def active_flops(server: Server, client: ClientPlan, tokens: int) -> float:
    """FLOPs of a client's local training on this many tokens, attention and embeddings included."""
    layers = server.model.sam_layers

    routed = server.model.sam_config
    # A step that visits all held sends no messages.
    silent = replace(routed, semantics="reach")

    def forward(layer: SamFFN, active: int, sam: SamConfig, held: int) -> float:
        return ffn_flops(
            sam, hidden=layer.ffn.hidden, neurons=layer.neurons * server.num_experts,
            gated=layer.ffn_names[1] is not None, active=active, held=held,
        )  # fmt: skip

    steps = server.config.train.whole_steps()
    whole = sum(steps) / len(steps) if server.method.sparse else 1.0
    ffn = 0.0
    for layer, held in zip(layers, client.experts, strict=True):
        most = len(held) if server.method.sparse else server.num_experts
        ffn += whole * forward(layer, most, silent, most)
        ffn += (1.0 - whole) * forward(layer, min(layer.top_k, most), routed, most)
    frozen = server.trains.startswith("lora")
    return tokens * training_flops(other_parameters=server.other_parameters(), ffn=ffn, frozen=frozen)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a run so far; a last line that a crash cut short is no record."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
