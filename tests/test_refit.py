"""Stand-ins refitted to experts that have changed: the conversion's own fit, on the server, and then everywhere."""

from __future__ import annotations

from dataclasses import replace

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
from reference import layer_input
from safetensors.torch import load_file

from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.experts.calibrate import refit_layer
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.federation import strategy as strategy_module
from sam_ds.federation.run import run_server
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.wire.payload import ExpertUnit

REFIT = ("federation.refit_standins=true", "federation.rounds=3")
LORA = tuple(f"tiers.{tier}.trains=lora" for tier in ("small", "medium", "large"))
MEDIUM = 4


@pytest.fixture
def new_server(tiny, tmp_path):
    return lambda *overrides: Federation.of(tiny.config(tmp_path, *REFIT, *overrides), tiny.base).server


def cores(model):
    return torch.stack([layer.sam.core_SQp for layer in model.sam_layers])


def drift(server, size):
    """Every expert's own tensors become others, as after training."""
    rng = np.random.default_rng(0)
    for unit, value in server.state.units.items():
        if isinstance(unit, ExpertUnit) and unit.tensor != "wg":
            server.state.units[unit] = value + rng.normal(scale=size, size=value.shape).astype(np.float32)
    server.follow_state()


def test_experts_as_they_were_found_keep_their_standins(new_server):
    server = new_server()
    before = cores(server.model).clone()
    assert server.refit_standins() > 0
    torch.testing.assert_close(cores(server.model), before, atol=1e-5 * float(before.abs().max()), rtol=1e-4)
    np.testing.assert_array_equal(server.state.standins, cores(server.model))


@torch.no_grad()
def test_standins_follow_the_experts(new_server):
    """The first layer's error over its routes, relative to all visited, is that of a fresh fit; bases stay."""
    server = new_server()
    drift(server, 0.1)
    model, layer = server.model, server.model.sam_layers[0]
    ids_BS = server.public.calibration
    bases = [layer.sam.basis_dq.clone(), layer.sam.spread_pd.clone()]

    def error():
        x_Td = layer_input(model, layer, [ids_BS])
        with model.active(8):
            exact_Td = layer(x_Td)
        return float((layer(x_Td) - exact_Td).square().mean())

    stale = error()
    server.refit_standins()
    assert error() < 0.9 * stale
    assert torch.equal(bases[0], layer.sam.basis_dq) and torch.equal(bases[1], layer.sam.spread_pd)
    for own in model.sam_layers:
        assert not own.sam.core_SQp[:2].any()
        torch.testing.assert_close(own.sam.core_all_Qp, own.sam.core_SQp.sum(0))


def test_low_rank_updates_are_part_of_what_is_fitted(new_server):
    """As if they were folded in; a token at a tie may take another route."""
    server = new_server(*LORA)
    found = cores(server.model).clone()
    drift(server, 0.3)
    server.refit_standins()
    ours = cores(server.model).clone()
    assert server.model.sam_layers[0].lora.up_rows.any()
    server.model.fold_lora()
    server.refit_standins()
    assert torch.dist(ours, cores(server.model)) < 1e-2 * ours.norm()
    assert torch.dist(ours, found) > 0.1 * ours.norm()


def test_the_layers_before_are_the_refitted_ones(new_server):
    server = new_server()
    drift(server, 0.1)
    server.refit_standins()
    ids_BS = server.public.calibration
    layer = server.model.sam_layers[1]
    own = refit_layer(layer, layer_input(server.model, layer, [ids_BS]), seed=server.config.seed + 1)
    torch.testing.assert_close(own, layer.sam.core_SQp, atol=1e-5 * float(own.abs().max()), rtol=1e-3)


def test_clients_compute_with_what_they_are_sent(new_server, new_worker):
    server, worker = new_server(), new_worker()
    drift(server, 0.1)
    server.refit_standins()
    task = task_for(server, MEDIUM)
    old = replace(task, standins=None)
    stale, fresh = worker.train(old), worker.train(task)
    assert fresh.loss_first != stale.loss_first
    layers = worker.engine("medium", "full").layers
    for layer, core_EQp, held in zip(layers, task.standins, task.held, strict=True):
        np.testing.assert_array_equal(layer.sam.core_SQp, core_EQp[list(held)])
        np.testing.assert_array_equal(layer.sam.core_all_Qp, torch.from_numpy(core_EQp).sum(0))
    assert worker.train(old).loss_first == stale.loss_first
    assert worker.train(task).loss_first == fresh.loss_first


def run(tiny, worker, folder):
    config = tiny.config(folder, *REFIT)
    if not (folder / "base").exists():
        copy_base(tiny, folder)
    with worker_of(worker):
        run_server(InProcessGrid(config.federation.clients), config)
    return load_checkpoint(checkpoints(folder / "checkpoints")[-1])


def test_a_run_refits_logs_sends_and_saves_and_resumes_with_it(tiny, new_worker, tmp_path, monkeypatch):
    """Killed right after the checkpoint of the round that refitted, after round 2 of 3."""
    whole = run(tiny, new_worker(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "save_checkpoint", stop_at(2, "after"))
        with pytest.raises(Stopped):
            run(tiny, new_worker(), tmp_path / "stopped")
    assert_equal_states(run(tiny, new_worker(), tmp_path / "stopped"), whole)
    saved = [load_file(tmp_path / name / "model" / "sam.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    np.testing.assert_array_equal(cores(from_pretrained(tmp_path / "whole" / "model")), whole.standins)
    assert not torch.equal(torch.from_numpy(whole.standins), cores(from_pretrained(tiny.base)))
    federation = Federation.of(tiny.config(tmp_path / "whole", *REFIT), tiny.base)
    rounds = federation.records("round")
    assert [("standin_seconds" in record) for record in rounds] == [False, False, True, False]
    for record in federation.records("client"):
        more = record["bytes_down"]["raw"] - record["bytes_up"]["raw"]
        assert more == (whole.standins.nbytes if record["round"] == 3 else 0)


def test_nothing_to_refit_is_refused():
    with pytest.raises(InputError, match="federation.refit_standins = true, but sam.standin = 'none'"):
        load_config(None, ["federation.refit_standins=true", "sam.standin=none"])
