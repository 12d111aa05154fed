"""A client's work is a function of its task: nothing of who trained before, or where, is in the answer."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from in_process import Federation, task_for

from sam_ds.federation.metrics import active_flops
from sam_ds.federation.participation import ClientPlan
from sam_ds.wire.payload import ExpertUnit

SMALL, MEDIUM, LARGE = 0, 4, 5  # clients of these tiers: 4, 6 and 8 experts, a token visits 4


def every(*values):
    return tuple(f"tiers.{tier}.{value}" for tier in ("small", "medium", "large") for value in values)


KINDS = {
    "full": (),
    "bf16": every("precision=bf16", "ds_config=bf16_48gb.json"),
    "lora": (*every("trains=lora"), "train.attention_rank=2"),
    "nf4": (*every("trains=lora", "precision=nf4", "ds_config=nf4_16gb.json"), "tiers.small.ds_config=nf4_8gb.json",
            "train.attention_rank=2"),
    "all": ("method=fedavg",),
    "lora-both": ("method=fedit", "train.attention_rank=2"),
}  # fmt: skip


@pytest.fixture(params=KINDS, scope="module")
def kind(request, tiny, new_worker, tmp_path_factory):
    """A worker and a server of a method, by what trains."""
    overrides = KINDS[request.param]
    server = Federation.of(tiny.config(tmp_path_factory.mktemp("run"), *overrides), tiny.base).server
    assert server.trains == {"nf4": "lora", "bf16": "full"}.get(request.param, request.param)
    return new_worker(*overrides), server


def assert_same(one, other):
    assert one.deltas.keys() == other.deltas.keys()
    for unit, delta in one.deltas.items():
        np.testing.assert_array_equal(delta, other.deltas[unit], err_msg=str(unit))
    for mine, yours in zip(one.counters, other.counters, strict=True):
        np.testing.assert_array_equal(mine, yours)
    assert (one.loss_first, one.loss_last) == (other.loss_first, other.loss_last)


def test_same_task_same_answer_whoever_trained_between(kind):
    worker, server = kind
    task = task_for(server, MEDIUM)
    first = worker.train(task)
    worker.train(task_for(server, 1, round_=3))  # the same tier, and so the same engine
    worker.train(task_for(server, LARGE, round_=2))
    worker.register(MEDIUM, "medium", server.trains)
    assert_same(first, worker.train(task))
    assert any(delta.any() for delta in first.deltas.values())


def live_bytes():
    """Of all tensors that something still holds."""
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        # Not isinstance, which asks things that answer with a warning for their class.
        if issubclass(type(value), torch.Tensor):
            storage = value.untyped_storage()
            # What a compiler that has run in this process keeps has no memory, hence no pointer.
            with contextlib.suppress(RuntimeError):
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_stays_what_it_was_over_fifty_rounds(kind):
    """Clients of every tier come and go; the first of each tier builds its engine, and no round after it leaves
    anything behind."""
    worker, server = kind
    for client in (SMALL, MEDIUM, LARGE):
        worker.train(task_for(server, client))
    before = live_bytes()
    for round_ in range(2, 52):
        worker.train(task_for(server, (SMALL, MEDIUM, LARGE)[round_ % 3], round_=round_))
    assert live_bytes() <= 1.001 * before


def test_round_and_held_experts_matter(kind):
    worker, server = kind
    first = worker.train(task_for(server, MEDIUM))
    assert worker.train(task_for(server, MEDIUM, round_=2)).loss_first != first.loss_first
    if server.method.sparse:
        assert worker.train(task_for(server, MEDIUM, seed=1)).loss_first != first.loss_first


def test_answer_has_the_units_of_the_task_and_no_other(kind):
    worker, server = kind
    for client in (SMALL, MEDIUM, LARGE):
        task = task_for(server, client)
        result = worker.train(task)
        assert result.deltas.keys() == task.units.keys()
        for unit, delta in result.deltas.items():
            assert delta.shape == task.units[unit].shape and delta.dtype == np.float32
            if isinstance(unit, ExpertUnit):
                assert unit.expert in task.held[unit.layer]
            elif unit.name.endswith(".lora.b_Ro"):
                assert delta.any()
        updates = [unit for unit in result.deltas if str(unit).count(".lora.b_Ro")]
        assert len(updates) == (8 if "lora" in server.trains else 0)
        assert result.examples == len(worker.rows(client)) == worker.register(
            client, task.tier, task.trains)[0]  # fmt: skip
        assert result.tokens == 2 * 4 * 16


def test_a_learning_rate_of_nothing_changes_nothing(kind, monkeypatch):
    worker, server = kind
    monkeypatch.setattr("sam_ds.clients.worker.learning_rate", lambda *_: 0.0)

    for client in (SMALL, MEDIUM):
        result = worker.train(task_for(server, client))
        assert not any(delta.any() for delta in result.deltas.values())


def test_starts_from_the_units_of_the_task(kind):
    """Two tasks that differ in one unit differ in the first loss."""
    worker, server = kind
    task = task_for(server, MEDIUM)
    first = worker.train(task).loss_first
    shifted = {unit: value + 0.05 if "down" in str(unit) else value for unit, value in task.units.items()}
    assert worker.train(replace(task, units=shifted)).loss_first != first
    assert worker.train(task).loss_first == first


def test_the_assembler_learns_from_the_credited_edges(kind):
    """What a client sends moves every part of it, and depends on the condition that the client was given."""
    worker, server = kind
    task = task_for(server, MEDIUM)
    parts = {unit: delta for unit, delta in worker.train(task).deltas.items() if "assembler." in str(unit)}
    assert len(parts) == (6 if server.method.sparse else 0)
    assert all(delta.any() for delta in parts.values())
    if parts:
        other = worker.train(replace(task, condition=-task.condition)).deltas
        assert not any(np.array_equal(delta, other[unit]) for unit, delta in parts.items())


def test_counters(kind):
    worker, server = kind
    task = task_for(server, MEDIUM)
    result = worker.train(task)
    if not server.method.sparse:
        assert result.counters == []
        return
    tokens = result.tokens
    for layer, counts in enumerate(result.counters):
        slots, roots, top_k = len(task.held[layer]), server.config.sam.roots, server.model.sam_layers[layer].top_k
        assert counts.shape == (3, slots, slots) and counts.dtype == np.int64
        used, offered, together = counts
        assert (counts >= 0).all() and not np.tril(counts).any()
        assert (used <= offered).all()
        # Each choice beside the roots credits one edge; only a token that ran out of edges makes fewer.
        assert 0 < used.sum() <= tokens * (top_k - roots)
        assert together.sum() <= tokens * top_k * (top_k - 1) / 2
        assert together[0, 1] == tokens  # both are roots


def test_registration(kind):
    worker, server = kind
    for client in (SMALL, LARGE):
        examples, scores, rates = worker.register(client, server.tiers[client], server.trains)
        assert examples == len(worker.rows(client))
        assert scores.shape == rates.shape == (2, 8)
        assert scores.dtype == rates.dtype == np.float32 and np.isfinite(scores).all()
        assert (rates >= 0).all() and (rates <= 1).all() and (rates[:, :2] == 1).all()
        # Over the full graph every token finds as many experts as it may visit.
        budgets = [layer.top_k for layer in server.model.sam_layers]
        np.testing.assert_allclose(rates.sum(1), budgets, rtol=1e-5)


@pytest.mark.parametrize("method", KINDS)
def test_registration_does_not_depend_on_who_trained_before(tiny, one_rank, tmp_path, method):
    """In an engine that nobody has used yet, and in one that others trained in since."""
    from sam_ds.clients.worker import Worker
    from sam_ds.federation.setup import clients_of, corpus_of

    config = tiny.config(tmp_path, *KINDS[method])
    server = Federation.of(config, tiny.base).server
    worker = Worker(config, tiny.base, clients_of(config, corpus_of(config)), [one_rank])
    _, scores, rates = worker.register(MEDIUM, "medium", server.trains)
    for client in (MEDIUM, 1):
        worker.train(task_for(server, client))
        _, scores_after, rates_after = worker.register(MEDIUM, "medium", server.trains)
        np.testing.assert_array_equal(scores_after, scores)
        np.testing.assert_array_equal(rates_after, rates)
    worker.close()


def test_dense_methods_use_one_engine_whichever_client_comes_first(tiny, one_rank):
    from sam_ds.clients.worker import Worker

    config = tiny.config(tiny.base, "method=fedavg", "tiers.small.ds_config=cpu_zero0.json")
    worker = Worker(config, tiny.base, [], [one_rank])
    assert worker.engine("small", "all") is worker.engine("large", "all")
    assert worker.engine("small", "all").engine.zero_optimization_stage() == 2
    worker.close()


def test_learning_rate_rises_falls_and_decays_over_the_rounds():
    from sam_ds.clients.worker import learning_rate
    from sam_ds.config import load_config

    config = load_config(None, ["train.lr=1.0", "train.steps=8", "train.warmup_steps=1", "train.final_lr=0.5",
                                "federation.rounds=5"])  # fmt: skip
    assert [learning_rate(config, 1, step) for step in range(8)] == [0.5, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert [learning_rate(config, round_, 1) / 0.875 for round_ in range(1, 7)] == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]


@pytest.mark.parametrize(("whole", "routed"), [(1.0, 0), (0.5, 1), (0.0, 2)])
def test_whole_steps_visit_all_experts_held(tiny, new_worker, tmp_path, whole, routed):
    """Nothing is routed in them, so nothing is counted; the tiny run has two local steps."""
    overrides = (f"train.whole={whole}",)
    server = Federation.of(tiny.config(tmp_path / "run", *overrides), tiny.base).server
    result = new_worker(*overrides).train(task_for(server, LARGE))
    steps = server.config.train.steps
    assert steps == 2
    for _, _, together in result.counters:
        assert together[0, 1] == result.tokens * routed / steps
    gate = [delta for unit, delta in result.deltas.items() if isinstance(unit, ExpertUnit) and unit.tensor == "wg"]
    assert any(delta.any() for delta in gate) == (routed > 0)


@pytest.mark.parametrize(("share", "steps"), [
    (0.0, [0, 0, 0, 0, 0, 0]), (0.67, [0, 1, 1, 0, 1, 1]), (0.1, [0, 0, 0, 0, 0, 0]), (1.0, [1, 1, 1, 1, 1, 1]),
])  # fmt: skip
def test_what_whole_steps_cost_is_counted_exactly(tiny, tmp_path, share, steps):
    """0.67 of six steps are four, 0.1 of them none."""

    def flops(whole):
        config = tiny.config(tmp_path / "run", "train.steps=6", f"train.whole={whole}")
        server = Federation.of(config, tiny.base).server
        task = task_for(server, LARGE)
        client = ClientPlan(
            client=LARGE, tier=task.tier, experts=task.held, h=np.ones((2, 8)), pi=1.0, sent=task.sent
        )  # fmt: skip
        return config.train.whole_steps(), active_flops(server, client, 600)

    done, counted = flops(share)
    assert done == [bool(step) for step in steps]
    none, every = flops(0.0)[1], flops(1.0)[1]
    assert every > none
    assert counted == pytest.approx(none + sum(steps) / 6 * (every - none), rel=1e-12)
