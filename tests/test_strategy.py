"""The round loop: what is logged, sent, edited and saved, under every setting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from in_process import Federation, assert_equal_states, status

from sam_ds.federation.graphs import UNKNOWN
from sam_ds.federation.messages import blobs_of
from sam_ds.federation.methods.sam import assemble, condition_of
from sam_ds.federation.run import bounds
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.graph.dag import check_graph
from sam_ds.graph.editlog import catch_up, every_edge, unpack_edges
from sam_ds.graph.edits import Edit, apply
from sam_ds.graph.privacy import gaussian_epsilon, noised_counters


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


def test_the_graph_that_a_client_trained_over_is_written_down(federate):
    federation = federate("federation.rounds=1", "federation.explore=0.3", "federation.edges=9")
    graphs = federation.strategy._planned.graphs
    assert len({graph_LEE.tobytes() for graph_LEE in graphs.values()}) > 1
    records = federation.records("client")
    assert {record["client"] for record in records} == graphs.keys()
    server, (client, *_) = federation.server, graphs
    condition = condition_of(server, client)
    explored = {assemble(server, condition, (0, round_, client)).tobytes() for round_ in range(8)}
    assert len(explored) > 4, "every round explores anew"
    for record in records:
        bits = np.frombuffer(bytes.fromhex(record["graph"]), np.uint8)
        graph_LEE = graphs[record["client"]]
        np.testing.assert_array_equal(unpack_edges(bits, every_edge(*graph_LEE.shape[:2])), graph_LEE)


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


@pytest.fixture
def counted(federate):
    """`counted(*overrides)` -> the server of a run that begins, with counters that many edits can be proposed from."""

    def make(*overrides):
        server = federate(*overrides, start=False).server
        rng, state = np.random.default_rng(0), server.state
        for name, most in (("used", 40), ("offered", 200), ("together", 200)):
            getattr(state, name)[:] = np.triu(rng.integers(20, most, state.used.shape), 1)
        return server

    return make


def test_edits_are_proposed_from_noised_counters(counted, monkeypatch):
    """Of the deviation that the epsilon is of: sigma, times what a client can change in the T_m rounds of a period."""
    server, seen = counted("federation.edit_noise=0.5", "federation.edit_clip=0.25", "federation.edit_every=2"), []
    tables = [server.state.used.copy(), server.state.offered.copy(), server.state.together.copy()]
    monkeypatch.setattr("sam_ds.federation.methods.sam.propose", lambda _, *given, **__: seen.extend(given) or [])
    server.method.adapt(server, 2)
    noised = noised_counters(tables, 0.5 * 2 * 0.25 * (2 * 4 * 16), server.config.seed, 2)
    assert len(seen) == 3 and not any(np.array_equal(found, table) for found, table in zip(seen, tables, strict=True))
    for found, expected in zip(seen, noised, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_edits_that_cost_more_than_the_tolerance_are_rolled_back(counted, monkeypatch):
    """What an edge costs follows from its ends' numbers: some edits help, some cost little, some much."""
    server = counted("federation.edit_tolerance=0.03", "federation.max_edits=12")
    cost_EE = np.subtract.outer(np.arange(8), 0.6 * np.arange(8)) / 50
    monkeypatch.setattr("sam_ds.federation.methods.sam.loss_in_use", lambda _: lambda graph_LEE: 5 + float(
        (graph_LEE * cost_EE).sum()))  # fmt: skip
    before = server.state.graph.copy()
    record = server.method.adapt(server, 2)
    changes = []
    for edit in record["edits"]:
        sign = 1 if edit["kind"] == "promote" else -1
        changes.append(edit["change"])
        assert edit["change"] == pytest.approx(sign * cost_EE[edit["tail"], edit["head"]])
        assert edit["kept"] == (edit["change"] <= 0.03)
    assert min(changes) < 0 < 0.03 < max(changes) and any(0 < change <= 0.03 for change in changes)
    kept = [
        Edit(layer=e["layer"], tail=e["tail"], head=e["head"], kind=e["kind"]) for e in record["edits"] if e["kept"]
    ]  # fmt: skip
    assert 0 < len(kept) < len(record["edits"])
    np.testing.assert_array_equal(server.state.graph, apply(before, kept))
    np.testing.assert_array_equal(server.model.graph().numpy(), server.state.graph)
    assert [edit for _, edit in server.state.edits.entries] == kept
    assert record["gamma"] == server.state.gamma == max(map(abs, changes))


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


@pytest.mark.parametrize("method", ["fedavg", "fedit"])
def test_dense_methods_run_and_send_everything(federate, method):
    overrides = (f"method={method}",)
    federation = federate(*overrides, worker=overrides)
    raw = {r["bytes_up"]["raw"] for r in federation.records("client")}
    assert raw == {sum(value.nbytes for value in federation.server.state.units.values())}
    assert all(r["sparse"] is None for r in federation.records("round"))
    losses = federation.server.state.losses
    assert losses[-1] < losses[0]


def test_warnings_are_said_once_and_written_every_round(federate, capsys):
    federation = federate("federation.clip=1.5", "federation.rounds=3")
    found = [r["warnings"] for r in federation.records("round")]
    assert found[0] == [] and all("the largest 1/p is" in " ".join(texts) for texts in found[1:])
    said = capsys.readouterr()
    assert (said.out + said.err).count("federation.clip is 1.5: one reply may decide") == 1
    silent = federate("federation.aggregation=none", "federation.clip=1.5", "federation.rounds=1")
    assert [r["warnings"] for r in silent.records("round")] == [[], []]


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


def test_the_bounds_of_a_run_are_those_of_its_fitted_constants(federate):
    """On losses that decay exactly: nothing is left of noise, and what each bound says of edits can be worked out."""
    server = federate("federation.edit_every=3", "federation.max_edits=2", start=False).server
    server.state.losses, server.state.gamma = [2.0 + 3.0 * 0.8**t for t in range(13)], 0.01
    found = bounds(server)
    gap = 3.0 * 0.8**12
    assert found["measured"] == pytest.approx(gap, abs=1e-6)
    assert found["uncorrected"] == pytest.approx(gap + 2 * 0.01 * 3, abs=1e-4)
    assert found["corrected"] == pytest.approx(gap + 2 * 2 * 0.01 / (1 - 0.8**3), abs=1e-4)


def test_a_run_whose_loss_is_not_finite_still_ends(federate):
    """Nothing is fitted to it; the report and the model come after."""
    server = federate(start=False).server
    server.state.losses = [5.0, 4.0, 3.5, math.nan]
    assert bounds(server) is None
