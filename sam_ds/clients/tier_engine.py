"""A slot model under DeepSpeed: one for each tier and rank, into which client after client is loaded.

Nothing of a client stays: weights are replaced, the optimizer is reset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from sam_ds.clients.ds_config import ds_config
from sam_ds.clients.engine import (
    EngineParameters,
    full_shape,
    reset_optimizer,
    set_learning_rate,
    write_parameters,
)
from sam_ds.clients.generations import frozen_factors, generation, weights_folder
from sam_ds.clients.task import Task, WorkerGroup
from sam_ds.config import RunConfig, TierSection
from sam_ds.experts.attention import updated_maps
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.factors import load_factors
from sam_ds.experts.model import add_assembler
from sam_ds.experts.personal import describe_text
from sam_ds.experts.slots import Checkpoint, StandInStore, hold_experts, to_slots
from sam_ds.experts.units import (
    Field,
    expert_weights,
    prepare,
    read_units,
    shared_parameters,
    trained_fields,
    write_units,
)
from sam_ds.graph.route import Counters
from sam_ds.wire.payload import SharedUnit, Unit


class TierEngine:
    """A slot model under DeepSpeed, and the ways to load a client into it and read it back."""

    def __init__(
        self, config: RunConfig, folder: Path, tier: TierSection, trains: str, group: WorkerGroup
    ) -> None:
        self.config = config
        self.group = group
        self.sparse = trains in ("full", "lora")
        # In the precision of the file nothing is copied: what the tier does not hold is never read.
        model = from_pretrained(folder, dtype=torch.float32)
        self.store = StandInStore(model)
        self.budgets = [layer.top_k for layer in model.sam_layers]
        """Experts that a token visits in each layer, of the full model."""
        if self.sparse:
            to_slots(model, tier.experts)
            add_assembler(model, seed=config.seed)
        settings = config.train
        prepare(
            model, trains, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=config.seed, dense=settings.dense,
            attention_rank=settings.attention_rank,
        )  # fmt: skip
        if trains == "lora":
            with torch.no_grad():
                for name, value in load_factors(folder).items():
                    model.get_parameter(name).copy_(value)
        self.layers = model.sam_layers
        self.model = model
        self.weights = expert_weights(model)
        names = [field.parameter for field in self.weights]
        self._weight_shapes = {name: full_shape(model.get_parameter(name)) for name in names}
        if tier.precision == "nf4":
            # Imported here: bitsandbytes is slow to load, and writes a warning on a CPU.
            from sam_ds.experts.nf4 import to_nf4

            # The packed bytes must stand in the precision that the engine computes in.
            to_nf4(model, dtype=torch.bfloat16)
        self.fields = trained_fields(model, trains)
        self.shared = shared_parameters(model, trains, dense=settings.dense)
        written = {field.parameter for field in self.fields} | set(self.shared.values())
        self._frozen = [field for field in self.weights if field.parameter not in written]
        self._filled: list[Sequence[int] | None] = [None] * len(self.layers)
        """Whose frozen weights are in each layer's slots."""
        self.folder = folder
        self.checkpoint = self._merged_file = Checkpoint(folder)
        self._generation = 0
        path_of = {id(module): path for path, module in model.named_modules()}
        self._paths = [path_of[id(layer)] for layer in self.layers]
        self._attention = updated_maps(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # The other kinds make copies as large as all that trains.
        optimizer = torch.optim.AdamW(trained, lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True)
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, mpu=group, dist_init_required=False,
            config=ds_config(tier, config, sum(parameter.numel() for parameter in trained)),
        )  # fmt: skip

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: full_shape(p) for name, p in self.engine.module.named_parameters()}

    def load(self, task: Task) -> dict[Unit, Tensor]:
        """Fill the engine for a client; returns the units as they are before training, fp32 on the CPU."""
        self._enter()
        units = {unit: torch.from_numpy(np.asarray(value)) for unit, value in task.units.items()}
        if (due := generation(self.config, task.round)) != self._generation:
            self._begin(due)
        if self.sparse:
            cores = self.store.core if task.standins is None else torch.from_numpy(task.standins).unbind()
            hold_experts(self.layers, cores, task.held)
            self.model.set_graph(torch.from_numpy(task.graph_LEE))
            self.model.sam_condition = torch.from_numpy(task.condition)
        write_parameters(self.engine, self._values(units, task.held))
        reset_optimizer(self.engine)
        for layer in self.layers:
            layer.counters = no_counts(layer.slots, layer.sam.wg.device) if self.sparse else None
        self.engine.train()
        return units

    def _enter(self) -> None:
        """Make this engine's group the one that DeepSpeed reduces over: at stage 0 it asks for the group of the engine
        built last, whichever steps."""
        deepspeed.utils.groups.mpu = self.group

    def _begin(self, due: int) -> None:
        """Take the factors and the weights of another generation; the experts' as they are loaded."""
        self._merged_file = Checkpoint(weights_folder(self.folder, due))
        self._filled = [None] * len(self.layers)
        # Until all is written: a task may fail halfway.
        self._generation = -1
        layers = dict(zip(self._paths, self.layers, strict=True))
        write_parameters(self.engine, frozen_factors(layers, self._attention, self.config, due))
        write_parameters(self.engine, self._maps())
        if due == 0:
            write_parameters(self.engine, load_factors(self.folder).items())
        self._generation = due

    def _maps(self) -> Iterator[tuple[str, Tensor]]:
        """The attention's own weights from disk, where updates have been merged into them."""
        for path, linear in self._attention.items():
            weight = self._merged_file.read(f"{path}.weight")
            if self.layers[0].backend == "nf4":
                from sam_ds.experts.nf4 import Nf4Map

                assert isinstance(linear, Nf4Map)
                weight = linear.pack(weight)
            yield f"{path}.weight", weight

    def _values(self, units: Mapping[Unit, Tensor], held: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """All that changes from client to client, by the name of the parameter; one at a time is in memory."""
        for name, parameter in self.shared.items():
            yield parameter, units[SharedUnit(name)]
        for field in self.fields:
            whole = torch.empty(self._shapes[field.parameter])
            write_units(units, [field], {}, {field.parameter: whole}, held)
            yield field.parameter, whole
        if self.sparse:
            yield from self._experts(held, self._frozen)

    def _experts(self, held: Sequence[Sequence[int]], fields: Sequence[Field]) -> Iterator[tuple[str, Tensor]]:
        """The held experts' own weights from disk, where others are in the slots."""
        nothing: list[Sequence[int] | None] = [None] * len(self.layers)
        # Not known until all is written: a task may fail halfway.
        filled, self._filled = (self._filled if self._frozen else nothing), nothing
        for field in fields:
            layer = self.layers[field.layer]
            if filled[field.layer] == held[field.layer]:
                continue
            whole = torch.empty(self._weight_shapes[field.parameter])
            self._merged_file.read_experts(field, held[field.layer], whole)
            if layer.backend == "nf4" and field.tensor in ("up", "gate", "gate_up", "down"):
                from sam_ds.experts.nf4 import Nf4FFN

                assert isinstance(layer, Nf4FFN)
                rows = [field.read(whole, slot) for slot in range(layer.slots)]
                for name, packed in layer.pack(field.tensor, rows).items():
                    yield f"{self._paths[field.layer]}.{name}", packed
            else:
                yield field.parameter, whole
        self._filled = list(held)

    def step(self, ids_BS: Tensor, lr: float, *, whole: bool = False) -> float:
        """One optimizer step on this rank's share of the batch; its loss in nats a token.

        `whole`: every token visits all experts held. What is learned over routes alone fits the sparse model, not
        the merged one; slimmable networks train their largest width beside the smaller ones for the same reason. The
        merged model sends no messages, so such a step does not either.
        """
        self._visit(whole=whole)
        share = ids_BS.chunk(len(self.group.ranks))[self.group.position].to(self.engine.device)
        set_learning_rate(self.engine, lr)
        loss = self.engine(input_ids=share, labels=share, use_cache=False).loss
        self.engine.backward(loss)
        self.engine.step()
        return float(loss.detach())

    def _visit(self, *, whole: bool) -> None:
        whole = whole or not self.sparse
        for layer, budget in zip(self.layers, self.budgets, strict=True):
            layer.top_k = layer.slots if whole else min(budget, layer.slots)
            layer.semantics = "reach" if whole else self.model.sam_config.semantics

    def mean_over_group(self, losses: list[float]) -> list[float]:
        """Of the whole batches, from those of this rank's shares."""
        if len(self.group.ranks) == 1:
            return losses
        total = torch.tensor(losses, device=self.engine.device)
        dist.all_reduce(total, group=self.group.group)
        return (total / len(self.group.ranks)).tolist()

    def read(self, held: Sequence[Sequence[int]]) -> dict[Unit, Tensor]:
        """The units as they are now."""
        return read_units(self.fields, self.shared, EngineParameters(self.engine), held)

    def counters(self) -> list[NDArray[np.int64]]:
        """Per layer (3, S, S): used, offered, together, summed over the group; empty where nothing was routed."""
        if not self.sparse:
            return []
        counts = []
        for layer in self.layers:
            seen = layer.counters
            assert seen is not None, "load sets them"
            counts.append(torch.stack([seen.used_SS, seen.offered_SS, seen.together_SS]))
        if len(self.group.ranks) > 1:
            for value in counts:
                dist.all_reduce(value, group=self.group.group)
        return [value.cpu().numpy() for value in counts]

    @torch.no_grad()
    def describe(self, ids_BS: Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean gate scores and full-graph visit rates of all E experts, (L, E) each, on a client's text, seen
        through the experts used most on calibration text: what the tier's memory allows."""
        self._enter()
        most_used = tuple(tuple(range(layer.slots)) for layer in self.layers)
        hold_experts(self.layers, self.store.core, most_used)
        write_parameters(self.engine, self._untrained(most_used))
        self._visit(whole=False)
        self.engine.eval()
        scores_LE, rates_LE = describe_text(
            self.layers, self.store.wg, self.budgets,
            lambda: self.engine(input_ids=ids_BS.to(self.engine.device), use_cache=False),
        )  # fmt: skip
        return scores_LE.numpy(), rates_LE.numpy()

    def _untrained(self, held: Sequence[Sequence[int]]) -> Iterator[tuple[str, Tensor]]:
        """What training changes, as it was before any; the experts' own weights, before any of this generation."""
        yield from self._experts(held, self.weights)
        weights = {field.parameter for field in self.weights}
        for name in sorted({field.parameter for field in self.fields} | set(self.shared.values())):
            path, _, parameter = name.rpartition(".sam.")
            if parameter == "wg":
                index = self._paths.index(path)
                yield name, self.store.wg[index][: self.layers[index].slots]
            elif ".lora." in name or parameter == "gain_SE":
                yield name, torch.zeros(self._shapes[name])
            elif name not in weights and name in self.checkpoint:
                yield name, self.checkpoint.read(name)

    def close(self) -> None:
        """Free the engine's hooks and buffers."""
        self.engine.destroy()


def no_counts(slots: int, device: torch.device | str = "cpu") -> Counters:
    """Counters at zero."""
    empty = torch.zeros(slots, slots, dtype=torch.int64, device=device)
    return Counters(used_SS=empty, offered_SS=empty, together_SS=empty)
