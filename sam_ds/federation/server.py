"""The server's model and what becomes of it: hold the units, follow the state, refit, redraw, save.

The server has all experts. Its model is the converted model, with low-rank rows where the method trains those;
`state.units` is the truth, the model's parameters follow it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.generations import factor_seed, generation, weights_folder
from sam_ds.config import RunConfig
from sam_ds.data.partition import holder
from sam_ds.data.splits import Corpus
from sam_ds.errors import InputError
from sam_ds.experts.attention import updated_maps
from sam_ds.experts.calibrate import refit_layer
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.factors import load_factors
from sam_ds.experts.inputs import layer_inputs
from sam_ds.experts.model import add_assembler
from sam_ds.experts.slots import Checkpoint, hold_experts
from sam_ds.experts.units import (
    expert_weights,
    prepare,
    read_units,
    shared_parameters,
    trained_fields,
    write_units,
)
from sam_ds.federation.participation import Member
from sam_ds.federation.public import PublicText
from sam_ds.federation.state import ServerState, sync, unfinished, writing
from sam_ds.graph.assembler import Assembler
from sam_ds.wire.payload import ExpertUnit, Unit

if TYPE_CHECKING:
    from sam_ds.federation.methods.base import Method


class Server:
    """Owns the state. Everything here runs on one rank, in one thread."""

    def __init__(
        self, config: RunConfig, base: Path, corpus: Corpus, method: Method, domains: Sequence[str]
    ) -> None:
        """`domains`: of every client, the one with most of its documents."""
        self.config = config
        self.corpus = corpus
        self.domains = domains
        self.method = method
        self.tiers = dealt_tiers(config)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.public = PublicText(config, corpus, self.tokenizer)
        self.model = from_pretrained(base, dtype=torch.float32).eval()
        add_assembler(self.model, seed=config.seed)
        trains = {method.train(config.tiers[name]) for name in self.tiers}
        if len(trains) > 1:
            raise InputError(f"tiers train {' and '.join(sorted(trains))}: updates of different kinds cannot be "
                             "averaged; give every tier the same `trains`")  # fmt: skip
        self.trains = trains.pop()
        self.base = base
        self.factor_bytes = 0
        """Bytes of the frozen factors that are not drawn: a client needs them once."""
        self._begin(0)
        attention = [f"{path}.weight" for path in updated_maps(self.model)]
        self._merged = [*(field.parameter for field in expert_weights(self.model)), *attention]
        """The weights that a redraw adds low-rank updates to."""
        self.attention_bytes = sum(4 * self._parameters[name].numel() for name in attention)
        """Bytes of those outside the experts, which a client needs once a generation after the first."""
        self.layers, self.num_experts = len(self.model.sam_layers), config.sam.num_experts
        self._everything = [tuple(range(self.num_experts))] * self.layers
        self._fields = trained_fields(self.model, self.trains)
        self._shared = shared_parameters(self.model, self.trains, dense=config.train.dense)
        self.state = self._first_state()
        self.evaluation_seconds = 0.0
        """Spent in evaluations (`judging.py`) since the process started."""

    def _first_state(self) -> ServerState:
        clients = self.config.federation.clients
        per_expert = (clients, self.layers, self.num_experts)
        per_edge = (self.layers, self.num_experts, self.num_experts)
        units = read_units(self._fields, self._shared, self._parameters, self._everything)
        return ServerState(
            round=0, units={unit: value.numpy() for unit, value in units.items()}, graph=self.model.graph().numpy(),
            scores=np.zeros(per_expert, np.float32), rates=np.zeros(per_expert, np.float32),
            examples=np.zeros(clients, np.int64), fitness=np.zeros(per_expert), load=np.zeros(per_expert[1:]),
            used=np.zeros(per_edge, np.int64),
            offered=np.zeros(per_edge, np.int64), together=np.zeros(per_edge, np.int64),
            used_total=np.zeros(per_edge, np.int64), ever_held=np.zeros(per_expert, bool),
            factor_seed=factor_seed(self.config, 0) if self.trains.startswith("lora") else None,
        )  # fmt: skip

    def dealt(self) -> list[tuple[str, int]]:
        """Of every client its tier, and the experts a layer that it can hold."""
        return [(tier, self.config.tiers[tier].experts) for tier in self.tiers]

    def members(self) -> list[Member]:
        """The population as participation needs it: the clients that have registered."""
        return [
            Member(client, tier, int(examples))
            for client, (tier, examples) in enumerate(zip(self.tiers, self.state.examples, strict=True))
            if examples
        ]

    @property
    def per_round(self) -> int:
        """How many of them are drawn a round."""
        return min(self.config.federation.clients_per_round, int(np.count_nonzero(self.state.examples)))

    def draw_seed(self) -> int:
        """What a round's clients and noise are drawn from: the run's seed, or a secret where the run promises privacy
        (`privacy.py`)."""
        return secrets.randbits(128) if self.config.federation.dp_noise else self.config.seed

    def holder(self, client: int, round_: int) -> int:
        """Whose documents a client has in a round."""
        section = self.config.federation
        return holder(client, round_, clients=section.clients, shift_round=section.shift_round)

    def units_for(self, held: Sequence[Sequence[int]], client: int) -> dict[Unit, NDArray[np.float32]]:
        """The units that a client with these experts starts from, and answers deltas of."""
        holds = [set(experts) for experts in held]
        own = self.state.personal.get(client, {})
        return {
            unit: own.get(unit, value)
            for unit, value in self.state.units.items()
            if not isinstance(unit, ExpertUnit) or unit.expert in holds[unit.layer]
        }

    def base_expert_bytes(self) -> int:
        """Bytes of one expert's frozen base weights in one layer, which a client needs once a generation (`lora`)."""
        if self.trains != "lora":
            return 0
        fields = [field for field in expert_weights(self.model) if field.layer == 0]
        return sum(4 * self._parameters[field.parameter].numel() // self.num_experts for field in fields)

    def other_parameters(self) -> int:
        """Parameters outside the feed-forward layers that a token passes through: the embedding table is a look-up, the
        assembler is asked once a client."""
        ffn = {field.parameter for field in expert_weights(self.model)}
        added = (".sam.", ".lora.", "sam_assembler.")
        own = sum(
            p.numel() for name, p in self._parameters.items() if name not in ffn and not any(a in name for a in added)
        )
        tied = self.model.config.tie_word_embeddings
        return own - (0 if tied else self.model.get_input_embeddings().weight.numel())

    def load_state(self, state: ServerState) -> None:
        """Go on from a checkpoint. Raises InputError if it is of another model, method or number of clients."""
        if (clients := len(state.examples)) != len(self.state.examples):
            raise InputError(f"federation.clients = {len(self.state.examples)}, but the checkpoint is of {clients}; "
                             "resume with the run's own")  # fmt: skip
        mine, given = self.state.units, state.units
        if mine.keys() != given.keys() or any(mine[u].shape != given[u].shape for u in mine):
            raise InputError("the checkpoint holds other tensors than this model and method train; resume with the "
                             "run's own configuration")  # fmt: skip
        if due := generation(self.config, state.round + 1):
            stored = Checkpoint(weights_folder(self.base, due))
            with torch.no_grad():
                for name in self._merged:
                    self._parameters[name].copy_(stored.read(name))
            self._begin(due)
        self.state = state
        self.follow_state()

    def redraw(self) -> None:
        """End a generation after the round that is finished: add the low-rank updates to the weights, put these where
        the clients find them, and begin anew with other frozen factors. The function of the model stays the same."""
        due = generation(self.config, self.state.round + 1)
        self.model.fold_lora()
        target = weights_folder(self.base, due)
        weights = {name: self._parameters[name].detach() for name in self._merged}
        with writing(target):
            made = unfinished(target)
            made.mkdir(parents=True)
            save_file(weights, made / "model.safetensors")
            sync(made / "model.safetensors", made)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(made, target)
            # Before the checkpoint that goes on from it.
            sync(target.parent)
        self._begin(due)
        state = self.state
        state.factor_seed = factor_seed(self.config, due)
        fields = [field for field in self._fields if ".lora." in field.parameter]
        shared = {name: parameter for name, parameter in self._shared.items() if ".lora." in parameter}
        for unit, value in read_units(fields, shared, self._parameters, self._everything).items():
            state.units[unit] = value.numpy()
            state.moments.pop(unit, None)
        state.downloads += int(state.ever_held.sum())
        state.ever_held[:] = False

    def _begin(self, due: int) -> None:
        """Let train what the method trains, with the frozen factors of a generation."""
        settings = self.config.train
        prepare(
            self.model, self.trains, rank=settings.lora_rank, alpha=settings.lora_alpha,
            seed=factor_seed(self.config, due), dense=settings.dense, attention_rank=settings.attention_rank,
        )  # fmt: skip
        self._parameters = dict(self.model.named_parameters())
        if due == 0 and self.trains == "lora":
            with torch.no_grad():
                for name, value in load_factors(self.base).items():
                    if name not in self._parameters or self._parameters[name].shape != value.shape:
                        raise InputError(f"the frozen factor {name} of the run's base model is {tuple(value.shape)}: "
                                         "resume with the run's own train.lora_rank and train.attention_rank")
                    self._parameters[name].copy_(value)
                    self.factor_bytes += value.nbytes

    def follow_state(self) -> None:
        """Bring the model's parameters and graph to what the state says."""
        self.write(self.state.units)
        self.model.set_graph(torch.from_numpy(self.state.graph))
        if self.state.standins is not None:
            hold_experts(self.model.sam_layers, torch.from_numpy(self.state.standins).unbind(), self._everything)

    def refit_standins(self) -> float:
        """Fit the stand-ins to the experts as they have become, layer by layer on the calibration text, each on what
        the layers before it are now; returns the seconds it took."""
        began = time.perf_counter()
        layers, cores = self.model.sam_layers, []
        inputs = layer_inputs(self.model, layers, [self.public.calibration])
        for index, layer in enumerate(layers):
            cores.append(refit_layer(layer, next(inputs), seed=self.config.seed + index))
            hold_experts([layer], cores[-1:], [range(self.num_experts)])
        self.state.standins = torch.stack(cores).numpy()
        return time.perf_counter() - began

    def write(self, values: Mapping[Unit, NDArray[np.float32]]) -> None:
        """Give the model's parameters these values, until `follow_state`."""
        units = {unit: torch.from_numpy(value) for unit, value in values.items()}
        write_units(units, self._fields, self._shared, self._parameters, self._everything)

    def assembler(self) -> Assembler:
        """The shared assembler as it is now."""
        assert self.model.sam_assembler is not None
        return self.model.sam_assembler

    def save_model(self, folder: Path) -> None:
        """Fold everything learned into the weights and save them with the graph, whole or not at all. The last thing a
        run does.

        Messages cannot be folded: their gains are saved beside, and are what a plain load of the folder leaves out.
        """
        self.model.fold_lora()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        with writing(folder):
            made = unfinished(folder)
            self.model.save_pretrained(made)
            self.tokenizer.save_pretrained(made)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(made, folder)
