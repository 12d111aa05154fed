"""Low-rank rows merged and redrawn: the model stays what it is, on the server, on every client and after a stop."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from in_process import (
    Federation,
    InProcessGrid,
    Stopped,
    assert_equal_states,
    copy_base,
    stop_at,
    task_for,
    worker_of,
)

from sam_ds.clients.generations import drop_before, generation, weights_folder
from sam_ds.clients.worker import Worker
from sam_ds.errors import InputError
from sam_ds.experts.attention import updated_maps
from sam_ds.experts.factors import load_factors
from sam_ds.experts.nf4 import to_nf4
from sam_ds.federation import strategy as strategy_module
from sam_ds.federation.metrics import read_records
from sam_ds.federation.run import prepare, run_server
from sam_ds.federation.setup import clients_of, corpus_of
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.wire.payload import ExpertUnit, SharedUnit, unit_name

TIERS = ("small", "medium", "large")
LORA = tuple(f"tiers.{tier}.trains=lora" for tier in TIERS)
LARGE = 5  # a client of the tier that holds all experts
EVERY = (*LORA, "train.redraw_every=2", "federation.rounds=5", "federation.server_optimizer=momentum",
         "runtime.keep_checkpoints=2", "train.attention_rank=2")  # fmt: skip


@pytest.fixture(scope="module")
def federation(tiny, one_rank, tmp_path_factory):
    """After five rounds: two redraws, and one round of the third generation."""
    run = tmp_path_factory.mktemp("run")
    config = tiny.config(run, *EVERY)
    base = prepare(config)
    worker = Worker(config, base, clients_of(config, corpus_of(config)), [one_rank])
    yield Federation.of(config, base, worker).start()
    worker.close()


@torch.no_grad()
def logits(model, ids, everything):
    with model.active(everything):
        return model.eval()(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def engine_logits(engine, task, ids):
    engine.load(task)
    engine._visit(whole=True)
    return engine.engine.module.eval()(input_ids=ids, use_cache=False).logits


def rows(state):
    """What is merged: of the experts and of the attention."""
    return {unit: value for unit, value in state.units.items() if unit_name(unit).endswith(("_rows", ".lora.b_Ro"))}


def test_a_generation_is_known_from_the_round(tiny, tmp_path):
    config = tiny.config(tmp_path, *LORA, "train.redraw_every=3")
    assert [generation(config, round_) for round_ in range(1, 9)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert generation(tiny.config(tmp_path, *LORA), 100) == 0


def test_a_redraw_leaves_the_function_and_forgets_the_rows(tiny, tmp_path):
    run = Federation.of(tiny.config(tmp_path, *EVERY), copy_base(tiny, tmp_path))
    server, ids = run.server, torch.randint(50, (2, 20))
    for unit, value in rows(server.state).items():
        rng = np.random.default_rng(len(server.state.moments))
        server.state.units[unit] = rng.normal(size=value.shape).astype(np.float32)
        server.state.moments[unit] = (np.ones_like(value),)
    server.follow_state()
    frozen = ("_in", "down_out", "a_iR")
    factors = {name: p.clone() for name, p in server.model.named_parameters() if name.endswith(frozen)}
    assert {unit.layer for unit in rows(server.state) if isinstance(unit, ExpertUnit)} == {0, 1}
    assert sum(isinstance(unit, SharedUnit) for unit in rows(server.state)) == 8
    before = logits(server.model, ids, 8)
    server.state.round = 2
    server.state.ever_held[0, 0, :3] = True
    server.redraw()
    server.follow_state()
    torch.testing.assert_close(logits(server.model, ids, 8), before, rtol=1e-4, atol=1e-4)
    assert not any(value.any() for value in rows(server.state).values()) and not server.state.moments
    assert server.state.downloads == 3 and not server.state.ever_held.any()
    for name, value in factors.items():
        assert not torch.equal(server.model.get_parameter(name), value), name


def test_clients_go_on_from_the_servers_model(federation):
    """One that holds all experts computes what the server's model does, whichever generation its engine was in."""
    server, worker = federation.server, federation.worker
    engine = worker.engine("large", "lora")
    ids = torch.randint(50, (2, 20))
    assert all(value.any() for unit, value in rows(server.state).items() if isinstance(unit, SharedUnit))
    engine.load(task_for(server, LARGE))
    ours = engine_logits(engine, task_for(server, LARGE, round_=6), ids)
    torch.testing.assert_close(ours, logits(server.model, ids, 8), rtol=1e-4, atol=1e-4)


def test_clients_in_4_bits_quantize_the_merged_attention_anew(tiny, one_rank, tmp_path):
    """What the server's becomes in 4 bits is what an engine has in that generation."""
    nf4 = ("tiers.large.precision=nf4", "tiers.large.ds_config=nf4_16gb.json")
    config, base = tiny.config(tmp_path, *EVERY, *nf4), copy_base(tiny, tmp_path)
    server = Federation.of(config, base).server
    for unit, value in rows(server.state).items():
        server.state.units[unit] = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
    server.follow_state()
    server.state.round = 2
    server.redraw()
    worker = Worker(config, base, [], [one_rank])
    engine = worker.engine("large", "lora")
    to_nf4(server.model, dtype=torch.bfloat16)
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    expected = torch.stack([linear(x) for linear in updated_maps(server.model).values()])
    for round_, same in ((3, True), (1, False), (4, True)):
        engine.load(task_for(server, LARGE, round_=round_))
        found = torch.stack([linear(x) for linear in updated_maps(engine.engine.module).values()])
        assert torch.equal(found, expected) == same
    worker.close()


def test_old_weights_go_with_the_last_checkpoint_that_needs_them(federation):
    """Checkpoints of rounds 4 and 5 are there, and both go on in the third generation; one more is kept."""
    base = federation.run / "base"
    assert sorted(path.name for path in (federation.run / "redrawn").iterdir()) == ["00001", "00002"]
    assert weights_folder(base, 2).is_dir() and base.is_dir()
    assert [record.get("generation") for record in federation.records("round")] == [None, None, 1, None, 2, None]
    drop_before(base, 2)
    assert weights_folder(base, 2).is_dir() and not weights_folder(base, 1).exists()


@pytest.mark.parametrize(("when", "round_"), [
    ("before", 2), ("after", 2), ("after", 3),
    *(pytest.param(when, round_, marks=pytest.mark.slow)
      for when, round_ in (("before", 1), ("after", 1), ("before", 3), ("before", 4), ("after", 4))),
])  # fmt: skip
def test_a_run_stopped_around_a_redraw_goes_on_as_if_it_had_not(
    tiny, one_rank, federation, tmp_path, monkeypatch, round_, when
):
    config = tiny.config(tmp_path, *EVERY)
    base = tmp_path / "base"

    def start():
        prepare(config)
        worker = Worker(config, base, clients_of(config, corpus_of(config)), [one_rank])
        with worker_of(worker):
            run_server(InProcessGrid(config.federation.clients), config)
        worker.close()

    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "save_checkpoint", stop_at(round_, when))
        with pytest.raises(Stopped):
            start()
    start()
    newest = checkpoints(tmp_path / "checkpoints")[-1]
    assert_equal_states(load_checkpoint(newest), federation.server.state)
    end = [record for record in read_records(tmp_path / "metrics.jsonl") if record["kind"] == "end"][-1]
    state = federation.server.state
    answers = {(record["client"], generation(config, record["round"])) for record in federation.records("client")}
    later = sum(due > 0 for _, due in answers)
    factors = (len(answers) - later) * sum(value.nbytes for value in load_factors(base).values())
    assert state.downloads > 0 and end["bytes_base"] == federation.server.base_expert_bytes() * (
        state.downloads + int(state.ever_held.sum())) + later * 4 * 2 * 4 * 32 * 32 + factors > factors > 0


@pytest.mark.parametrize(("change", "message"), [
    ("train.redraw_every=0", "train.redraw_every = 0 and seed = 0 are not those of the run's 5 rounds"),
    ("train.redraw_every=3", "train.redraw_every = 3 and seed = 0"), ("seed=1", "train.redraw_every = 2 and seed = 1"),
])  # fmt: skip
def test_a_run_goes_on_with_its_own_redraws_only(tiny, federation, change, message):
    config = tiny.config(federation.run, *EVERY, change)
    before = (federation.run / "config.toml").exists()
    with pytest.raises(InputError, match=message):
        prepare(config)
    assert (federation.run / "config.toml").exists() == before


def test_lost_weights_of_a_generation_are_said(tiny, federation, tmp_path):
    shutil.copytree(federation.run, tmp_path / "run")
    (tmp_path / "run" / "redrawn" / "00002" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="the weights of round 6 on, .* cannot be read"):
        prepare(tiny.config(tmp_path / "run", *EVERY))


@pytest.mark.parametrize("overrides", [(), ("method=fedit",), LORA[:2]])
def test_what_has_no_slices_is_refused(tiny, tmp_path, overrides):
    with pytest.raises(InputError, match=r"train.redraw_every = 2 is of low-rank slices: give 0, or method = 'sam'"):
        tiny.config(tmp_path, "train.redraw_every=2", *overrides)
