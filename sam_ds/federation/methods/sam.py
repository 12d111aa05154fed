"""SAM: subsets of experts drawn by the reach of each client's own graph, unbiased aggregation, topology edits.

Four parts: the assembler, routing over a sparse graph, aggregation by 1/p, and a graph that adapts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sam_ds.config import RunConfig, TierSection
from sam_ds.federation.aggregation import AggregationConfig
from sam_ds.federation.judging import loss_in_use
from sam_ds.federation.methods.base import Method, Planned, aggregation_config
from sam_ds.federation.participation import plan_round, sample_clients
from sam_ds.federation.privacy import note_release
from sam_ds.federation.scores import anchored, desirability, greedy
from sam_ds.federation.server import Server
from sam_ds.graph.assembler import client_condition, hard_graph
from sam_ds.graph.dag import explore, reach_mass
from sam_ds.graph.edits import propose, trial
from sam_ds.graph.privacy import noised_counters

_EXPLORE = 3
"""Keeps the generator of exploration apart from those of participation (1, 2)."""


def _plan(server: Server, round_: int) -> Planned:
    config, state = server.config, server.state
    section = config.federation
    layers, num_experts, _ = state.graph.shape
    seed = server.draw_seed()
    members = server.members()
    drawn, _ = sample_clients(
        seed, round_, tiers=[member.tier for member in members], per_round=server.per_round, scheme=section.sampling
    )  # fmt: skip
    conditions = {client: condition_of(server, client) for client in (members[position].client for position in drawn)}
    graphs = {
        client: assemble(server, condition, (seed, round_, client)) for client, condition in conditions.items()
    }
    plan = plan_round(
        seed, round_, members, {name: [tier.experts] * layers for name, tier in config.tiers.items()},
        layers=layers, num_experts=num_experts, roots=config.sam.roots, per_round=server.per_round,
        scheme=section.sampling, floor=section.floor_in_force, scores=scores_of(server, graphs),
        sends={name: tier.sends for name, tier in config.tiers.items() if tier.sends},
    )  # fmt: skip
    return Planned(plan=plan, graphs=graphs, conditions=conditions)


def scores_of(server: Server, graphs: Mapping[int, NDArray[np.bool_]]) -> dict[int, NDArray[np.float64]]:
    """Client -> (L, E) what `federation.score` draws its experts by, of the clients with a graph."""
    section, state, roots = server.config.federation, server.state, server.config.sam.roots
    drawn = list(graphs)
    rates_KLE = state.rates[drawn].astype(np.float64)
    scores_KLE = np.zeros_like(rates_KLE)
    match section.score:
        case "usage":
            scores_KLE = rates_KLE
        case "reach":
            for row, graph_LEE in enumerate(graphs.values()):
                for layer, mask_EE in enumerate(graph_LEE):
                    scores_KLE[row, layer] = reach_mass(mask_EE, rates_KLE[row, layer], roots)
        case "fitness":
            scores_KLE = desirability(
                state.fitness[drawn], state.load, roots=roots, fitness_weight=section.fitness_weight,
                load_weight=section.load_weight,
            )  # fmt: skip
        case "greedy":
            budgets = [server.config.tiers[server.tiers[client]].experts for client in drawn]
            scores_KLE = greedy(state.fitness[drawn], budgets, roots)
        case "anchors":
            # The one score of a client that depends on all the others: of those that take part.
            here_N = state.examples > 0
            anchored_NLE = np.zeros(state.rates.shape, bool)
            anchored_NLE[here_N] = anchored(state.rates[here_N].astype(np.float64), roots)
            scores_KLE = np.where(anchored_NLE[drawn], np.inf, rates_KLE)
    return dict(zip(drawn, scores_KLE, strict=True))


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
    record = _edit(server, round_) if section.max_edits else {}
    if section.refit_standins:
        record["standin_seconds"] = server.refit_standins()
    return record


def _edit(server: Server, round_: int) -> dict[str, Any]:
    """Propose edits from the counters, noised if asked for, keep those that the validation loss does not refuse."""
    section, state = server.config.federation, server.state
    tables = [state.used, state.offered, state.together]
    if sigma := section.edit_noise:
        # A client may have been drawn in every round of the period.
        deviation = sigma * section.edit_every * server.config.counter_bound
        tables = noised_counters(tables, deviation, server.draw_seed(), round_)
    note_release(state.released, "edits", sigma, 1.0)
    edits = propose(
        state.graph, *tables, roots=server.config.sam.roots, max_edits=section.max_edits,
        min_offered=section.min_offered,
    )  # fmt: skip
    result = trial(state.graph, edits, loss_in_use(server), section.edit_tolerance)
    state.graph = result.graph_LEE
    state.edits = state.edits.append(round_, result.kept)
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
