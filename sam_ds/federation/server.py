"""The server's model and what it does with it: hold the units, evaluate, judge edits, save.

The server has all experts. Its model is the converted model, with low-rank rows where the method trains those;
`state.units` is the truth, the model's parameters follow it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sam_ds.clients.generations import factor_seed, generation, weights_folder
from sam_ds.clients.tiers import dealt_tiers
from sam_ds.config import RunConfig
from sam_ds.data.batches import pack
from sam_ds.data.corpus import Corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import headline, perplexity_by_domain
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.model import add_assembler
from sam_ds.experts.slots import Checkpoint
from sam_ds.experts.units import (
    expert_weights,
    prepare,
    read_units,
    shared_parameters,
    trained_fields,
    write_units,
)
from sam_ds.federation.methods.base import Method
from sam_ds.federation.participation import Member
from sam_ds.federation.state import ServerState, sync
from sam_ds.graph.assembler import Assembler
from sam_ds.wire.payload import ExpertUnit, Unit

_VALIDATION_ROWS = 8


class Server:
    """Owns the state. Everything here runs on one rank, in one thread."""

    def __init__(self, config: RunConfig, base: Path, corpus: Corpus, method: Method) -> None:
        self.config = config
        self.corpus = corpus
        self.method = method
        self.tiers = dealt_tiers(config)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = from_pretrained(base, dtype=torch.float32).eval()
        add_assembler(self.model, seed=config.seed)
        trains = {method.train(config.tiers[name]) for name in self.tiers}
        if len(trains) > 1:
            raise InputError(f"tiers train {' and '.join(sorted(trains))}: updates of different kinds cannot be "
                             "averaged; give every tier the same `trains`")  # fmt: skip
        self.trains = trains.pop()
        self._base = base
        self._begin(0)
        self.layers, self.num_experts = len(self.model.sam_layers), config.sam.num_experts
        self._everything = [tuple(range(self.num_experts))] * self.layers
        self._fields = trained_fields(self.model, self.trains)
        self._shared = shared_parameters(self.model, self.trains, dense=config.train.dense)
        self.state = self._first_state()
        self.evaluation_seconds = 0.0
        """Spent in evaluations since the process started."""

    def _first_state(self) -> ServerState:
        clients = self.config.federation.clients
        per_expert = (clients, self.layers, self.num_experts)
        per_edge = (self.layers, self.num_experts, self.num_experts)
        units = read_units(self._fields, self._shared, self._parameters, self._everything)
        return ServerState(
            round=0, units={unit: value.numpy() for unit, value in units.items()}, graph=self.model.graph().numpy(),
            scores=np.zeros(per_expert, np.float32), rates=np.zeros(per_expert, np.float32),
            examples=np.zeros(clients, np.int64), used=np.zeros(per_edge, np.int64),
            offered=np.zeros(per_edge, np.int64), together=np.zeros(per_edge, np.int64),
            used_total=np.zeros(per_edge, np.int64), ever_held=np.zeros(per_expert, bool),
            factor_seed=factor_seed(self.config, 0) if self.trains.startswith("lora") else None,
        )  # fmt: skip

    def members(self) -> list[Member]:
        """The population as participation needs it."""
        return [
            Member(client, tier, int(examples))
            for client, (tier, examples) in enumerate(zip(self.tiers, self.state.examples, strict=True))
        ]

    def units_for(self, held: Sequence[Sequence[int]]) -> dict[Unit, NDArray[np.float32]]:
        """The units that a client with these experts starts from, and answers deltas of."""
        holds = [set(experts) for experts in held]
        return {
            unit: value
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
        """Go on from a checkpoint. Raises InputError if it is of another model or method."""
        mine, given = self.state.units, state.units
        if mine.keys() != given.keys() or any(mine[u].shape != given[u].shape for u in mine):
            raise InputError("the checkpoint holds other tensors than this model and method train; resume with the "
                             "run's own configuration")  # fmt: skip
        if due := generation(self.config, state.round + 1):
            stored = Checkpoint(weights_folder(self._base, due))
            with torch.no_grad():
                for name in self._expert_weights():
                    self._parameters[name].copy_(stored.read(name))
            self._begin(due)
        self.state = state
        self.follow_state()

    def redraw(self) -> None:
        """End a generation after the round that is finished: add the low-rank rows to the weights, put these where the
        clients find them, and begin anew with other frozen factors. The function of the model stays the same."""
        due = generation(self.config, self.state.round + 1)
        self.model.fold_lora()
        target = weights_folder(self._base, due)
        unfinished = target.with_name(f".{target.name}")
        unfinished.mkdir(parents=True, exist_ok=True)
        weights = {name: self._parameters[name].detach() for name in self._expert_weights()}
        save_file(weights, unfinished / "model.safetensors")
        sync(unfinished / "model.safetensors", unfinished)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(unfinished, target)
        # Before the checkpoint that goes on from it.
        sync(target.parent)
        self._begin(due)
        state = self.state
        state.factor_seed = factor_seed(self.config, due)
        for unit, value in state.units.items():
            if isinstance(unit, ExpertUnit) and unit.tensor.endswith("_rows"):
                state.units[unit] = np.zeros_like(value)
                state.moments.pop(unit, None)
        state.downloads += int(state.ever_held.sum())
        state.ever_held[:] = False

    def _begin(self, due: int) -> None:
        """Let train what the method trains, with the frozen factors of a generation."""
        settings = self.config.train
        prepare(
            self.model, self.trains, rank=settings.lora_rank, alpha=settings.lora_alpha,
            seed=factor_seed(self.config, due), dense=settings.dense,
        )  # fmt: skip
        self._parameters = dict(self.model.named_parameters())

    def _expert_weights(self) -> list[str]:
        return [field.parameter for field in expert_weights(self.model)]

    def follow_state(self) -> None:
        """Bring the model's parameters and graph to what the state says."""
        units = {unit: torch.from_numpy(value) for unit, value in self.state.units.items()}
        write_units(units, self._fields, self._shared, self._parameters, self._everything)
        self.model.set_graph(torch.from_numpy(self.state.graph))

    def assembler(self) -> Assembler:
        """The shared assembler as it is now."""
        assert self.model.sam_assembler is not None
        return self.model.sam_assembler

    def evaluate(self, split: str, tokens: int) -> dict[str, Any]:
        """Perplexities of the merged model and, if asked for, of the sparse one over the server's graph:
        {"merged": {"domains", "headline", "forgetting"}, "sparse": the same or None}."""
        began = time.perf_counter()
        texts = {name: getattr(splits, split) for name, splits in self.corpus.domains.items()}
        result: dict[str, Any] = {"merged": self._score(texts, tokens, self.model.dense()), "sparse": None}
        if self.config.evaluation.sparse and self.method.sparse:
            result["sparse"] = self._score(texts, tokens, self.model.active(self.config.sam.top_k))
        self.evaluation_seconds += time.perf_counter() - began
        return result

    def _score(
        self, texts: dict[str, Sequence[str]], tokens: int, mode: AbstractContextManager[None]
    ) -> dict[str, Any]:
        section = self.config.evaluation
        with mode:
            scores = perplexity_by_domain(
                self.model, self.tokenizer, texts, window=section.window, stride=section.stride,
                batch=section.batch, max_tokens=tokens,
            )  # fmt: skip
        forgetting = [name for name in texts if name in self.config.federation.forgetting]
        trained = [name for name in texts if name not in forgetting]
        return {
            "domains": {name: score.perplexity for name, score in scores.items()},
            "headline": headline(scores, trained),
            "forgetting": headline(scores, forgetting) if forgetting else None,
        }

    @torch.no_grad()
    def validation_loss(self, graph: NDArray[np.bool_]) -> float:
        """Nats a token of the sparse model over this graph, on a fixed batch of public text."""
        began = time.perf_counter()
        before = self.model.graph()
        self.model.set_graph(torch.from_numpy(graph))
        ids = self._validation_rows
        loss = float(self.model(input_ids=ids, labels=ids, use_cache=False).loss)
        self.model.set_graph(before)
        self.evaluation_seconds += time.perf_counter() - began
        return loss

    @cached_property
    def _validation_rows(self) -> torch.Tensor:
        return torch.from_numpy(public_rows(self.config, self.corpus, self.tokenizer, _VALIDATION_ROWS, last=True))

    def save_model(self, folder: Path) -> None:
        """Fold everything learned into the weights and save them with the graph. The last thing a run does.

        Messages cannot be folded: their gains are saved beside, and are what a plain load of the folder leaves out.
        """
        self.model.fold_lora()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def public_rows(
    config: RunConfig, corpus: Corpus, tokenizer: Any, rows: int, *, last: bool = False
) -> NDArray[np.int64]:
    """(rows, window) tokens of public text, the same share of every domain; from the start of the public
    documents (calibration) or from their end (validation). Domains without public documents give of their valid
    split.

    Raises InputError where there is too little text.
    """
    window = config.evaluation.window
    per_domain = max(1, -(-rows // len(corpus.domains)))
    parts = []
    for splits in corpus.domains.values():
        texts = splits.public or splits.valid
        packed = pack(texts[::-1] if last else texts, tokenizer, window, limit_tokens=per_domain * window)
        parts.append(packed[:per_domain])
    return np.concatenate(parts)[: max(rows, len(corpus.domains))]
