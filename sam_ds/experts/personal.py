"""Zero-shot: a graph and a subset of experts for a text that nobody trained on.

The assembler knows a text by its mean gate scores; from them, the graph of the text. Which experts it should be routed
over the text's own loss says, which needs no labels: on a text unlike all that trained them, some do harm. Chosen by
how often the text reaches them, as participation draws them, they are hardly better than those of other texts
(examples/benchmarks/federation.md). Whoever wants to know a client's or a domain's text asks here.

Legend: L layers, E experts a layer, T tokens, B rows, S tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.inputs import check_text
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import SamMixin
from sam_ds.graph.assembler import client_condition, hard_graph
from sam_ds.graph.dag import contract
from sam_ds.graph.route import route

_BATCH = 8
"""Rows a forward pass."""


@dataclass(frozen=True, kw_only=True)
class PersonalGraph:
    """What the assembler makes of a text: `with model.over(own.graph_LEE, own.condition)` computes with it."""

    condition: Tensor
    """(L, E + 1) what it knows of the text; with it, messages have the text's own gains."""
    graph_LEE: Tensor
    """(L, E, E) bool on the CPU, for `set_graph`: at most B edges a layer."""
    held: tuple[tuple[int, ...], ...]
    """Experts to hold in each layer, ascending, the roots first; `holding` computes over them alone."""


@torch.no_grad()
def describe_text(
    layers: Sequence[SamFFN], gates: Sequence[Tensor], budgets: Sequence[int], read: Callable[[], object]
) -> tuple[Tensor, Tensor]:
    """Mean gate scores and visit rates over the full graph, (L, E) each on the CPU, of the tokens that `read` runs
    through the model, which is routed over the full graph meanwhile.

    The layers may hold some experts only: `gates` are the gate rows (E, F) of all, `budgets` the experts that a token
    visits of them.
    """
    scores = [torch.zeros(len(gate)) for gate in gates]
    visits = [torch.zeros(len(gate)) for gate in gates]
    tokens = [0] * len(layers)

    def look(index: int, x_Td: Tensor) -> None:
        layer = layers[index]
        score_TE = F.linear(layer.gate_features(x_Td), gates[index].to(x_Td.device))
        full_EE = torch.ones(score_TE.shape[1], score_TE.shape[1], dtype=torch.bool, device=x_Td.device).triu(1)
        routing = route(score_TE, full_EE, roots=layer.roots, k=budgets[index])
        scores[index] += score_TE.sum(0).cpu()
        visits[index] += routing.visited_TS.float().sum(0).cpu()
        tokens[index] += len(x_Td)

    before = [(layer.counters, layer.semantics, layer.sam.adjacency_SS.clone()) for layer in layers]
    handles = []
    for index, layer in enumerate(layers):
        layer.counters = None
        # Gains of edges that are not the model's would be sent along too.
        layer.semantics = "reach"
        layer.sam.adjacency_SS.fill_(True).triu_(1)
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, index=index: look(index, args[0].flatten(0, -2)))
        )
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
        for layer, (counters, semantics, adjacency_SS) in zip(layers, before, strict=True):
            layer.counters, layer.semantics = counters, semantics
            layer.sam.adjacency_SS.copy_(adjacency_SS)
    count_L1 = torch.tensor(tokens)[:, None]
    return torch.stack(scores) / count_L1, torch.stack(visits) / count_L1


def _mean_scores(model: SamMixin, ids_BS: Tensor) -> Tensor:
    """(L, E) as `describe_text`, of a model that holds all experts. Raises InputError as `check_text` does."""
    check_text(model, [ids_BS], what="text")
    device = next(model.parameters()).device

    def read() -> None:
        for rows_BS in ids_BS.split(_BATCH):
            model(input_ids=rows_BS.to(device), use_cache=False)

    with _evaluating(model):
        layers = model.sam_layers
        gates, budgets = [layer.sam.wg.float() for layer in layers], [layer.top_k for layer in layers]
        return describe_text(layers, gates, budgets, read)[0]


@contextmanager
def _evaluating(model: SamMixin) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def holding(layer: SamFFN, experts: Sequence[int]) -> Iterator[None]:
    """Compute inside the block as a client does that holds only these experts of the layer, ascending with the roots
    first: over the paths among them, with stand-ins for the others."""
    before_EE = layer.sam.adjacency_SS.clone()
    among_SS = torch.from_numpy(contract(before_EE.cpu().numpy(), experts)).to(before_EE.device)
    rows_S = torch.as_tensor(list(experts), device=before_EE.device)
    layer.sam.adjacency_SS.zero_()
    layer.sam.adjacency_SS[rows_S[:, None], rows_S] = among_SS
    try:
        yield
    finally:
        layer.sam.adjacency_SS.copy_(before_EE)


def _chosen(model: SamMixin, ids_BS: Tensor, experts: int) -> list[tuple[int, ...]]:
    """Of each layer the roots and others, at most `experts` in all: the best ones, and so many, in every layer the same
    number, that the loss of the text is lowest. An expert is as good as it makes the loss where its layer holds the
    roots and it alone. Takes L (E - r) passes for that and one for each number."""
    layers, roots, num_experts = model.sam_layers, model.sam_config.roots, model.sam_config.num_experts
    every = [range(num_experts)] * len(layers)

    def loss(held: Sequence[Sequence[int]]) -> float:
        with ExitStack() as holds:
            for layer, own in zip(layers, held, strict=True):
                holds.enter_context(holding(layer, own))
            return sum(
                len(rows_BS) * float(model(input_ids=rows_BS, labels=rows_BS, use_cache=False).loss)
                for rows_BS in ids_BS.split(_BATCH)
            )  # fmt: skip

    best = []
    for index in tqdm(range(len(layers)), desc="experts", unit="layer", leave=False, disable=None):
        with_it = {
            expert: loss([*every[:index], [*range(roots), expert], *every[index + 1 :]])
            for expert in range(roots, num_experts)
        }
        best.append(sorted(with_it, key=with_it.__getitem__))
    counts = range(min(1, experts - roots), experts - roots + 1)
    candidates = [[(*range(roots), *sorted(order[:count])) for order in best] for count in counts]
    return min(candidates, key=loss)


@torch.no_grad()
def text_condition(model: SamMixin, ids_BS: Tensor) -> Tensor:
    """(L, E + 1) what the assembler of a model that holds all experts knows of a text (B, S)."""
    return client_condition(_mean_scores(model, ids_BS), 1.0)


@torch.no_grad()
def personal_graph(
    model: PreTrainedModel, ids_BS: Tensor, *, edges: int, experts: int | None = None
) -> PersonalGraph:
    """The best `edges` of the model's graph a layer for a text (B, S), and the experts to hold: all (None), or the at
    most `experts` a layer over which the text's loss is lowest, for which the model reads the text some L E times. A
    couple of thousand tokens are enough if they are typical: from many places. Nothing is trained.

    Raises InputError: a model that is not converted or has no assembler, no tokens or some outside the vocabulary,
    fewer edges than experts beside the roots, fewer experts than roots or more than there are.
    """
    if not isinstance(model, SamMixin):
        raise InputError("the model is not converted: it has no graph; convert it with get_sam_model")
    if model.sam_assembler is None:
        raise InputError("the model has no assembler: a federation with method = 'sam' trains one and saves it in its "
                         "model folder")  # fmt: skip
    config = model.sam_config
    budget = config.num_experts if experts is None else experts
    if not config.roots <= budget <= config.num_experts:
        raise InputError(f"experts must be from roots={config.roots} to num_experts={config.num_experts}, "
                         f"got {experts}")  # fmt: skip
    if edges < config.num_experts - config.roots:
        raise InputError(f"edges must be at least {config.num_experts - config.roots}, one into each expert beside "
                         f"the roots, got {edges}")  # fmt: skip
    condition = client_condition(_mean_scores(model, ids_BS), budget / config.num_experts)
    graph_LEE = torch.from_numpy(
        hard_graph(model.sam_assembler, condition, model.graph().numpy(), edges, config.roots)
    )  # fmt: skip
    held = [tuple(range(config.num_experts))] * len(model.sam_layers)
    if experts is not None:
        with _evaluating(model), model.over(graph_LEE, condition):
            held = _chosen(model, ids_BS.to(next(model.parameters()).device), experts)
    return PersonalGraph(condition=condition, graph_LEE=graph_LEE, held=tuple(held))
