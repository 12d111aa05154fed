"""SAM: subsets of experts drawn by the reach of each client's own graph, unbiased aggregation, topology edits.

Design 5, 7, 8, 9; the founding document's roadmap (assembler, sparse routing, 1/p aggregation, graph adaptation).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_ds.config import RunConfig, TierSection
from sam_ds.federation.aggregation import AggregationConfig
from sam_ds.federation.methods.base import Method, Planned, aggregation_config
from sam_ds.federation.participation import plan_round, sample_clients
from sam_ds.federation.server import Server
from sam_ds.graph.assembler import client_condition, hard_graph
from sam_ds.graph.dag import explore, reach_mass
from sam_ds.graph.edits import propose, trial

_EXPLORE = 3
"""Keeps the generator of exploration apart from those of participation (1, 2)."""


def _plan(server: Server, round_: int) -> Planned:
    config, state = server.config, server.state
    section = config.federation
    layers, num_experts, _ = state.graph.shape
    members = server.members()
    drawn, _ = sample_clients(
        config.seed, round_, clients=len(members), per_round=section.clients_per_round, scheme=section.sampling
    )  # fmt: skip
    graphs, conditions = {}, {}
    scores_NLE = np.zeros((len(members), layers, num_experts))
    for client in map(int, drawn):
        conditions[client] = condition_of(server, client)
        graphs[client] = assemble(server, conditions[client], (config.seed, round_, client))
        if section.score == "usage":
            scores_NLE[client] = state.rates[client]
        elif section.score == "reach":
            for layer in range(layers):
                scores_NLE[client, layer] = reach_mass(
                    graphs[client][layer], state.rates[client, layer].astype(np.float64), config.sam.roots
                )
    plan = plan_round(
        config.seed, round_, members, {name: [tier.experts] * layers for name, tier in config.tiers.items()},
        layers=layers, num_experts=num_experts, roots=config.sam.roots, per_round=section.clients_per_round,
        scheme=section.sampling, floor=section.floor, scores_NLE=scores_NLE,
        sends={name: tier.sends for name, tier in config.tiers.items() if tier.sends},
    )  # fmt: skip
    return Planned(plan=plan, graphs=graphs, conditions=conditions)


def condition_of(server: Server, client: int) -> NDArray[np.float32]:
    """(L, E + 1) what the assembler knows of a client: its mean gate scores and its tier's budget."""
    tier = server.config.tiers[server.tiers[client]]
    share = tier.experts / server.config.sam.num_experts
    return client_condition(torch.from_numpy(server.state.scores[client]), share).numpy()


def assemble(server: Server, condition: NDArray[np.float32], seed: tuple[int, ...]) -> NDArray[np.bool_]:
    """(L, E, E) the client's graph in a round: the assembler's, some edges flipped to explore."""
    section, roots, allowed_LEE = server.config.federation, server.config.sam.roots, server.state.graph
    hard_LEE = hard_graph(server.assembler(), torch.from_numpy(condition), allowed_LEE, section.edges, roots)
    masks = []
    for layer, (mask_EE, allowed_EE) in enumerate(zip(hard_LEE, allowed_LEE, strict=True)):
        rng = np.random.default_rng([_EXPLORE, *seed, layer])
        masks.append(explore(mask_EE, allowed_EE, section.explore, rng, section.edges, roots))
    return np.stack(masks)


def _train(tier: TierSection) -> str:
    return tier.trains


def _aggregate(config: RunConfig) -> AggregationConfig:
    return aggregation_config(config, rule=config.federation.aggregation)


def _adapt(server: Server, round_: int) -> dict[str, Any]:
    """Every T_m rounds: edit the graph, then fit the stand-ins to what the experts have become."""
    section = server.config.federation
    if round_ % section.edit_every:
        return {}
    record = _edit(server) if section.max_edits else {}
    if section.refit_standins:
        record["standin_seconds"] = server.refit_standins()
    return record


def _edit(server: Server) -> dict[str, Any]:
    """Propose edits from the counters, keep those that the validation loss does not refuse."""
    section, state = server.config.federation, server.state
    edits = propose(
        state.graph, state.used, state.offered, state.together, roots=server.config.sam.roots,
        max_edits=section.max_edits, min_offered=section.min_offered,
    )  # fmt: skip
    result = trial(state.graph, edits, server.validation_loss, section.edit_tolerance)
    state.graph = result.graph_LEE
    state.gamma = max(state.gamma, result.gamma)
    for counters in (state.used, state.offered, state.together):
        counters[:] = 0
    server.model.set_graph(torch.from_numpy(result.graph_LEE))
    kept = set(result.kept)
    return {
        "edits": [
            {"layer": edit.layer, "tail": edit.tail, "head": edit.head, "kind": edit.kind, "kept": edit in kept,
             "change": change}
            for edit, change in zip(edits, result.changes, strict=True)
        ],
        "gamma": result.gamma,
    }  # fmt: skip


METHOD = Method(plan=_plan, train=_train, aggregate=_aggregate, adapt=_adapt, sparse=True, assembles=True)
