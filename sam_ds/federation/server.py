"""The server's model and what it does with it: hold the units, evaluate, judge edits, save.

The server has all experts. Its model is the converted model, with low-rank rows where the method trains those;
`state.units` is the truth, the model's parameters follow it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoTokenizer

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.generations import factor_seed, generation, weights_folder
from sam_ds.clients.task import REGISTRATION_TOKENS
from sam_ds.config import RunConfig
from sam_ds.data.batches import pack
from sam_ds.data.corpus import Corpus, Splits
from sam_ds.data.partition import holder
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import DomainScore, headline, perplexity_by_domain
from sam_ds.experts.attention import updated_maps
from sam_ds.experts.calibrate import refit_layer
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.factors import load_factors
from sam_ds.experts.inputs import layer_inputs
from sam_ds.experts.model import add_assembler
from sam_ds.experts.personal import personal_graph
from sam_ds.experts.slots import Checkpoint, hold_experts
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
from sam_ds.federation.state import ServerState, sync, unfinished, writing
from sam_ds.graph.assembler import Assembler, hard_graph
from sam_ds.wire.payload import ExpertUnit, Unit

_VALIDATION_ROWS = 8
Graph: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""(L, E, E) edges, and (L, E + 1) what the assembler knows of the text, whose own gains messages then have."""


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
        """Spent in evaluations since the process started."""

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
        """Go on from a checkpoint. Raises InputError if it is of another model or method."""
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
        self._write(self.state.units)
        self.model.set_graph(torch.from_numpy(self.state.graph))
        if self.state.standins is not None:
            hold_experts(self.model.sam_layers, torch.from_numpy(self.state.standins).unbind(), self._everything)

    def refit_standins(self) -> float:
        """Fit the stand-ins to the experts as they have become, layer by layer on the calibration text, each on what
        the layers before it are now (design 3); returns the seconds it took."""
        began = time.perf_counter()
        layers, cores = self.model.sam_layers, []
        inputs = layer_inputs(self.model, layers, [self._calibration_rows])
        for index, layer in enumerate(layers):
            cores.append(refit_layer(layer, next(inputs), seed=self.config.seed + index))
            hold_experts([layer], cores[-1:], [range(self.num_experts)])
        self.state.standins = torch.stack(cores).numpy()
        return time.perf_counter() - began

    def _write(self, values: Mapping[Unit, NDArray[np.float32]]) -> None:
        units = {unit: torch.from_numpy(value) for unit, value in values.items()}
        write_units(units, self._fields, self._shared, self._parameters, self._everything)

    def assembler(self) -> Assembler:
        """The shared assembler as it is now."""
        assert self.model.sam_assembler is not None
        return self.model.sam_assembler

    def evaluate(self, split: str, tokens: int) -> dict[str, Any]:
        """Perplexities of the merged model and, if asked for, of the sparse one, each domain over its graph:
        {"merged": {"domains", "headline", "forgetting"}, "sparse": the same or None}.

        Where clients have units of their own, the mean over the clients with mostly text of the domain, of all clients
        where there are none."""
        began = time.perf_counter()
        texts = {name: getattr(splits, split) for name, splits in self.corpus.domains.items()}
        whole: dict[str, Graph] = dict.fromkeys(texts, (self.model.graph(), None))
        result: dict[str, Any] = {"merged": self._judged(texts, tokens, self.model.dense, whole), "sparse": None}
        if self.config.evaluation.sparse and self.method.sparse:
            graphs = self.domain_graphs() if self.method.assembles else whole
            routed = partial(self.model.active, self.config.sam.top_k)
            result["sparse"] = self._judged(texts, tokens, routed, graphs)
        self.evaluation_seconds += time.perf_counter() - began
        return result

    def domain_graphs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The graph of each domain: the assembler's for a client that holds everything and whose text is the domain's
        public (or valid) text, as the model sees it now."""
        edges = self.config.federation.edges
        own = {name: personal_graph(self.model, ids, edges=edges) for name, ids in self._domain_ids.items()}
        return {name: (personal.graph_LEE, personal.condition) for name, personal in own.items()}

    @cached_property
    def _domain_ids(self) -> dict[str, torch.Tensor]:
        """(B, S) of every domain, as many tokens as a client registers with."""
        window = self.config.evaluation.window
        rows = max(1, REGISTRATION_TOKENS // window)
        return {
            name: torch.from_numpy(domain_rows(splits, self.tokenizer, window, rows))
            for name, splits in self.corpus.domains.items()
        }

    def _judged(
        self, texts: Mapping[str, Sequence[str]], tokens: int, mode: Callable[[], AbstractContextManager[None]],
        graphs: Mapping[str, Graph],
    ) -> dict[str, Any]:  # fmt: skip
        if not self.state.personal:
            return self._summary(self._score(texts, tokens, mode, graphs))
        now = [self.domains[self.holder(client, self.state.round)] for client in range(len(self.domains))]
        judges = {name: [c for c, domain in enumerate(now) if domain == name] for name in texts}
        sums = {name: DomainScore(nll_sum=0.0, tokens=0) for name in texts}
        for client in range(len(self.domains)):
            mine = {name: text for name, text in texts.items() if client in (judges[name] or [client])}
            self._write(self.state.units | self.state.personal.get(client, {}))
            for name, score in self._score(mine, tokens, mode, graphs).items():
                sums[name] = DomainScore(
                    nll_sum=sums[name].nll_sum + score.nll_sum, tokens=sums[name].tokens + score.tokens
                )
        self.follow_state()
        return self._summary(sums)

    def _score(
        self, texts: Mapping[str, Sequence[str]], tokens: int, mode: Callable[[], AbstractContextManager[None]],
        graphs: Mapping[str, Graph],
    ) -> dict[str, DomainScore]:  # fmt: skip
        section = self.config.evaluation
        scores: dict[str, DomainScore] = {}
        for name, own in texts.items():
            with mode(), self.model.over(*graphs[name]):
                scores |= perplexity_by_domain(
                    self.model, self.tokenizer, {name: own}, window=section.window, stride=section.stride,
                    batch=section.batch, max_tokens=tokens,
                )  # fmt: skip
        return scores

    def _summary(self, scores: Mapping[str, DomainScore]) -> dict[str, Any]:
        texts = self.corpus.domains
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
        ids = self._validation_rows
        with self.model.over(torch.from_numpy(graph)):
            loss = float(self.model(input_ids=ids, labels=ids, use_cache=False).loss)
        self.evaluation_seconds += time.perf_counter() - began
        return loss

    def loss_in_use(self) -> Callable[[NDArray[np.bool_]], float]:
        """(L, E, E) -> nats a token of the sparse model where every domain routes over its own edges of that graph, and
        sends messages with its own gains, as clients do: what an edit of the graph is judged by. On a fixed batch of
        every domain's public (or valid) text."""
        section, roots, began = self.config.federation, self.config.sam.roots, time.perf_counter()
        conditions = {name: condition for name, (_, condition) in self.domain_graphs().items()}
        self.evaluation_seconds += time.perf_counter() - began

        @torch.no_grad()
        def loss(graph_LEE: NDArray[np.bool_]) -> float:
            began, losses = time.perf_counter(), []
            for name, ids in self._validation_by_domain.items():
                own_LEE = hard_graph(self.assembler(), conditions[name], graph_LEE, section.edges, roots)
                with self.model.over(torch.from_numpy(own_LEE), conditions[name]):
                    losses.append(float(self.model(input_ids=ids, labels=ids, use_cache=False).loss))
            self.evaluation_seconds += time.perf_counter() - began
            return float(np.mean(losses))

        return loss

    @cached_property
    def _validation_by_domain(self) -> dict[str, torch.Tensor]:
        rows = max(1, _VALIDATION_ROWS // len(self.corpus.domains))
        return {
            name: torch.from_numpy(domain_rows(splits, self.tokenizer, self.config.evaluation.window, rows, last=True))
            for name, splits in self.corpus.domains.items()
        }

    @cached_property
    def _validation_rows(self) -> torch.Tensor:
        return torch.from_numpy(public_rows(self.config, self.corpus, self.tokenizer, _VALIDATION_ROWS, last=True))

    @cached_property
    def _calibration_rows(self) -> torch.Tensor:
        return torch.from_numpy(calibration_rows(self.config, self.corpus, self.tokenizer))

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


def calibration_rows(config: RunConfig, corpus: Corpus, tokenizer: Any) -> NDArray[np.int64]:
    """(rows, window): what the base model is converted with, as `public_rows`."""
    return public_rows(config, corpus, tokenizer, -(-config.sam.calibration_tokens // config.evaluation.window))


def public_rows(
    config: RunConfig, corpus: Corpus, tokenizer: Any, rows: int, *, last: bool = False
) -> NDArray[np.int64]:
    """(rows, window) tokens of public text, the same share of every domain; from the start of the public
    documents (calibration) or from their end (validation).

    Raises InputError where there is too little text.
    """
    per_domain = max(1, -(-rows // len(corpus.domains)))
    parts = [
        domain_rows(splits, tokenizer, config.evaluation.window, per_domain, last=last)
        for splits in corpus.domains.values()
    ]
    return np.concatenate(parts)[: max(rows, len(corpus.domains))]


def domain_rows(
    splits: Splits, tokenizer: Any, window: int, rows: int, *, last: bool = False
) -> NDArray[np.int64]:
    """At most (rows, window) tokens of a domain's public documents, or of its valid split where it has none."""
    texts = splits.public or splits.valid
    return pack(texts[::-1] if last else texts, tokenizer, window, limit_tokens=rows * window)
