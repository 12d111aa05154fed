"""Zero-shot: a graph and a subset of experts for a text that nobody trained on.

The assembler knows a text by its mean gate scores; from them, the graph of the text, and from how often the text
reaches each expert over that graph, the experts that its owner should hold. Whoever wants to know a client's or a
domain's text asks here.

Legend: L layers, E experts a layer, T tokens, B rows, S tokens a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.inputs import check_text
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import SamMixin
from sam_ds.graph.assembler import client_condition, hard_graph
from sam_ds.graph.dag import reach_mass
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
    """Experts to hold in each layer, ascending, the roots first."""


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


def _described(model: SamMixin, ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """As `describe_text`, of a model that holds all experts. Raises InputError as `check_text` does."""
    check_text(model, [ids_BS], what="text")
    device = next(model.parameters()).device

    def read() -> None:
        for rows_BS in ids_BS.split(_BATCH):
            model(input_ids=rows_BS.to(device), use_cache=False)

    layers, training = model.sam_layers, model.training
    model.eval()
    try:
        gates, budgets = [layer.sam.wg.float() for layer in layers], [layer.top_k for layer in layers]
        return describe_text(layers, gates, budgets, read)
    finally:
        model.train(training)


@torch.no_grad()
def text_condition(model: SamMixin, ids_BS: Tensor) -> Tensor:
    """(L, E + 1) what the assembler of a model that holds all experts knows of a text (B, S)."""
    return client_condition(_described(model, ids_BS)[0], 1.0)


@torch.no_grad()
def personal_graph(
    model: PreTrainedModel, ids_BS: Tensor, *, edges: int, experts: int | None = None
) -> PersonalGraph:
    """The best `edges` of the model's graph a layer for a text (B, S), and the `experts` a layer that it reaches most
    (None: all). A couple of thousand tokens are what a client registers with. Nothing is trained.

    Raises InputError: a model that is not converted or has no assembler, no tokens or some outside the vocabulary,
    fewer edges than experts beside the roots, fewer experts than roots or more than there are.
    """
    if not isinstance(model, SamMixin):
        raise InputError("the model is not converted: it has no graph; convert it with get_sam_model")
    if model.sam_assembler is None:
        raise InputError("the model has no assembler: a federation with method = 'sam' trains one and saves it in its "
                         "model folder")  # fmt: skip
    config = model.sam_config
    experts = config.num_experts if experts is None else experts
    if not config.roots <= experts <= config.num_experts:
        raise InputError(f"experts must be from roots={config.roots} to num_experts={config.num_experts}, "
                         f"got {experts}")  # fmt: skip
    if edges < config.num_experts - config.roots:
        raise InputError(f"edges must be at least {config.num_experts - config.roots}, one into each expert beside "
                         f"the roots, got {edges}")  # fmt: skip
    scores_LE, rates_LE = _described(model, ids_BS)
    condition = client_condition(scores_LE, experts / config.num_experts)
    graph_LEE = hard_graph(model.sam_assembler, condition, model.graph().numpy(), edges, config.roots)
    held = []
    for mask_EE, rates_E in zip(graph_LEE, rates_LE.double().numpy(), strict=True):
        reach_E = reach_mass(mask_EE, rates_E, config.roots)
        # Roots are reached by every token, but another expert may be too.
        reach_E[: config.roots] = 2.0
        held.append(tuple(sorted(np.argsort(-reach_E, kind="stable")[:experts].tolist())))
    return PersonalGraph(condition=condition, graph_LEE=torch.from_numpy(graph_LEE), held=tuple(held))
