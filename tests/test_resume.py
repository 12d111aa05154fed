"""A run that was stopped and started again is the run that was never stopped, bit for bit."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from in_process import InProcessGrid, Stopped, copy_base, stop_at, worker_of

from sam_ds.errors import InputError, RunStopped
from sam_ds.federation import strategy as strategy_module
from sam_ds.federation.metrics import read_records
from sam_ds.federation.run import run_server
from sam_ds.federation.state import checkpoints, save_checkpoint

OVERRIDES = ("federation.rounds=4", "federation.server_optimizer=momentum", "federation.server_lr=0.5",
             "evaluation.max_tokens=32", "evaluation.test_tokens=32")  # fmt: skip
CLOCKS = ("wall_seconds", "evaluation_seconds", "work_seconds", "orchestration_seconds", "train_seconds",
          "load_seconds", "orchestration_share", "standin_seconds", "bytes_up", "bytes_down", "config")  # fmt: skip


@pytest.fixture
def run(tiny, new_worker):
    """`run(folder)` starts, or goes on with, the run in that folder."""

    def start(folder, *overrides):
        config = tiny.config(folder, *OVERRIDES, *overrides)
        if not (folder / "base").exists():
            copy_base(tiny, folder)
        with worker_of(new_worker()):
            run_server(InProcessGrid(config.federation.clients), config)

    return start


def records(folder):
    """Without what a clock decides; message sizes hold the time stamps of the metrics."""
    return [{k: v for k, v in record.items() if k not in CLOCKS} for record in read_records(folder / "metrics.jsonl")]


def newest(folder):
    return checkpoints(folder / "checkpoints")[-1]


def assert_same_run(one, other):
    """Checkpoints and model byte for byte, and nothing beside them that an interruption has left."""
    assert records(one) == records(other)
    files = [{path.relative_to(folder) for path in folder.rglob("*") if path.is_file()} for folder in (one, other)]
    assert files[0] == files[1]
    for file in files[0]:
        if file.parts[0] in ("checkpoints", "model"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    raw = [[r["bytes_up"]["raw"] for r in read_records(f / "metrics.jsonl") if "bytes_up" in r] for f in (one, other)]
    assert raw[0] == raw[1]


@pytest.fixture(scope="module")
def whole(tiny, new_worker, tmp_path_factory):
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    copy_base(tiny, folder)
    with worker_of(new_worker()):
        run_server(InProcessGrid(6), tiny.config(folder, *OVERRIDES))
    return folder


def test_a_whole_run_leaves_everything(whole):
    assert {path.name for path in whole.iterdir()} >= {
        "base", "checkpoints", "config.toml", "metrics.jsonl", "model", "report.html",
    }  # fmt: skip
    kinds = [record["kind"] for record in records(whole)]
    assert kinds == ["run", "round", *["client", "client", "client", "round"] * 4, "end"]


@pytest.mark.parametrize("round_", [0, 2, 4])
@pytest.mark.parametrize("when", ["before", "after"])
def test_stopped_at_a_checkpoint(whole, run, tmp_path, monkeypatch, round_, when):
    """Killed just before a checkpoint of a round is in its place, or just after."""
    folder = tmp_path / "run"

    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "save_checkpoint", stop_at(round_, when))
        with pytest.raises(Stopped):
            run(folder)
    run(folder)
    assert_same_run(whole, folder)


def test_what_the_server_learns_of_clients_is_resumed(run, tmp_path, monkeypatch):
    """The plan of a round depends on the feedback of those before it."""
    overrides = ("federation.score=fitness", "federation.rounds=2", "federation.clients_per_round=6")
    run(tmp_path / "whole", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "save_checkpoint", stop_at(1, "after"))
        with pytest.raises(Stopped):
            run(tmp_path / "run", *overrides)
    run(tmp_path / "run", *overrides)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_stopped_in_the_middle_of_a_line(whole, run, tmp_path, monkeypatch):
    """In round 3, the log cut within its last record."""
    folder = tmp_path / "run"

    def crash(state, *args, **kwargs):
        if state.round == 3:
            raise Stopped
        return save_checkpoint(state, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(strategy_module, "save_checkpoint", crash)
        with pytest.raises(Stopped):
            run(folder)
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    run(folder)
    assert_same_run(whole, folder)


def test_a_full_disk_stops_the_run_which_goes_on_from_the_checkpoint_before(whole, run, tmp_path, monkeypatch):
    folder, replace = tmp_path / "run", os.replace

    def full(source, target):
        if str(target).endswith("round-00003.safetensors"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(RunStopped, match=f"cannot write {folder}/checkpoints/round-00003.safetensors: No space"):
            run(folder)
    assert newest(folder).name == "round-00002.safetensors"
    assert len(list((folder / "checkpoints").iterdir())) == 3
    run(folder)
    assert_same_run(whole, folder)


def test_what_an_interruption_left_is_removed(whole, run, tmp_path):
    """Half a model, half a conversion, half a checkpoint, and replies in the spool; without a configuration the run
    has not begun, and the conversion is made anew."""
    folder = tmp_path / "run"
    for name in (".model.4711/model.safetensors", ".base.4711/config.json", "spool/reply-000000.bin",
                 "checkpoints/.round-00002.safetensors.4711"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(b"half")
    run(folder)
    assert_same_run(whole, folder)


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_finished_run_only_ends_again(whole, run, stopped):
    run(stopped)
    assert_same_run(whole, stopped)


def test_a_damaged_checkpoint_is_named_with_the_older_one(whole, run, stopped):
    path = newest(stopped)
    path.write_bytes(path.read_bytes()[:-1])
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match="round-00004.safetensors .* delete it to resume from round-00003"):
        run(stopped)
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before
    path.unlink()
    run(stopped)
    assert_same_run(whole, stopped)


@pytest.mark.parametrize(("changed", "message"), [
    ("method=fedavg", "other tensors than this model and method train"),
    ("federation.clients=7", "federation.clients = 7, but the checkpoint is of 6"),
])  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused_and_its_configuration_kept(run, stopped, changed, message):
    before = (stopped / "config.toml").read_bytes()
    with pytest.raises(InputError, match=message):
        run(stopped, changed)
    assert (stopped / "config.toml").read_bytes() == before
