"""Weights go into a live engine and come out of it as they were, and nothing of a client stays, in every ZeRO stage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import Federation, Tiny, task_for

from sam_ds.clients.engine import EngineParameters, full_shape, reset_optimizer, set_learning_rate, write_parameters
from sam_ds.config import ds_config_path

LARGE = 5  # of the tier `large`: it holds all experts
MEDIUM = 4  # 6 slots of 8 experts, of which a token visits 4


def test_what_is_written_is_read(new_worker):
    for stage in (0, 2):
        engine = new_worker(f"tiers.large.ds_config=cpu_zero{stage}.json").engine("large", "full").engine
        assert engine.zero_optimization_stage() == stage
        trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        values = {name: torch.randn(full_shape(p)) for name, p in trained.items()}
        write_parameters(engine, values.items())
        for name, value in EngineParameters(engine).items():
            assert torch.equal(value, values[name]), (stage, name)
            assert torch.equal(trained[name].data, values[name]), (stage, name)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_step_starts_from_what_was_written(new_worker, tiny, tmp_path, stage):
    """One master copy left behind, or one moment, and the step would land elsewhere."""
    tier = new_worker(f"tiers.large.ds_config=cpu_zero{stage}.json").engine("large", "full")
    server = Federation.of(tiny.config(tmp_path), tiny.base).server
    task = task_for(server, LARGE)
    ids = torch.arange(64).view(4, 16)

    def one_step():
        tier.load(task)
        loss = tier.step(ids, 1e-2)
        return loss, tier.read(task.held)

    loss, after = one_step()
    tier.step(ids, 1e-2)
    write_parameters(tier.engine, [(n, torch.randn(s)) for n, s in tier._shapes.items() if n.endswith("wg")])
    again, repeated = one_step()
    assert again == loss
    assert all(torch.equal(after[unit], repeated[unit]) for unit in after)
    # Adam's first step is lr * sign(gradient) wherever there is one.
    moved = torch.cat([(after[u] - torch.from_numpy(task.units[u])).flatten() for u in after])
    assert 0.0099 < moved.abs().max() < 0.0101


def test_reset_forgets_moments_and_steps(new_worker, tiny, tmp_path):
    tier = new_worker().engine("large", "full")
    task = task_for(Federation.of(tiny.config(tmp_path), tiny.base).server, LARGE)
    tier.load(task)
    tier.step(torch.arange(64).view(4, 16), 1e-2)
    inner = tier.engine.optimizer.optimizer
    tensors = [v for state in inner.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert any(v.any() for v in tensors)
    reset_optimizer(tier.engine)
    assert not any(v.any() for v in tensors)


def test_learning_rate_reaches_every_group(new_worker):
    engine = new_worker().engine("large", "full").engine
    set_learning_rate(engine, 0.125)
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.125}


# ------------------------------------------------------------------ two ranks


def train_on_two_ranks(rank: int, tiny: Tiny, tiers: dict[str, str], folder: Path) -> None:
    """Runs in a process of its own: the same task in every stage, then another client, then the task again."""
    import torch.distributed as dist

    from sam_ds.clients.task import WorkerGroup
    from sam_ds.clients.worker import Worker
    from sam_ds.federation.setup import clients_of, corpus_of

    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    group = WorkerGroup([0, 1], dist.new_group([0, 1]))
    for name, ds_config in tiers.items():
        overrides = ("runtime.ranks_per_client=2", f"tiers.medium.ds_config={ds_config}")
        config = tiny.config(folder / f"run-{rank}", *overrides)
        server = Federation.of(config, tiny.base).server
        worker = Worker(config, tiny.base, clients_of(config, corpus_of(config)), [group])
        worker.register(MEDIUM, "medium", "full")
        task = task_for(server, MEDIUM)
        first = worker.train(task)
        worker.train(task_for(server, 1, round_=2))
        again = worker.train(task)
        if rank == 0:
            torch.save(
                {
                    "deltas": {str(unit): delta for unit, delta in first.deltas.items()},
                    "again": {str(unit): delta for unit, delta in again.deltas.items()},
                    "counters": first.counters, "again_counters": again.counters,
                },
                folder / f"{name}.pt",
            )  # fmt: skip
        worker.close()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tiny, tmp_path_factory):
    """What two ranks, training one client together, answer in each stage."""
    folder = tmp_path_factory.mktemp("ranks")
    sharded = json.loads(ds_config_path("zero3.json").read_text())
    sharded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "sharded.json").write_text(json.dumps(sharded))
    tiers = {
        "0": "cpu_zero0.json", "2": "cpu_zero2.json", "3": "zero3.json", "sharded": str(folder / "sharded.json"),
        "offload": "zero3_offload_24gb.json",
    }  # fmt: skip
    torch.multiprocessing.spawn(train_on_two_ranks, (tiny, tiers, folder), nprocs=2)
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in tiers}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["0", "2", "3", "sharded", "offload"])
def test_stages_agree_with_each_other_and_with_one_rank(two_ranks, new_worker, tiny, tmp_path, stage):
    """`sharded` is stage 3 without small parameters kept whole on every rank."""
    task = task_for(Federation.of(tiny.config(tmp_path), tiny.base).server, MEDIUM)
    alone = new_worker().train(task)
    found = two_ranks[stage]["deltas"]
    assert found.keys() == {str(unit) for unit in alone.deltas}
    for unit, delta in alone.deltas.items():
        np.testing.assert_allclose(found[str(unit)], delta, atol=1e-5, err_msg=str(unit))
    for mine, theirs in zip(alone.counters, two_ranks[stage]["counters"], strict=True):
        np.testing.assert_array_equal(mine.sum((1, 2)), theirs.sum((1, 2)))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["0", "2", "3", "sharded", "offload"])
def test_nothing_of_another_client_stays(two_ranks, stage):
    found = two_ranks[stage]
    for unit, delta in found["deltas"].items():
        np.testing.assert_array_equal(found["again"][unit], delta, err_msg=unit)
    for mine, theirs in zip(found["counters"], found["again_counters"], strict=True):
        np.testing.assert_array_equal(mine, theirs)
