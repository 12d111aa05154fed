"""The round loop: what is logged, what a bad client can do (nothing), and that the numbers are the formula's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flwr.app import MetricRecord
from in_process import ClientCrash, Federation, assert_equal_states

from sam_ds.bench.tampering import FAULTS, crash, scaled, without
from sam_ds.clients.dealing import dealt_tiers
from sam_ds.errors import InputError, RunStopped
from sam_ds.federation.graphs import UNKNOWN
from sam_ds.federation.messages import blobs_of
from sam_ds.federation.participation import sample_clients
from sam_ds.federation.run import bounds
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.graph.dag import check_graph
from sam_ds.graph.editlog import catch_up
from sam_ds.graph.edits import Edit
from sam_ds.graph.privacy import gaussian_epsilon
from sam_ds.wire.codec import decode
from sam_ds.wire.payload import ExpertUnit, decode_units


@pytest.fixture
def federate(tiny, new_worker, tmp_path):
    """`federate(*overrides, worker=(), start=True, **grid)` -> a Federation that has run."""
    count = iter(range(100))

    def run(*overrides, worker=(), start=True, **grid):
        config = tiny.config(tmp_path / str(next(count)), *overrides)
        federation = Federation.of(config, tiny.base, new_worker(*worker), **grid)
        return federation.start() if start else federation

    return run


def status(federation, client=None, round_=1):
    found = {r["client"]: r["status"] for r in federation.records("client") if r["round"] == round_}
    return found if client is None else found[client]


# ------------------------------------------------------------------ a good run


@pytest.fixture(scope="module")
def good(tiny, new_worker, tmp_path_factory):
    """Three rounds; the graph is edited after the second."""
    config = tiny.config(tmp_path_factory.mktemp("good"), "federation.rounds=3")
    return Federation.of(config, tiny.base, new_worker()).start()


def test_records_are_complete(good):
    rounds, clients = good.records("round"), good.records("client")
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    assert [r["round"] for r in clients] == [1] * 3 + [2] * 3 + [3] * 3
    for record in rounds:
        for kind in ("merged", "sparse"):
            scores = record[kind]
            assert list(scores["domains"]) == ["gardens", "numbers", "ships"]
            assert all(1 < value < 1000 for value in [*scores["domains"].values(), scores["headline"]])
        assert math.isfinite(record["validation_loss"])
        assert record["wall_seconds"] >= record["evaluation_seconds"] > 0
        assert record["orchestration_seconds"] >= 0
        mine = [r for r in clients if r["round"] == record["round"]]
        for way in ("bytes_up", "bytes_down"):
            for name in ("raw", "encoded", "message"):
                assert record[way][name] == sum(r[way][name] for r in mine)
        if record["round"]:
            assert record["p_answer"] == 1.0 and record["answers"] == 3
            assert record["largest_weight"] >= 2.0  # 1 / pi
            assert 1.0 <= record["effective_sample_size"] <= record["mean_effective_sample_size"] <= 3.0
    for record in clients:
        assert record["status"] == "ok"
        assert record["domain"] == ["gardens", "numbers", "ships"][record["client"] % 3]
        assert record["tier"] == good.server.tiers[record["client"]]
        assert math.isfinite(record["loss_first"]) and math.isfinite(record["loss_last"])
        assert record["tokens"] == 2 * 4 * 16 and record["active_flops"] > 0
        for way in ("bytes_up", "bytes_down"):
            assert 0 < record[way]["encoded"] < record[way]["message"]
        assert record["bytes_up"]["raw"] == record["bytes_down"]["raw"]


def test_edits_keep_the_graph_valid(good):
    rounds = {r["round"]: r for r in good.records("round")}
    assert rounds[1]["edits"] == rounds[3]["edits"] == []
    edits = rounds[2]["edits"]
    assert edits and rounds[2]["gamma"] == max(abs(edit["change"]) for edit in edits)
    assert any(edit["kept"] for edit in edits)
    for graph_EE in good.server.state.graph:
        check_graph(graph_EE, good.config.sam.roots)
    assert rounds[3]["edges"] == good.server.state.graph.sum((1, 2)).tolist()
    kept = sum({"promote": 1, "prune": -1}[edit["kind"]] for edit in edits if edit["kept"])
    assert sum(rounds[2]["edges"]) == sum(rounds[1]["edges"]) + kept
    np.testing.assert_array_equal(good.server.model.graph().numpy(), good.server.state.graph)


def test_edits_travel_to_whoever_was_away(federate):
    """Nodes that keep their contexts are sent edits, those that do not the whole graph; what comes out is the same."""
    overrides = ("federation.rounds=8", "federation.edit_every=1", "federation.clients_per_round=2",
                 "federation.max_edits=3", "evaluation.every=8", "evaluation.sparse=false")  # fmt: skip
    anew, kept = federate(*overrides), federate(*overrides, keep=True)
    assert_equal_states(anew.server.state, kept.server.state)
    log = kept.server.state.edits
    first = Federation.of(kept.config, kept.server.base).server.state.graph
    assert len(log) > 10 and (catch_up(first, log, 0) == kept.server.state.graph).all()
    assert [edit for _, edit in log.entries] == [
        Edit(layer=e["layer"], tail=e["tail"], head=e["head"], kind=e["kind"])
        for r in kept.records("round") for e in r["edits"] if e["kept"]
    ]  # fmt: skip

    def known(federation):
        """Of every client in turn, the edits that it was counted on to hold, and the rounds."""
        found = {}
        for message in federation.grid.sent:
            if message.metadata.message_type == "train":
                facts, blobs = message.content["edits"], blobs_of(message.content["graph"])
                assert ("whole" in blobs) == (facts["known"] == UNKNOWN)
                assert ("missed" in blobs) == (UNKNOWN < facts["known"] < facts["count"])
                found.setdefault(message.metadata.dst_node_id, []).append((facts["known"], facts["count"]))
        return found

    assert all(have == UNKNOWN for pairs in known(anew).values() for have, _ in pairs)
    for pairs in known(kept).values():
        # Sure of its copy when it has found it again: from the third time on.
        assert [have for have, _ in pairs] == [UNKNOWN, UNKNOWN, *(count for _, count in pairs[1:-1])][: len(pairs)]
    assert any(len(pairs) > 2 and pairs[2][1] - pairs[2][0] > 2 for pairs in known(kept).values())


@pytest.mark.parametrize("how", ["lost", "altered"])
def test_a_client_without_its_graph_is_sent_it_anew(federate, how):
    overrides = ("federation.rounds=5", "federation.edit_every=1", "federation.clients=3")
    federation = federate(*overrides, keep=True, start=False)

    def forget(reply):
        if reply.metadata.group_id == "3":
            if how == "lost":
                federation.grid.contexts[1].clear()
            else:
                bits = bytearray(federation.grid.contexts[1]["graph"]["graph"])
                bits[-1] ^= 0xFF
                federation.grid.contexts[1]["graph"]["graph"] = bytes(bits)
        return reply

    federation.grid.tamper[0] = forget
    federation.start()
    assert [status(federation, 0, round_)[:23] for round_ in range(1, 6)] == [
        "ok", "ok", "ok", "rejected: client-failed", "ok",
    ]  # fmt: skip
    named = "this client has none" if how == "lost" else "is not"
    assert named in status(federation, 0, 4)


def test_noised_counters_are_clipped_by_client_and_their_epsilon_is_written(federate):
    overrides = ("federation.edit_noise=0.5", "federation.edit_clip=0.25")
    state = federate(*overrides, "federation.rounds=1").server.state
    norm = math.sqrt(sum(int((v**2).sum()) for v in (state.used, state.offered, state.together)))
    tokens = 2 * 4 * 16
    # Three clients, each at its bound, with what is rounded down; their counters point much the same way.
    assert 0.5 * 3 * 0.25 * tokens < norm <= 3 * 0.25 * tokens
    rounds = {r["round"]: r for r in federate(*overrides, "federation.rounds=4").records("round")}
    assert "epsilon" not in rounds[1] and rounds[2]["epsilon"] == rounds[3]["epsilon"]
    for round_, periods in ((2, 1), (4, 2)):
        # Of the edits alone: the weights have no noise.
        assert rounds[round_]["epsilon"] == {"delta": 1e-5, "edits": gaussian_epsilon(0.5 / math.sqrt(periods), 1e-5)}


def test_counters_start_over_after_edits(good):
    state = good.server.state
    assert state.used.sum() < state.used_total.sum()
    assert not np.tril(state.used_total).any()


def test_checkpoints_hold_the_state(good):
    found = checkpoints(good.run / "checkpoints")
    assert [path.name for path in found] == [f"round-0000{r}.safetensors" for r in (1, 2, 3)]
    assert_equal_states(load_checkpoint(found[-1]), good.server.state)
    assert len(good.server.state.losses) == 4
    assert good.server.state.losses == [r["validation_loss"] for r in good.records("round")]


def test_nothing_is_left_in_the_spool(good):
    assert not (good.run / "spool").exists()


def test_training_lowers_the_loss(federate):
    overrides = ("federation.rounds=3", "federation.clients_per_round=6", "train.lr=0.01", "train.final_lr=1.0")
    rounds = federate(*overrides, worker=overrides).records("round")
    assert rounds[-1]["merged"]["headline"] < 0.9 * rounds[0]["merged"]["headline"]


def test_the_order_of_replies_does_not_matter(good, federate):
    other = federate("federation.rounds=3", reverse=True)
    assert_equal_states(other.server.state, good.server.state)


@pytest.mark.parametrize("method", ["sam", "fedavg"])
def test_lossless_compression_changes_nothing(federate, method):
    pytest.importorskip("zstandard")
    overrides = (f"method={method}",)
    plain = federate(*overrides, worker=overrides)
    packed = federate(*overrides, "wire.compress=true", worker=(*overrides, "wire.compress=true"))
    assert_equal_states(plain.server.state, packed.server.state)
    for one, other in zip(plain.records("round"), packed.records("round"), strict=True):
        assert other["bytes_up"]["raw"] == one["bytes_up"]["raw"]
        assert other["bytes_up"]["encoded"] <= one["bytes_up"]["encoded"]


@pytest.mark.parametrize("values", ["bf16", "int8", "int4"])
def test_lossy_values_stay_close(federate, values):
    exact = federate("federation.rounds=1")
    lossy = federate("federation.rounds=1", f"wire.values={values}", worker=(f"wire.values={values}",))
    assert lossy.records("round")[1]["bytes_up"]["encoded"] < 0.7 * exact.records("round")[1]["bytes_up"]["encoded"]
    for unit, value in exact.server.state.units.items():
        # An update is at most a few learning rates, times 1 / p; it is kept to about a hundredth.
        np.testing.assert_allclose(lossy.server.state.units[unit], value, atol=2e-3, err_msg=str(unit))


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_moments_are_kept(federate, optimizer):
    federation = federate(f"federation.server_optimizer={optimizer}", "federation.server_lr=0.001")
    assert all(math.isfinite(r["validation_loss"]) for r in federation.records("round"))
    assert {len(m) for m in federation.server.state.moments.values()} == {1 if optimizer == "momentum" else 2}
    assert_equal_states(load_checkpoint(checkpoints(federation.run / "checkpoints")[-1]), federation.server.state)


@pytest.mark.parametrize("overrides", [
    ("federation.sampling=poisson",), ("federation.score=uniform",), ("federation.score=usage",),
    ("federation.score=anchors", "federation.floor=0.1"), ("federation.score=greedy", "federation.sampling=stratified"),
    ("federation.aggregation=hajek",), ("federation.aggregation=clipped",), ("federation.aggregation=none",),
    ("federation.partition=iid",), ("federation.partition=dirichlet",), ("federation.forgetting=ships",),
    ("evaluation.sparse=false", "evaluation.every=2"), ("federation.robust=norm_clip",),
    ("federation.robust=trimmed_mean", "federation.trim=0.34"),
], ids=" ".join)  # fmt: skip
def test_every_variant_runs(federate, overrides):
    federation = federate(*overrides)
    assert all(math.isfinite(r["validation_loss"]) for r in federation.records("round"))
    if "federation.forgetting=ships" in overrides:
        scores = federation.records("round")[-1]["merged"]
        assert scores["forgetting"] == pytest.approx(scores["domains"]["ships"])


# ------------------------------------------------------------------ the numbers


def test_ht_is_the_formula(federate):
    """delta_u = sum over replies of w_i / p_{i,u} delta_{i,u}, and theta moves by it."""
    federation = federate("federation.rounds=1", start=False)
    before = dict(federation.server.state.units)
    federation.start()
    planned = federation.strategy._planned.plan.clients
    examples = federation.server.state.examples
    expected = {unit: value.astype(np.float64) for unit, value in before.items()}
    for client, reply in zip(planned, federation.grid.seen, strict=True):
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = client.pi
            if isinstance(unit, ExpertUnit):
                assert unit.expert in client.experts[unit.layer]
                p *= client.h[unit.layer, unit.expert]
            expected[unit] = expected[unit] + examples[client.client] / examples.sum() / p * delta
    for unit, value in federation.server.state.units.items():
        np.testing.assert_allclose(value, expected[unit], rtol=1e-6, atol=1e-7, err_msg=str(unit))
    moved = sum(not np.array_equal(before[u], value) for u, value in federation.server.state.units.items())
    assert moved > 0


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


@pytest.mark.parametrize("method", ["fedavg", "fedit"])
def test_dense_methods_run_and_send_everything(federate, method):
    overrides = (f"method={method}",)
    federation = federate(*overrides, worker=overrides)
    raw = {r["bytes_up"]["raw"] for r in federation.records("client")}
    assert raw == {sum(value.nbytes for value in federation.server.state.units.values())}
    assert all(r["sparse"] is None for r in federation.records("round"))
    losses = federation.server.state.losses
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------ clients that fail or lie


SHORT = ("federation.rounds=2", "federation.clients=3", "federation.timeout_seconds=0.3",
         "federation.edit_every=9", "evaluation.every=9",
         "evaluation.sparse=false", "evaluation.max_tokens=64")  # fmt: skip
"""Three clients, all drawn."""


def in_round(round_, tamper):
    """A tamper function that is honest in the other rounds."""
    return lambda reply: tamper(reply) if reply.metadata.group_id == str(round_) else reply


@pytest.fixture(scope="module")
def silent(tiny, new_worker, tmp_path_factory):
    """Two rounds, in the first of which the second client never answers: (client, Federation); and without that."""
    config = tiny.config(tmp_path_factory.mktemp("silent"), *SHORT)
    client = first_clients(config)[1]
    tamper = {client: in_round(1, lambda reply: None)}
    honest = Federation.of(tiny.config(tmp_path_factory.mktemp("honest"), *SHORT), tiny.base, new_worker())
    return client, Federation.of(config, tiny.base, new_worker(), tamper=tamper).start(), honest.start()


def first_clients(config):
    """Who is drawn in round 1."""
    section = config.federation
    drawn, _ = sample_clients(config.seed, 1, tiers=dealt_tiers(config),
                              per_round=section.clients_per_round, scheme=section.sampling)  # fmt: skip
    return [int(client) for client in drawn]


@pytest.mark.parametrize("how", FAULTS)
def test_a_fault_is_named_and_left_out(federate, silent, how):
    """Whatever the second of three clients sends in round 1, the result is that of the two others, or, where the answer
    itself is good, of all three; what comes beside the answer is of no use in round 2 either."""
    fault, (client, reference, honest) = FAULTS[how], silent
    rounds = 2 if fault.refused else 1
    federation = federate(*SHORT, f"federation.rounds={rounds}", tamper={client: in_round(1, fault.tamper)})
    found = status(federation)
    assert found.pop(client).startswith(f"rejected: {fault.reason}: " if fault.reason else "ok")
    assert len(found) == 2 and set(found.values()) == {"ok"}
    reasons = [r["reason"] for r in federation.records("client") if r["status"] != "ok"]
    assert reasons == [fault.reason] * bool(fault.reason)
    refused = [r["reason"] for r in federation.records("refused")]
    assert set(refused) == {fault.refused} - {""} and len(refused) <= 1
    record = federation.records("round")[1]
    answers = 2 if fault.reason else 3
    assert record["p_answer"] == pytest.approx(answers / 3) and record["answers"] == answers
    expected = checkpoints((reference if fault.reason else honest).run / "checkpoints")[rounds]
    assert_equal_states(federation.server.state, load_checkpoint(expected))
    assert not (federation.run / "spool").exists()


def test_ht_scales_by_the_share_that_answered(federate):
    """The two that answered, weighted by 1 / p, times 3 / 2."""
    client = first_clients(federate(start=False).config)[1]
    federation = federate("federation.rounds=1", tamper={client: crash})
    planned = federation.strategy._planned.plan.clients
    examples = federation.server.state.examples
    first = Federation.of(federation.config, federation.server.base).server
    expected = {unit: value.astype(np.float64) for unit, value in first.state.units.items()}
    for each, reply in zip(planned, federation.grid.seen, strict=True):
        if each.client == client:
            continue
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = each.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else each.pi
            expected[unit] = expected[unit] + 1.5 * examples[each.client] / examples.sum() / p * delta
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


def test_warnings_are_said_once_and_written_every_round(federate, capsys):
    federation = federate("federation.clip=1.5", "federation.rounds=3")
    found = [r["warnings"] for r in federation.records("round")]
    assert found[0] == [] and all("the largest 1/p is" in " ".join(texts) for texts in found[1:])
    said = capsys.readouterr()
    assert (said.out + said.err).count("federation.clip is 1.5: one reply may decide") == 1
    silent = federate("federation.aggregation=none", "federation.clip=1.5", "federation.rounds=1")
    assert [r["warnings"] for r in silent.records("round")] == [[], []]


def test_when_all_fail_the_run_stops_with_its_state(federate):
    """The first round is good; in the second nobody gives a valid answer."""
    calls = []

    def later(reply):
        calls.append(reply)
        if reply.metadata.group_id == "2":
            raise ClientCrash("gone")
        return reply

    federation = federate("federation.void_retries=1", tamper=dict.fromkeys(range(6), later), start=False)
    with pytest.raises(RunStopped, match="round 2 had no valid answer in 2 attempts; the state after round 1"):
        federation.start()
    state = load_checkpoint(checkpoints(federation.run / "checkpoints")[-1])
    assert state.round == 1
    assert_equal_states(state, federation.server.state)
    assert [r["round"] for r in federation.records("round")] == [0, 1]
    assert sum(r["round"] == 2 for r in federation.records("client")) == 2 * 3
    assert len(calls) == 9


def test_a_void_round_is_repeated(federate):
    """Nobody answers at first; the repeat is the round as it would have been."""
    seen = []

    def at_first(reply):
        seen.append(reply)
        if len(seen) <= 3:
            raise ClientCrash("not yet")
        return reply

    late = federate("federation.rounds=1", tamper=dict.fromkeys(range(6), at_first))
    assert_equal_states(late.server.state, federate("federation.rounds=1").server.state)


def test_a_round_without_clients_is_no_failure(federate):
    """Poisson sampling may draw nobody: the unbiased update of such a round is zero."""
    overrides = ("federation.sampling=poisson", "federation.clients_per_round=1", "federation.rounds=5",
                 "federation.void_retries=0", "federation.max_edits=0")  # fmt: skip
    federation = federate(*overrides)
    clients = {r["round"] for r in federation.records("client")}
    empty = [r for r in federation.records("round") if r["round"] and r["round"] not in clients]
    assert empty and all(record["answers"] == 0 for record in empty)
    losses = federation.server.state.losses
    for record in empty:
        assert losses[record["round"]] == losses[record["round"] - 1]


# ------------------------------------------------------------------ registration


def test_too_few_nodes(federate):
    federation = federate("federation.timeout_seconds=0.1", start=False)
    federation.grid.partitions = {1: 0, 2: 1}
    with pytest.raises(InputError, match="federation.clients is 6, but only 2 nodes are connected: connect at least 3"):
        federation.start()


def misregistered(reply):
    reply.content["metrics"] = MetricRecord({"client": 0, "num-examples": -1})
    return reply


def test_a_node_that_fails_to_register_is_left_out(federate):
    """Client 1 crashes, client 4 makes no sense: the population is the four others, drawn with pi = 3 / 4."""
    federation = federate("federation.rounds=3", start=False)
    federation.grid.tamper_query = {2: crash, 5: misregistered}
    federation.start()
    state, planned = federation.server.state, federation.strategy._planned.plan.clients
    assert {r["node"]: r["reason"] for r in federation.records("refused")} == {2: "client-failed", 5: "corrupt"}
    assert (state.examples > 0).tolist() == [True, False, True, True, False, True]
    assert not {1, 4} & {r["client"] for r in federation.records("client")}
    assert {client.pi for client in planned} == {3 / 4}
    assert all(r["p_answer"] == 1.0 for r in federation.records("round")[1:])


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


@pytest.mark.parametrize("overrides, least", [((), 3), (("federation.min_clients=5",), 5),
                                              (("federation.shift_round=1",), 6)])  # fmt: skip
def test_too_few_that_register_stop_the_run(federate, overrides, least):
    federation = federate(*overrides, "federation.timeout_seconds=0.1", start=False)
    federation.grid.tamper_query = dict.fromkeys(range(2, 7 if least == 3 else 4), crash)
    message = rf"begins with {least} \(federation.min_clients\): node 2: client-failed: CUDA"
    with pytest.raises(RunStopped, match=message):
        federation.start()
    assert not checkpoints(federation.run / "checkpoints")


def test_more_nodes_than_clients_and_taken_ids(federate):
    """Node 7 says it is the seventh of six, node 9 that it is client 0, which node 1 is; node 2 answers twice. The run
    is as without that."""
    federation = federate("federation.rounds=1", start=False)
    federation.grid.partitions |= {7: 6, 9: 0}
    federation.grid.tamper_query = {2: lambda reply: [reply, reply]}
    federation.start()
    refused = {r["node"]: (r["reason"], r["detail"]) for r in federation.records("refused")}
    assert refused.keys() == {2, 7, 9} and refused[2][0] == "duplicate" and refused[9] == (
        "taken-id", "registration: client 0 is node 1, which is still connected"
    )  # fmt: skip
    assert refused[7][0] == "client-failed" and "partition-id = 6 is none of the run's 6 clients" in refused[7][1]
    assert_equal_states(federation.server.state, federate("federation.rounds=1").server.state)


def test_clients_come_later_and_come_back(federate):
    """Client 3 connects after round 1 and is a part from then on; client 0 comes back after round 2 as another node."""
    overrides = ("federation.rounds=4", "federation.clients_per_round=6", "federation.min_clients=5",
                 "federation.timeout_seconds=0.2", "evaluation.every=9", "evaluation.sparse=false")  # fmt: skip
    federation = federate(*overrides, start=False)
    grid = federation.grid
    del grid.partitions[4]

    def change(reply):
        if reply.metadata.group_id == "1":
            grid.partitions[4] = 3
        elif reply.metadata.group_id == "2" and 1 in grid.partitions:
            grid.partitions[8] = grid.partitions.pop(1)
        return reply

    grid.tamper[5] = change
    federation.start()
    drawn = [{r["client"]: r["status"] for r in federation.records("client") if r["round"] == n} for n in (1, 2, 3, 4)]
    assert [set(found) for found in drawn] == [{0, 1, 2, 4, 5}, *[set(range(6))] * 3]
    assert all(status == "ok" for found in drawn for status in found.values())
    asked = [m.metadata.dst_node_id for m in grid.sent if m.metadata.group_id in ("3", "4")]
    assert 8 in asked and 1 not in asked
    assert (federation.server.state.examples > 0).all() and not federation.records("refused")


def test_a_client_that_is_gone_when_a_run_is_resumed_counts_as_silent(federate):
    federation = federate("federation.clients_per_round=6", "federation.rounds=1")
    state = load_checkpoint(checkpoints(federation.run / "checkpoints")[-1])
    again = federate("federation.clients_per_round=6", "federation.min_clients=5", "federation.timeout_seconds=0.1",
                     start=False)  # fmt: skip
    again.server.load_state(state)
    del again.grid.partitions[3]
    again.start()
    assert status(again, 2, 2).startswith("rejected: absent")
    assert again.records("round")[-1]["p_answer"] == pytest.approx(5 / 6)
    np.testing.assert_array_equal(again.server.state.examples, state.examples)


def test_a_tier_has_its_own_deadline(federate):
    """The small one's time is up at once, that of the others never; what it trained is not waited for."""
    federation = federate("federation.rounds=1", "tiers.small.timeout_seconds=0.05", "federation.clients_per_round=6",
                          start=False)  # fmt: skip
    small = [client for client, tier in enumerate(federation.server.tiers) if tier == "small"]
    federation.grid.tamper = dict.fromkeys(small, lambda reply: None)
    federation.start()
    found = status(federation)
    assert all(found.pop(client) == "rejected: no-answer: nothing came within 0.05 s" for client in small)
    assert set(found.values()) == {"ok"}


def test_what_the_grid_does_not_take_is_named(federate):
    federation = federate("federation.rounds=1", start=False)
    push, client = federation.grid.push_messages, first_clients(federation.config)[1]

    def lossy(messages):
        identities = list(push(messages))
        return [None if m.metadata.dst_node_id == client + 1 and m.metadata.message_type == "train" else i
                for m, i in zip(messages, identities, strict=True)]  # fmt: skip

    federation.grid.push_messages = lossy
    federation.start()
    assert status(federation, client).startswith("rejected: not-sent")


def test_a_run_whose_loss_is_not_finite_still_ends(federate):
    """Nothing is fitted to it; the report and the model come after."""
    server = federate(start=False).server
    server.state.losses = [5.0, 4.0, 3.5, math.nan]
    assert bounds(server) is None
