"""Clients that fail, lie, are late or do not register: each is named, and the run is that of the others."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import MetricRecord
from in_process import ClientCrash, Federation, assert_equal_states, first_clients, status

from sam_ds.bench.tampering import FAULTS, crash, scaled
from sam_ds.errors import InputError, RunStopped
from sam_ds.federation.state import checkpoints, load_checkpoint

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


def test_training_that_diverges_is_named(federate):
    keys = ("train.lr=1e30", "federation.void_retries=0")
    federation = federate(*keys, worker=keys, start=False)
    with pytest.raises(RunStopped, match="round 1 had no valid answer in 1 attempts"):
        federation.start()
    assert [r["reason"] for r in federation.records("client")] == ["not-finite"] * 3


@pytest.mark.parametrize(("method", "factor", "due", "why"), [
    ("fedavg", 1e15, 9, "its loss on public text is nan"), ("sam", 1e25, 1, "logits hold NaN"),
    ("sam", 1e25, 9, "logits hold NaN"),
])  # fmt: skip
def test_answers_that_break_the_model_stop_the_run_before_it_is_kept(federate, method, factor, due, why):
    """Updates that are finite, but too large for a forward pass, whether or not the graph is due for edits."""
    tamper = dict.fromkeys(range(6), in_round(2, scaled(factor)))
    keys = (f"method={method}", f"federation.edit_every={due}", "federation.min_offered=1")
    federation = federate(*keys, worker=keys, tamper=tamper, start=False)
    with pytest.raises(RunStopped, match=f"round 2 broke the model: {why}.* the state after round 1 is in"):
        federation.start()
    assert [path.name for path in checkpoints(federation.run / "checkpoints")][-1] == "round-00001.safetensors"
    assert [record["round"] for record in federation.records("round")] == [0, 1]


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


# ------------------------------------------------------------------ who registers


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
