"""A rank's side of the federation: one DeepSpeed engine per tier, kept for the whole run, through which virtual
clients pass one after the other.

A task says which client, which experts it holds, the graph it may use, and the units it starts from; the result is
what those units became, minus what they were. Batches come from (seed, round, client), so that a result depends on
nothing but its task.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.task import REGISTRATION_TOKENS, Result, Task, WorkerGroup
from sam_ds.clients.tier_engine import TierEngine
from sam_ds.config import RunConfig
from sam_ds.data.batches import batch_indices, pack
from sam_ds.data.partition import ClientData, holder
from sam_ds.errors import InputError
from sam_ds.wire.payload import ExpertUnit


class Worker:
    """Trains virtual clients on this rank's worker groups, one for each number of ranks that a tier asks for."""

    def __init__(
        self, config: RunConfig, folder: Path, clients: Sequence[ClientData], groups: Sequence[WorkerGroup]
    ) -> None:
        self.config = config
        self.folder = folder
        self.clients = clients
        self.dealt = dealt_tiers(config)
        self._groups = {len(group.ranks): group for group in groups}
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._engines: dict[tuple[str, str], TierEngine] = {}
        self._rows: dict[int, NDArray[np.int64]] = {}

    def rows(self, client: int, round_: int = 0) -> NDArray[np.int64]:
        """(B, S) the client's own training tokens: from the round of the shift on, those the next client had."""
        client = holder(client, round_, clients=len(self.clients), shift_round=self.config.federation.shift_round)
        if client not in self._rows:
            self._rows[client] = pack(self.clients[client].texts, self.tokenizer, self.config.train.sequence)
        return self._rows[client]

    def engine(self, tier: str, trains: str) -> TierEngine:
        """The engine for this tier, built at first use. Methods that train the dense model share one."""
        tier = engine_tier(self.config, tier, trains)
        key = (tier, trains)
        if key not in self._engines:
            section = self.config.tiers[tier]
            size = self.config.ranks_of(section)
            if size not in self._groups:
                raise InputError(f"tiers.{tier} wants {size} ranks a client; this process has groups of "
                                 f"{', '.join(map(str, self._groups))}: start it with the DeepSpeed launcher")
            self._engines[key] = TierEngine(self.config, self.folder, section, trains, self._groups[size])
        return self._engines[key]

    def build(self, trains: Mapping[str, str]) -> None:
        """All engines, by tier and what its clients train. ZeRO-3 is made with a barrier of all ranks of the launch, so
        every rank must do this, in the same order."""
        for tier, kind in trains.items():
            self.engine(tier, kind)

    def register(self, client: int, tier: str, trains: str) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
        """What the server may know of a client: number of examples, mean gate scores (L, E) on its text, and how
        often a route over the full graph would visit each expert (L, E).

        An example is a training sequence: documents differ in length, and |D_i| weighs what was trained on.
        """
        engine = self.engine(tier, trains)
        rows = self.rows(client)
        seen = rows[: max(1, REGISTRATION_TOKENS // self.config.train.sequence)]
        scores, rates = engine.describe(torch.from_numpy(seen))
        return len(rows), scores, rates

    def train(self, task: Task) -> Result:
        """Run one task on its tier's group; collective over the group's ranks, which all return the same."""
        started = time.time()
        clock = time.perf_counter()
        engine = self.engine(task.tier, task.trains)
        before = engine.load(task)
        loaded = time.perf_counter()
        settings = self.config.train
        rows = self.rows(task.client, task.round)
        order = batch_indices(
            len(rows), settings.batch, settings.steps, (self.config.seed, task.round, task.client)
        )  # fmt: skip
        losses = [
            engine.step(torch.from_numpy(rows[picked]), learning_rate(self.config, task.round, step), whole=whole)
            for step, (picked, whole) in enumerate(zip(order, settings.whole_steps(), strict=True))
        ]
        losses = engine.mean_over_group(losses)
        after = engine.read(task.held)
        sent = [set(experts) for experts in task.sent]
        deltas = {
            unit: (after[unit] - before[unit]).numpy()
            for unit in after
            if not isinstance(unit, ExpertUnit) or unit.expert in sent[unit.layer]
        }
        return Result(
            deltas=deltas, counters=engine.counters(), examples=len(rows),
            tokens=settings.steps * settings.batch * settings.sequence, loss_first=losses[0],
            loss_last=float(np.mean(losses[-3:])), load_seconds=loaded - clock,
            train_seconds=time.perf_counter() - loaded, started=started,
        )  # fmt: skip

    def close(self) -> None:
        """Release the engines; without it a process may die at exit while collectives are torn down."""
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()


def engine_tier(config: RunConfig, tier: str, trains: str) -> str:
    """The tier whose engine trains a client of `tier`: its own, or one for all where every client trains everything,
    not the one that happens to come first, for ranks must not differ."""
    return tier if trains in ("full", "lora") else config.working_tiers[-1]


def learning_rate(config: RunConfig, round_: int, step: int) -> float:
    """Of one local step. Within a round up, since a cold AdamW's first steps are sign-sized, then down to zero, so
    that what is averaged has settled; over the rounds linearly down to `final_lr` of the start."""
    settings, rounds = config.train, config.federation.rounds
    within = min(1.0, (step + 1) / (settings.warmup_steps + 1), (settings.steps - step) / settings.steps)
    progress = (round_ - 1) / max(1, rounds - 1)
    return settings.lr * within * (1.0 - (1.0 - settings.final_lr) * min(1.0, progress))
