"""`flwr run` on Flower's own deployment, as `examples/deployment/run.sh` has it, and on its simulation: both times the
launcher's run.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from in_process import SETTINGS
from safetensors.torch import load_file
from test_launch import ROOT, alone

from sam_ds.config import flatten, to_toml
from sam_ds.experts.checkpoint import fingerprint
from sam_ds.federation.grid import identify
from sam_ds.federation.metrics import read_records
from sam_ds.federation.supernode.relay import WorkerDied, free_port, private_folder, relay, stop

TINY = (*SETTINGS, "federation.rounds=2", "federation.clients=3", "federation.edit_every=1", "tiers.large.ranks=2")


def four_ports() -> int:
    """The first of four in a row that nobody listens at, below those that the kernel deals out to whoever connects."""
    while True:
        first = random.SystemRandom().randrange(20000, 32000)
        try:
            with contextlib.ExitStack() as held:
                for port in range(first, first + 4):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            continue
        return first


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_three_nodes_are_the_launchers_run(tiny, one_rank, tmp_path, monkeypatch):
    """One of the nodes has two ranks. The run is the one-rank launcher's to rounding, and nothing is left behind."""
    from sam_ds.federation import launch

    out, scratch = tmp_path / "run", tmp_path.parent / "w"
    scratch.mkdir()
    run = [f'model="{tiny.model}"', f'data="{tiny.corpus}"', *TINY]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PORT": str(four_ports()),
                                "TMPDIR": str(scratch),
                                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    done = subprocess.run([str(ROOT / "examples" / "deployment" / "run.sh"), str(out), *run], env=environment,
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    records = read_records(out / "metrics.jsonl")
    clients = [r for r in records if r["kind"] == "client"]
    assert [(r["client"], r["tier"], r["status"]) for r in clients] == [
        (client, tier, "ok") for _ in range(2) for client, tier in enumerate(("small", "medium", "large"))
    ]

    alone(monkeypatch, launch)
    settings = [*run, f'out="{tmp_path}/launcher"', 'federation.partition="dirichlet"',
                "federation.clients_per_round=3", "tiers.large.ranks=1"]  # fmt: skip
    assert launch.main([part for key in settings for part in ("--set", key)]) == 0
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (out, tmp_path / "launcher"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)
    assert not _left(str(scratch))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_superlink_and_server_are_killed_goes_on_to_the_same_bytes(tiny, tmp_path):
    """SIGKILL for both after the first round; the same command again leaves what a run does that nobody stopped."""
    run = [f'model="{tiny.model}"', f'data="{tiny.corpus}"', *TINY, "federation.rounds=3", "tiers.large.ranks=1"]

    def start(out, scratch, port):
        scratch.mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "PORT": str(port),
                                    "TMPDIR": str(scratch),
                                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
        with open(tmp_path / f"{scratch.name}.log", "wb") as log:
            command = [str(ROOT / "examples" / "deployment" / "run.sh"), str(out), *run]
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, tmp_path / "a", four_ports()).wait(300) == 0
    port = four_ports()
    process = start(killed, tmp_path / "b", port)
    while not (killed / "checkpoints" / "round-00001.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)
    found = [_processes(f"{name}.*127.0.0.1.*{port}") for name in ("flower-superlink", "flwr-serverapp")]
    assert all(found)
    for pid in (pid for pids in found for pid in pids):
        os.kill(pid, signal.SIGKILL)
    assert process.wait(120) != 0
    assert not (killed / "report.html").exists()
    assert not _left(str(tmp_path / "b"))
    assert start(killed, tmp_path / "c", four_ports()).wait(300) == 0
    assert "resume after round 1" in (tmp_path / "c.log").read_text()
    for name in ("model/model.safetensors", "model/sam.safetensors", "checkpoints/round-00003.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flowers_simulation_is_the_launchers_run(tiny, one_rank, tmp_path, monkeypatch):
    """Two actors that relay to one worker, which the first message starts and which leaves with them."""
    pytest.importorskip("ray")
    from sam_ds.federation import launch

    config = tiny.config(tmp_path / "run", *TINY, "tiers.large.ranks=1", "federation.partition=dirichlet")
    (tmp_path / "run.toml").write_text(to_toml(config))
    port = free_port()
    # Ray's sockets take most of what the kernel allows for a path.
    with tempfile.TemporaryDirectory(prefix="sim") as scratch:
        (Path(scratch) / "config.toml").write_text(
            f'[superlink]\ndefault = "sim"\n[superlink.sim]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", "TMPDIR": scratch, "FLWR_HOME": scratch,
            "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        link = ["flower-superlink", "--simulation", "--insecure", "--disable-runtime-dependency-installation",
                "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
        run = ["flwr", "run", ".", "sim", "--stream", "--run-config", str(tmp_path / "run.toml"),
               "--federation-config", "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"]  # fmt: skip
        with open(tmp_path / "link.log", "wb") as log:
            server = subprocess.Popen(link, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 120
            while subprocess.run(["flwr", "list", "sim"], env=environment, capture_output=True).returncode:
                assert time.monotonic() < deadline, (tmp_path / "link.log").read_text()[-3000:]
                time.sleep(0.2)
            done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()
        assert (tmp_path / "run" / "report.html").exists(), done.stdout[-3000:] + done.stderr[-3000:]
        assert not _left(scratch)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    clients = [r for r in records if r["kind"] == "client"]
    assert [(r["client"], r["status"]) for r in clients] == [(client, "ok") for _ in range(2) for client in range(3)]

    alone(monkeypatch, launch)
    out = tmp_path / "launcher"
    assert launch.main(["--config", str(tmp_path / "run.toml"), "--set", f'out="{out}"']) == 0
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path / "run", out))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # as it is to be
def test_a_worker_of_two_ranks_that_is_killed_is_started_anew(tiny, tmp_path):
    """Through real processes: an error reply by name, then another worker; and none outlives its owner."""
    identify(0)
    out = tmp_path / "run"
    shutil.copytree(tiny.base, out / "base")
    config = tiny.config(out, "tiers.large.ranks=2", "federation.clients=3", "federation.partition=dirichlet")
    folder = private_folder(str(tmp_path / "w"))
    node = {"partition-id": 2, "tiers": "large", "worker": str(folder)}
    context = Context(run_id=1, node_id=5, node_config=node, state=RecordDict(), run_config=flatten(config))

    def register():
        asked = {"trains": "full", "base": fingerprint(out / "base")}
        message = Message(RecordDict({"task": ConfigRecord(asked)}), 5, "query")
        message.metadata.__dict__["_message_id"] = "m"
        return relay(message, context)

    assert register().content["metrics"]["client"] == 2
    leader, peer = sorted(_processes(f"--local_rank.*--worker {folder}"))
    # It stops where its leader waits for it, and dies there.
    os.kill(peer, signal.SIGSTOP)
    killer = threading.Timer(3.0, os.kill, (peer, signal.SIGKILL))
    killer.start()
    with pytest.raises(WorkerDied, match="ended before it had answered"):
        register()
    assert register().content["metrics"]["client"] == 2
    assert not {leader, peer} & set(_processes(str(folder)))
    assert stop(folder)
    assert not _left(str(folder))


def _left(words: str) -> list[int]:
    """What still runs a minute later."""
    deadline = time.monotonic() + 60
    while (found := _processes(words)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def _processes(words: str) -> list[int]:
    """The processes whose command line has these words."""
    found = subprocess.run(["pgrep", "-f", "--", words], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]
