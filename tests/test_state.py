"""A checkpoint comes back bit for bit, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
from in_process import assert_equal_states

from sam_ds.errors import InputError, RunStopped
from sam_ds.federation import state as state_module
from sam_ds.federation.metrics import MetricsLog, read_records
from sam_ds.federation.setup import hold
from sam_ds.federation.state import ServerState, checkpoints, load_checkpoint, save_checkpoint, write_atomically
from sam_ds.graph.editlog import EditLog
from sam_ds.graph.edits import Edit
from sam_ds.wire.payload import ExpertUnit, SharedUnit


def random_state(round_=3, *, moments=2, seed=0):
    """N = 3, L = 2, E = 4."""
    rng = np.random.default_rng(seed)
    units = {
        ExpertUnit(0, 1, "up"): rng.normal(size=(4, 3)).astype(np.float32),
        ExpertUnit(1, 10, "down"): rng.normal(size=(3, 4)).astype(np.float32)[:, ::2],  # not contiguous
        SharedUnit("assembler.mix/x"): np.array([np.inf, -0.0, 1e-45], np.float32),
        SharedUnit("scalar"): np.float32(2.5).reshape(()),
    }
    counters = {name: rng.integers(0, 2**60, size=(2, 4, 4)) for name in ("used", "offered", "together", "used_total")}
    return ServerState(
        round=round_, units=units,
        moments={unit: tuple(rng.normal(size=v.shape).astype(np.float32) for _ in range(moments))
                 for unit, v in list(units.items())[:3]} if moments else {},
        graph=rng.random((2, 4, 4)) < 0.5, scores=rng.normal(size=(3, 2, 4)).astype(np.float32),
        rates=rng.random((3, 2, 4)).astype(np.float32), examples=rng.integers(1, 99, size=3),
        fitness=rng.random((3, 2, 4)), load=rng.random((2, 4)),
        ever_held=rng.random((3, 2, 4)) < 0.5, losses=[3.1, 0.1 + 0.2], gamma=1 / 3, **counters,
        edits=EditLog().append(1, [Edit(layer=0, tail=0, head=3, kind="promote")]).append(
            3, [Edit(layer=1, tail=0, head=2, kind="prune"), Edit(layer=0, tail=0, head=3, kind="prune")]),
        standins=rng.normal(size=(2, 4, 3, 5)).astype(np.float32) if moments else None,
    )  # fmt: skip


@pytest.mark.parametrize("moments", [0, 1, 2])
def test_round_trip(tmp_path, moments):
    before = random_state(moments=moments)
    path = save_checkpoint(before, tmp_path / "deep" / "checkpoints", keep=3)
    assert path.name == "round-00003.safetensors"
    after = load_checkpoint(path)
    assert_equal_states(before, after)
    assert save_checkpoint(after, tmp_path, keep=3).read_bytes() == path.read_bytes()
    for unit, value in before.units.items():
        assert after.units[unit].tobytes() == value.tobytes() and after.units[unit].dtype == value.dtype


def test_every_truncation_is_refused_and_left_alone(tmp_path):
    path = save_checkpoint(random_state(), tmp_path, keep=3)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {*range(0, header, 61), *range(header - 3, header + 3), *range(header, len(whole), 29), len(whole) - 1}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="cannot be read .* start the run anew"):
            load_checkpoint(path)
        assert path.read_bytes() == whole[:length]
    assert os.listdir(tmp_path) == [path.name]


def test_every_flipped_bit_is_found(tmp_path):
    """In the tensors, their names, types and shapes, and the numbers beside them."""
    before = random_state()
    path = save_checkpoint(before, tmp_path, keep=3)
    whole = path.read_bytes()
    harmless = 0
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in [*range(header), *range(header, len(whole), 7)]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            after = load_checkpoint(path)
        except InputError:
            continue
        # The header is padded with blanks.
        assert_equal_states(before, after)
        harmless += 1
    assert harmless <= 8


@pytest.mark.parametrize(
    "old, new", [(b'\\"round\\": 3', b'\\"round\\": 4'), (b"0.33333", b"0.93333"), (b'"I64"', b'"U64"'),
                 (b"[3,2,4]", b"[2,3,4]")],
)  # fmt: skip
def test_altered_header_is_found(tmp_path, old, new):
    path = save_checkpoint(random_state(), tmp_path, keep=3)
    whole = path.read_bytes()
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(InputError, match="checksum"):
        load_checkpoint(path)


def test_the_message_names_the_older_one(tmp_path):
    save_checkpoint(random_state(2), tmp_path, keep=3)
    path = save_checkpoint(random_state(3), tmp_path, keep=3)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="delete it to resume from round-00002.safetensors"):
        load_checkpoint(path)


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "_VERSION", 4)
    path = save_checkpoint(random_state(), tmp_path, keep=3)
    monkeypatch.undo()
    with pytest.raises(InputError, match="has version 4, this package reads 3"):
        load_checkpoint(path)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    (tmp_path / "round-00000.safetensors.mine").write_text("kept")
    for round_ in (0, 1, 2, 9, 10, 11):
        save_checkpoint(random_state(round_), tmp_path, keep=keep)
    names = [f"round-{round_:05d}.safetensors" for round_ in (9, 10, 11)][-keep:]
    assert [path.name for path in checkpoints(tmp_path)] == names
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "round-00000.safetensors.mine"])


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_crash_while_writing_keeps_the_old_one(tmp_path, monkeypatch, broken):
    old = random_state(3, seed=1)
    path = save_checkpoint(old, tmp_path, keep=3)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    for state, keep in ((random_state(3, seed=2), 3), (random_state(4, seed=2), 1)):
        name = f"round-0000{state.round}.safetensors: No space left on device; make room and go on with --resume"
        with pytest.raises(RunStopped, match=name):
            save_checkpoint(state, tmp_path, keep=keep)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    assert_equal_states(load_checkpoint(path), old)


def test_a_disk_that_takes_no_more_keeps_the_old_one(tmp_path):
    """The kernel refuses what is beyond a size."""
    old = random_state(3, seed=1)
    path = save_checkpoint(old, tmp_path, keep=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))
    try:
        with pytest.raises(RunStopped, match=rf"cannot write {tmp_path}/round-00004.safetensors: File too large"):
            save_checkpoint(random_state(4, seed=2), tmp_path, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == [path.name]
    assert_equal_states(load_checkpoint(path), old)


def test_what_a_kill_left_goes_with_the_next_writing(tmp_path):
    (tmp_path / ".round-00003.safetensors.4711").write_bytes(b"half")
    (tmp_path / ".round-00004.safetensors.4711").write_bytes(b"half, of another")
    path = save_checkpoint(random_state(3), tmp_path, keep=3)
    assert sorted(os.listdir(tmp_path)) == [".round-00004.safetensors.4711", path.name]


def test_write_atomically_replaces(tmp_path):
    target = tmp_path / "file"
    for data in (b"", b"old", b"new" * 1000):
        write_atomically(target, data)
        assert target.read_bytes() == data
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------ the log beside it


def client_record(round_, client=0):
    size = {"raw": 4, "encoded": 3, "message": 5}
    return {"kind": "client", "round": round_, "client": client, "bytes_up": size, "bytes_down": size}


def test_rewind_forgets_what_came_after(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", ["ships"])
    log.rewind(-1)
    assert read_records(log.path) == []
    log.write({"kind": "run", "before": {}})
    for round_ in (0, 1, 2, 3):
        log.write(client_record(round_))
        log.write({"kind": "round", "round": round_})
    log.write({"kind": "end"})
    log.rewind(2)
    assert [(r["kind"], r.get("round")) for r in read_records(log.path)] == [
        ("run", None), *[(kind, round_) for round_ in (0, 1, 2) for kind in ("client", "round")],
    ]  # fmt: skip
    log.rewind(-1)
    assert read_records(log.path) == []


def test_a_line_that_a_crash_cut_is_forgotten(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", ["ships"])
    log.write({"kind": "run"})
    log.write(client_record(1))
    whole = log.path.read_text()
    for length in range(0, len(whole), 3):
        log.path.write_text(whole[:length])
        records = read_records(log.path)
        assert [r["kind"] for r in records] == ["run", "client"][: len(re.findall("\n", whole[:length]))]
        log.rewind(1)
        log.write({"kind": "run"})
        assert [json.loads(line) for line in log.path.read_text().splitlines()] == [*records, {"kind": "run"}]


# ------------------------------------------------------------------ the folder around it


def test_a_run_folder_is_one_process_at_a_time(tmp_path):
    """Another process is told who has it; when that one is gone, however, it is free."""
    program = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"4711 on there")
print("held", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(tmp_path / ".running")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"out={tmp_path} is in use by process 4711 on there: wait for it, or end"):
            hold(tmp_path)
        other.kill()
    hold(tmp_path)
    hold(tmp_path)
    assert (tmp_path / ".running").read_text().startswith(f"{os.getpid()} on ")
