"""A rank's side of the federation: one DeepSpeed engine per tier, kept for the whole run, through which virtual
clients pass one after the other.

A task says which client, which experts it holds, the graph it may use, and the units it starts from; the result is
what those units became, minus what they were. Nothing of a client stays in the engine: weights are replaced, the
optimizer is reset, batches come from (seed, round, client).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer

from sam_ds.clients.engine import (
    full_shape,
    read_parameters,
    reset_optimizer,
    set_learning_rate,
    write_parameters,
)
from sam_ds.clients.tiers import ds_config
from sam_ds.config import RunConfig, TierSection
from sam_ds.data.batches import batch_indices, pack
from sam_ds.data.partition import ClientData
from sam_ds.experts.model import add_assembler, from_pretrained
from sam_ds.experts.slots import Checkpoint, StandInStore, hold_experts, to_slots
from sam_ds.experts.units import expert_weights, prepare, read_units, shared_parameters, trained_fields, write_units
from sam_ds.graph.route import Counters, route
from sam_ds.wire.payload import ExpertUnit, Unit

_REGISTRATION_TOKENS = 2048


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


class Worker:
    """Trains virtual clients on this rank's worker group."""

    def __init__(
        self, config: RunConfig, folder: Path, clients: Sequence[ClientData], group: WorkerGroup
    ) -> None:
        self.config = config
        self.folder = folder
        self.clients = clients
        self.group = group
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._engines: dict[tuple[str, str], TierEngine] = {}
        self._rows: dict[int, NDArray[np.int64]] = {}

    def rows(self, client: int) -> NDArray[np.int64]:
        """(B, S) the client's own training tokens."""
        if client not in self._rows:
            self._rows[client] = pack(self.clients[client].texts, self.tokenizer, self.config.train.sequence)
        return self._rows[client]

    def engine(self, tier: str, trains: str) -> TierEngine:
        """The engine for this tier, built at first use. Methods that train the dense model share one."""
        if trains not in ("full", "lora"):
            # Not the tier that happens to come first: ranks must not differ.
            tier = [name for name, section in self.config.tiers.items() if section.share > 0.0][-1]
        key = (tier, trains)
        if key not in self._engines:
            section = self.config.tiers[tier]
            self._engines[key] = TierEngine(self.config, self.folder, section, trains, self.group)
        return self._engines[key]

    def register(self, client: int, tier: str, trains: str) -> tuple[int, NDArray[np.float32], NDArray[np.float32]]:
        """What the server may know of a client: number of examples, mean gate scores (L, E) on its text, and how
        often a route over the full graph would visit each expert (L, E).

        An example is a training sequence: documents differ in length, and |D_i| weighs what was trained on.
        """
        engine = self.engine(tier, trains)
        rows = self.rows(client)
        seen = rows[: max(1, _REGISTRATION_TOKENS // self.config.train.sequence)]
        scores, rates = engine.describe(torch.from_numpy(seen))
        return len(rows), scores, rates

    def train(self, task: Task) -> Result:
        """Run one task on this group; collective over the group's ranks, which all return the same."""
        started = time.time()
        clock = time.perf_counter()
        engine = self.engine(task.tier, task.trains)
        before = engine.load(task)
        loaded = time.perf_counter()
        settings = self.config.train
        rows = self.rows(task.client)
        order = batch_indices(
            len(rows), settings.batch, settings.steps, (self.config.seed, task.round, task.client)
        )  # fmt: skip
        losses = [
            engine.step(torch.from_numpy(rows[picked]), learning_rate(self.config, task.round, step))
            for step, picked in enumerate(order)
        ]
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


class TierEngine:
    """A slot model under DeepSpeed, and the ways to load a client into it and read it back."""

    def __init__(
        self, config: RunConfig, folder: Path, tier: TierSection, trains: str, group: WorkerGroup
    ) -> None:
        self.config = config
        self.group = group
        self.sparse = trains in ("full", "lora")
        model = from_pretrained(folder, dtype=torch.float32)
        self.store = StandInStore(model)
        slots = tier.experts if self.sparse else config.sam.num_experts
        to_slots(model, slots, config.sam.top_k if self.sparse else slots)
        if self.sparse:
            add_assembler(model, seed=config.seed)
        settings = config.train
        prepare(
            model, trains, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=config.seed, dense=settings.dense
        )  # fmt: skip
        self.layers = model.sam_layers
        self.model = model
        self.weights = expert_weights(model)
        self.fields = trained_fields(model, trains)
        self.shared = shared_parameters(model, trains, dense=settings.dense)
        self.checkpoint = Checkpoint(folder)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=config.train.weight_decay)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=ds_config(tier, config), mpu=group, dist_init_required=False
        )  # fmt: skip

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: full_shape(p) for name, p in self.engine.module.named_parameters()}

    def load(self, task: Task) -> dict[Unit, Tensor]:
        """Fill the engine for a client; returns the units as they are before training, fp32 on the CPU."""
        held = task.held
        units = {unit: torch.from_numpy(np.asarray(value)) for unit, value in task.units.items()}
        trained = {field.parameter for field in self.fields} | set(self.shared.values())
        values = {name: torch.zeros(self._shapes[name]) for name in sorted(trained)}
        write_units(units, self.fields, self.shared, values, held)
        if self.sparse:
            hold_experts(self.layers, self.store, held)
            self.model.set_graph(torch.from_numpy(task.graph_LEE))
            self.model.sam_condition = torch.from_numpy(task.condition)
            for field in self.weights:
                if field.parameter not in trained:
                    values[field.parameter] = torch.empty(self._shapes[field.parameter])
                    self.checkpoint.read_experts(field, held[field.layer], values[field.parameter])
        write_parameters(self.engine, values)
        reset_optimizer(self.engine)
        for layer in self.layers:
            layer.counters = _no_counts(layer.slots) if self.sparse else None
        self.engine.train()
        return units

    def step(self, ids_BS: Tensor, lr: float) -> float:
        """One optimizer step on this rank's share of the batch; the loss in nats a token."""
        share = ids_BS.chunk(len(self.group.ranks))[self.group.position].to(self.engine.device)
        set_learning_rate(self.engine, lr)
        loss = self.engine(input_ids=share, labels=share, use_cache=False).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def read(self, held: Sequence[Sequence[int]]) -> dict[Unit, Tensor]:
        """The units as they are now."""
        names = {field.parameter for field in self.fields} | set(self.shared.values())
        return read_units(self.fields, self.shared, read_parameters(self.engine, sorted(names)), held)

    def counters(self) -> list[NDArray[np.int64]]:
        """Per layer (3, S, S): used, offered, together, summed over the group; empty where nothing was routed."""
        if not self.sparse:
            return []
        counts = [
            torch.stack([layer.counters.used_SS, layer.counters.offered_SS, layer.counters.together_SS])
            for layer in self.layers
        ]
        if len(self.group.ranks) > 1:
            for value in counts:
                dist.all_reduce(value, group=self.group.group)
        return [value.cpu().numpy() for value in counts]

    @torch.no_grad()
    def describe(self, ids_BS: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean gate scores and full-graph visit rates of all E experts, (L, E) each, on a client's text, seen
        through the experts used most on calibration text: what the tier's memory allows."""
        most_used = tuple(tuple(range(layer.slots)) for layer in self.layers)
        hold_experts(self.layers, self.store, most_used)
        values = {field.parameter: torch.empty(self._shapes[field.parameter]) for field in self.weights}
        for field in self.weights:
            self.checkpoint.read_experts(field, most_used[field.layer], values[field.parameter])
        for index, layer in enumerate(self.layers):
            layer.counters = None
            layer.sam.adjacency_SS.fill_(True).triu_(1)
            name = next(n for n, p in self.engine.module.named_parameters() if p is layer.sam.wg)
            values[name] = self.store.wg[index][: layer.slots]
        # What a client trained here before must not be seen either.
        trained = {field.parameter for field in self.fields} | set(self.shared.values())
        for name in sorted(trained - values.keys()):
            if ".lora." in name:
                values[name] = torch.zeros(self._shapes[name])
            elif name in self.checkpoint:
                values[name] = self.checkpoint.read(name)
        write_parameters(self.engine, values)
        scores: list[Tensor] = []
        rates: list[Tensor] = []

        def look(index: int, x_Td: Tensor) -> None:
            layer = self.layers[index]
            score_TE = F.linear(x_Td.float(), self.store.wg[index].to(x_Td.device))
            full_EE = torch.ones(score_TE.shape[1], score_TE.shape[1], dtype=torch.bool, device=x_Td.device).triu(1)
            routing = route(score_TE, full_EE, roots=layer.roots, k=self.config.sam.top_k)
            scores.append(score_TE.mean(0))
            rates.append(routing.visited_TS.float().mean(0))

        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, index=index: look(index, args[0].reshape(-1, args[0].shape[-1]))
            )
            for index, layer in enumerate(self.layers)
        ]
        self.engine.eval()
        self.engine(input_ids=ids_BS.to(self.engine.device), use_cache=False)
        for handle in handles:
            handle.remove()
        return torch.stack(scores).cpu().numpy(), torch.stack(rates).cpu().numpy()

    def close(self) -> None:
        """Free the engine's hooks and buffers."""
        self.engine.destroy()


def learning_rate(config: RunConfig, round_: int, step: int) -> float:
    """Of one local step. Within a round up, since a cold AdamW's first steps are sign-sized, then down to zero, so
    that what is averaged has settled; over the rounds linearly down to `final_lr` of the start."""
    settings, rounds = config.train, config.federation.rounds
    within = min(1.0, (step + 1) / (settings.warmup_steps + 1), (settings.steps - step) / settings.steps)
    progress = (round_ - 1) / max(1, rounds - 1)
    return settings.lr * within * (1.0 - (1.0 - settings.final_lr) * min(1.0, progress))


def _no_counts(slots: int) -> Counters:
    empty = torch.zeros(slots, slots, dtype=torch.int64)
    return Counters(used_SS=empty, offered_SS=empty, together_SS=empty)
