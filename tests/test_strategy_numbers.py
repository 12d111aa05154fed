"""What the server makes of the answers is what the formulas say, whoever is missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from in_process import Federation, first_clients, status

from sam_ds.bench.tampering import crash, scaled, without
from sam_ds.federation.messages import blobs_of
from sam_ds.federation.participation import inclusion_probabilities
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.wire.codec import decode
from sam_ds.wire.payload import ExpertUnit, decode_units


@pytest.mark.parametrize("sends", [{}, {"medium": 4, "large": 5}], ids=["all", "some"])
def test_ht_is_the_formula(federate, sends):
    """delta_u = sum over replies of w_i / p_{i,u} delta_{i,u}, and theta moves by it; p = pi h u for an expert."""
    overrides = [f"tiers.{tier}.sends={count}" for tier, count in sends.items()]
    federation = federate("federation.rounds=1", "federation.clients_per_round=6", *overrides, start=False)
    before = dict(federation.server.state.units)
    federation.start()
    planned = federation.strategy._planned.plan.clients
    examples = federation.server.state.examples
    expected = {unit: value.astype(np.float64) for unit, value in before.items()}
    for client, reply in zip(planned, federation.grid.seen, strict=True):
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = client.pi
            if isinstance(unit, ExpertUnit):
                held = client.experts[unit.layer]
                assert unit.expert in held
                p *= client.h[unit.layer, unit.expert] * sends.get(client.tier, len(held)) / len(held)
            expected[unit] = expected[unit] + examples[client.client] / examples.sum() / p * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-6, atol=1e-7, err_msg=str(unit))
    moved = sum(not np.array_equal(before[u], value) for u, value in federation.server.state.units.items())
    assert moved > 0


@pytest.mark.parametrize("overrides", [
    (), ("method=fedavg",), ("federation.score=anchors", "federation.floor=0.1"), ("federation.sampling=stratified",),
], ids=" ".join)  # fmt: skip
def test_the_estimate_is_of_those_who_registered(federate, overrides):
    """All four of them drawn: Horvitz-Thompson's sum with weights |D_i| over the examples of the four."""
    federation = federate(*overrides, "federation.rounds=1", "federation.clients_per_round=6",
                          "federation.min_clients=4", worker=overrides, start=False)  # fmt: skip
    federation.grid.tamper_query = {2: crash, 5: crash}
    before = dict(federation.server.state.units)
    federation.start()
    planned, examples = federation.strategy._planned.plan.clients, federation.server.state.examples
    assert [client.client for client in planned] == [0, 2, 3, 5] and {client.pi for client in planned} == {1.0}
    expected = {unit: value.astype(np.float64) for unit, value in before.items()}
    for client, reply in zip(planned, federation.grid.seen, strict=True):
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = client.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else client.pi
            expected[unit] = expected[unit] + examples[client.client] / examples[[0, 2, 3, 5]].sum() / p * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-6, atol=1e-7, err_msg=str(unit))


@pytest.mark.parametrize(("rule", "cap"), [("ht", np.inf), ("clipped", 2.5)])
def test_sums_are_scaled_by_the_share_that_answered(federate, rule, cap):
    """The two that answered, weighted by 1 / p, times 3 / 2."""
    client = first_clients(federate(start=False).config)[1]
    federation = federate("federation.rounds=1", f"federation.aggregation={rule}", "federation.clip=2.5",
                          tamper={client: crash})  # fmt: skip
    planned = federation.strategy._planned.plan.clients
    examples = federation.server.state.examples
    first = Federation.of(federation.config, federation.server.base).server
    expected = {unit: value.astype(np.float64) for unit, value in first.state.units.items()}
    for each, reply in zip(planned, federation.grid.seen, strict=True):
        if each.client == client:
            continue
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = each.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else each.pi
            expected[unit] = expected[unit] + 1.5 * examples[each.client] / examples.sum() * min(1 / p, cap) * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-6, atol=1e-7, err_msg=str(unit))


@pytest.mark.parametrize("rule", ["hajek", "none"])
def test_other_rules_are_not_scaled(federate, rule):
    """A mean of the answers is one whoever is missing."""
    client = first_clients(federate(start=False).config)[1]
    federation = federate("federation.rounds=1", f"federation.aggregation={rule}", tamper={client: crash})
    fresh = federate(start=False).server.state.units
    sums = {}
    for each, reply in zip(federation.strategy._planned.plan.clients, federation.grid.seen, strict=True):
        if each.client == client:
            continue
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = each.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else each.pi
            a = federation.server.state.examples[each.client] / (p if rule == "hajek" else 1.0)
            total, weight = sums.get(unit, (0.0, 0.0))
            sums[unit] = total + a * delta.astype(np.float64), weight + a
    for unit, value in federation.server.state.units.items():
        total, weight = sums.get(unit, (0.0, 1.0))
        np.testing.assert_allclose(value, fresh[unit] + total / weight, rtol=1e-6, atol=1e-7, err_msg=str(unit))


def test_a_robust_rule_stands_what_breaks_the_mean(federate):
    """One of six clients, all drawn and all dense, sends its update times a million; a broken one adds nothing."""
    overrides = ("method=fedavg", "federation.rounds=1", "federation.clients_per_round=6",
                 "federation.partition=iid")  # fmt: skip
    liar, broken = scaled(1e6), without("counters")
    moved = {}
    for robust in ("none", "norm_clip", "trimmed_mean", "median"):
        federation = federate(*overrides, f"federation.robust={robust}", worker=overrides, start=False,
                              tamper={2: liar, 4: broken})  # fmt: skip
        before = dict(federation.server.state.units)
        units = federation.start().server.state.units
        moved[robust] = max(float(np.abs(value - before[unit]).max()) for unit, value in units.items())
        assert status(federation, 4).startswith("rejected") and not (federation.run / "spool").exists()
    # An Adam step is at most about the learning rate; there are two, one of them at half of it.
    assert moved["none"] > 100 and max(moved["norm_clip"], moved["trimmed_mean"], moved["median"]) < 0.02


def test_the_median_is_that_of_the_answers(federate):
    client = first_clients(federate(start=False).config)[1]
    overrides = ("federation.rounds=1", "federation.robust=median")
    federation = federate(*overrides, tamper={client: crash}, reverse=True)
    fresh, answers = federate(start=False).server.state.units, {}
    for each, reply in zip(federation.strategy._planned.plan.clients, federation.grid.seen, strict=True):
        if each.client != client:
            for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
                answers.setdefault(unit, []).append(delta)
    for unit, value in federation.server.state.units.items():
        want = fresh[unit] + (np.median(answers[unit], axis=0) if unit in answers else 0.0)
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7, err_msg=str(unit))


def test_fitness_and_load_are_learned_from_the_answers(federate):
    """A visit credits one edge, so visits are counted a second way here; what a client did not hold, or could visit
    all of, keeps its score."""
    federation = federate("federation.rounds=1", "federation.score=fitness", "federation.fitness_decay=0.75",
                          "federation.load_decay=0.5")  # fmt: skip
    state, planned = federation.server.state, federation.strategy._planned.plan.clients
    fitness, load = state.rates.astype(np.float64), np.zeros_like(state.load)
    routed = set()
    for client, reply in zip(planned, federation.grid.seen, strict=True):
        for layer, held in enumerate(client.experts):
            load[layer, list(held)] += 0.5 / 3
            used_SS = decode(blobs_of(reply.content["counters"])[f"shared/counters/{layer}"])[0][0]
            routed.add(bool(used_SS.any()))
            if used_SS.any():
                share_S = used_SS.sum(0) / (2 * 4 * 16)
                share_S[:2] = 1.0
                fitness[client.client, layer, list(held)] *= 0.75
                fitness[client.client, layer, list(held)] += 0.25 * share_S
    np.testing.assert_allclose(state.fitness, fitness)
    np.testing.assert_allclose(state.load, load)
    assert routed == {True, False}
    assert (state.fitness != state.rates).any() and ((0 <= state.fitness) & (state.fitness <= 1)).all()


@pytest.mark.parametrize("score", ["reach", "usage"])
def test_experts_are_drawn_by_each_clients_own_text_and_graph(federate, score):
    """Reach mass over the graph that the client trains over, what was explored included, and no other's."""
    overrides = ("federation.rounds=1", "federation.explore=0.3", "federation.edges=9")
    server = federate(f"federation.score={score}", *overrides).server
    rates = server.state.rates
    rates[:] = np.random.default_rng(0).random(rates.shape).astype(rates.dtype)
    planned = server.method.plan(server, 2)
    section, roots = server.config.federation, server.config.sam.roots
    assert len({graph_LEE.tobytes() for graph_LEE in planned.graphs.values()}) > 1
    for client in planned.plan.clients:
        for layer, mask_EE in enumerate(planned.graphs[client.client]):
            scores_E = rates[client.client, layer].astype(np.float64)
            if score == "reach":
                for e in range(roots):
                    scores_E[e] = 1.0
                for e in range(roots, len(scores_E)):
                    missed = [1.0 - scores_E[p] for p in range(e) if mask_EE[p, e]]
                    scores_E[e] *= 1.0 - np.prod(missed)
            budget = server.config.tiers[client.tier].experts
            want_E = inclusion_probabilities(scores_E, budget=budget, roots=roots, floor=section.floor_in_force)
            np.testing.assert_allclose(client.h[layer], want_E, rtol=1e-12)


@pytest.mark.parametrize("score", ["fitness", "greedy", "anchors"])
def test_experts_are_drawn_by_feedback_load_and_anchors(federate, score):
    """By the formulas of 2507.05685 and 2306.08586, of the run's own weights, budgets and population."""
    federation = federate(f"federation.score={score}", "federation.floor=0.1", "federation.fitness_weight=0.5",
                          "federation.load_weight=2.0", "federation.rounds=1")  # fmt: skip
    server, rng = federation.server, np.random.default_rng(0)
    state, roots = server.state, server.config.sam.roots
    state.fitness[:], state.load[:] = rng.random(state.fitness.shape), rng.random(state.load.shape)
    state.rates[:] = rng.random(state.rates.shape)
    # One to one: of six clients and six experts beside the roots, the pairs of the largest sum.
    anchor_of = [
        max(itertools.permutations(range(6)), key=lambda order, layer=layer: sum(
            state.rates[client, layer, roots + expert] for client, expert in enumerate(order)))
        for layer in range(2)
    ]  # fmt: skip
    for client in server.method.plan(server, 2).plan.clients:
        budget = server.config.tiers[client.tier].experts
        for layer in range(2):
            fitness_E, floor = state.fitness[client.client, layer], 0.1
            if score == "fitness":
                scores_E = 0.5 * fitness_E - 2.0 * state.load[layer]
                scores_E = scores_E - min(scores_E[roots:].min(), 0.0)
            elif score == "greedy":
                fittest = roots + np.argsort(-fitness_E[roots:])[: budget - roots]
                scores_E, floor = np.where(np.isin(np.arange(8), fittest), np.inf, 0.0), 0.0
                assert set(client.experts[layer]) == {*range(roots), *fittest}
            else:
                scores_E = state.rates[client.client, layer].astype(np.float64)
                anchor = roots + anchor_of[layer][client.client]
                scores_E[anchor] = np.inf
                assert anchor in client.experts[layer]
            scores_E[:roots] = 0.0
            want_E = inclusion_probabilities(scores_E, budget=budget, roots=roots, floor=floor)
            np.testing.assert_allclose(client.h[layer], want_E, rtol=1e-12)


def test_after_a_shift_replies_weigh_as_the_documents_they_come_from(federate):
    """A client that trains on the next one's documents weighs as much as these are."""
    overrides = ("method=fedavg", "federation.rounds=2", "federation.clients_per_round=6", "federation.shift_round=2",
                 "federation.partition=dirichlet")  # fmt: skip
    federation = federate(*overrides, worker=overrides)
    first = load_checkpoint(checkpoints(federation.run / "checkpoints")[1])
    examples = federation.server.state.examples
    assert first.round == 1 and len(set(examples.tolist())) > 1
    expected = {unit: value.astype(np.float64) for unit, value in first.units.items()}
    for client, reply in enumerate(federation.grid.seen[6:]):
        weight = examples[(client + 1) % 6] / examples.sum()
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            expected[unit] = expected[unit] + weight * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-6, atol=1e-7, err_msg=str(unit))


def trained_alone(server, worker, client):
    """FedAvg's ClientUpdate, line by line: the plain dense model and torch's own optimizer."""
    from transformers import AutoModelForCausalLM

    from sam_ds.data.batches import batch_indices

    settings = server.config.train
    model = AutoModelForCausalLM.from_pretrained(worker.folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    rows = worker.rows(client)
    order = batch_indices(len(rows), settings.batch, settings.steps, (server.config.seed, 1, client))
    for step, picked in enumerate(order):
        for group in optimizer.param_groups:
            up, down = (step + 1) / (settings.warmup_steps + 1), (settings.steps - step) / settings.steps
            group["lr"] = settings.lr * min(1.0, up, down)
        ids = torch.from_numpy(rows[picked])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().double().numpy() for name, value in model.named_parameters()}


def test_fedavg_is_the_example_weighted_mean_of_local_models(federate, new_worker):
    overrides = ("method=fedavg", "federation.clients_per_round=6", "federation.rounds=1",
                 "federation.partition=dirichlet")  # fmt: skip
    federation = federate(*overrides, worker=overrides)
    worker, server = new_worker(*overrides), federation.server
    examples = server.state.examples
    assert len(set(examples.tolist())) > 1
    local = [trained_alone(server, worker, client) for client in range(6)]
    assert {unit.name for unit in server.state.units} == set(local[0])
    for unit, value in server.state.units.items():
        mean = sum(n * model[unit.name] for n, model in zip(examples, local, strict=True)) / examples.sum()
        # Adam divides by the gradient's size: where that is next to nothing, rounding shows.
        np.testing.assert_allclose(value, mean, atol=3e-5, err_msg=unit.name)
