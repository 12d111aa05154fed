"""`deepspeed launch/run_federation.py` as a user starts it: exit codes, what it leaves, and 1 rank = 2 ranks."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from in_process import SETTINGS, write_corpus, write_model
from safetensors.torch import load_file

from sam_ds.bench import ranks
from sam_ds.federation.metrics import read_records
from sam_ds.federation.supernode.relay import free_port

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = ("federation.clients_per_round=4",)


def arguments(tiny, out, *overrides):
    keys = [*SETTINGS, f"model={tiny.model}", f"data={tiny.corpus}", f"out={out}", *overrides]
    return [part for key in keys for part in ("--set", key)]


def started(ranks, port, *args, output=subprocess.DEVNULL, errors=subprocess.DEVNULL):
    """The launcher, under way."""
    command = [shutil.which("deepspeed") or str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks),
               "--master_port", str(port), str(ROOT / "launch" / "run_federation.py"), *args]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors, text=True)


def deepspeed(ranks, port, *args):
    """Run the launcher; the finished process with its output as text."""
    process = started(ranks, port, *args, output=subprocess.PIPE, errors=subprocess.PIPE)
    output, errors = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="module")
def finished(tiny, one_rank, tmp_path_factory):
    """The same run by the launcher on two ranks and in this process on one: {ranks: folder}."""
    from sam_ds.federation import launch

    root = tmp_path_factory.mktemp("launch")
    process = deepspeed(2, free_port(), *arguments(tiny, root / "2", *ROUNDS))
    assert process.returncode == 0, process.stderr[-3000:]
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, launch)
        assert launch.main(arguments(tiny, root / "1", *ROUNDS)) == 0
    return {ranks: root / str(ranks) for ranks in (1, 2)}


def alone(patch, launch):
    """The session's process group stands for the launch's."""
    patch.setattr(launch, "process_group", lambda config: contextlib.nullcontext())


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_leaves_a_report_and_a_model(finished, ranks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[ranks]
    assert "<html" in (folder / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder / "model")("rose soil leaf")["input_ids"]])
    assert math.isfinite(float(model(input_ids=ids, labels=ids).loss.detach()))
    records = read_records(folder / "metrics.jsonl")
    assert [r["kind"] for r in records if r["kind"] != "client"] == ["run", "round", "round", "round", "end"]
    assert [r["status"] for r in records if r["kind"] == "client"] == ["ok"] * 8


@pytest.mark.distributed
def test_two_ranks_are_one(finished):
    one, two = finished[1], finished[2]
    for file in ("model.safetensors", "sam.safetensors"):
        mine, yours = load_file(one / "model" / file), load_file(two / "model" / file)
        assert mine.keys() == yours.keys()
        for name, value in mine.items():
            assert torch.equal(value, yours[name]), name
    losses = [[r["validation_loss"] for r in read_records(f / "metrics.jsonl") if r["kind"] == "round"]
              for f in (one, two)]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "files"), [
    (2, {"small": "cpu_zero0", "medium": "cpu_zero0", "large": "cpu_zero0"}), (4, {"large": "zero3"})
])  # fmt: skip
def test_clients_of_a_tier_may_want_more_ranks_than_those_of_another(finished, tiny, tmp_path, ranks, files):
    """The large ones train on two, the others on one each, two at a time in a pod; to rounding it is one run. At stage
    0 DeepSpeed has one group for all engines; ZeRO-3 is made, and checked, by all ranks of the launch."""
    overrides = (*ROUNDS, "tiers.large.ranks=2", *(f"tiers.{t}.ds_config={f}.json" for t, f in files.items()))
    process = deepspeed(ranks, free_port(), *arguments(tiny, tmp_path / "run", *overrides))
    assert process.returncode == 0, process.stderr[-3000:]
    one, mixed = (read_records(folder / "metrics.jsonl") for folder in (finished[1], tmp_path / "run"))
    kinds = [[(r["kind"], r.get("client"), r.get("status")) for r in records] for records in (one, mixed)]
    assert kinds[0] == kinds[1] and "large" in {r.get("tier") for r in mixed}
    for mine, yours in zip(one, mixed, strict=True):
        for name in ("validation_loss", "loss_first", "loss_last"):
            if name in mine:
                assert yours[name] == pytest.approx(mine[name], rel=1e-3), (mine["kind"], name)


@pytest.mark.distributed
def test_ranks_that_do_not_divide(tiny, tmp_path):
    out = tmp_path / "run"
    process = deepspeed(2, free_port(), *arguments(tiny, out, "runtime.ranks_per_client=4"))
    assert process.returncode == 2
    assert "runtime.ranks_per_client=4 does not divide the 2 ranks" in process.stderr + process.stdout
    assert not list(out.glob("*"))


# ------------------------------------------------------------------ what dies or hangs


def rank_of(folder, rank):
    """The process id of a rank of the launch into this folder; None while there is none."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"out={folder}".encode() in (entry / "cmdline").read_bytes() and (
                f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0")
            ):
                return int(entry.name)
    return None


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_when_a_rank_dies_the_launcher_ends_the_others_and_the_run_goes_on(finished, tiny, tmp_path):
    folder = tmp_path / "run"
    process = started(2, free_port(), *arguments(tiny, folder, *ROUNDS))
    while not (folder / "checkpoints" / "round-00000.safetensors").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(rank_of(folder, 1), signal.SIGKILL)
    assert process.wait(timeout=120) != 0 and rank_of(folder, 0) is None
    assert not (folder / "model").exists()
    again = deepspeed(2, free_port(), "--resume", str(folder))
    assert again.returncode == 0, again.stderr[-3000:]
    for path in (finished[2] / "model").iterdir():
        assert (folder / "model" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_lost_their_launcher_keep_the_folder(tiny, tmp_path):
    """kill -9 of the launcher leaves its ranks at work: a second start is refused, by the number of the first."""
    folder = tmp_path / "run"
    process = started(1, free_port(), *arguments(tiny, folder, "federation.rounds=200"))
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    rank = rank_of(folder, 0)
    try:
        again = deepspeed(1, free_port(), "--resume", str(folder))
        assert again.returncode == 2 and f"is in use by process {rank} on" in again.stderr + again.stdout
    finally:
        os.kill(rank, signal.SIGKILL)


HANGS = """
import sys, time
from sam_ds.clients.worker import Worker
from sam_ds.federation import launch
Worker.train = lambda self, task: time.sleep(1000)
launch._GRACE_SECONDS = 1
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs_ends_with_the_run(tiny, tmp_path):
    command, environment = ranks.one_rank(arguments(tiny, tmp_path / "run", "federation.timeout_seconds=1",
                                              "federation.void_retries=0"))  # fmt: skip
    command[1:3] = ["-c", HANGS]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and "run_federation: round 1 had no valid answer in 1 attempts" in process.stderr
    assert "in <lambda>" in process.stderr and (tmp_path / "run" / "checkpoints" / "round-00000.safetensors").exists()


def test_a_run_without_answers_ends_with_1_and_a_message(tiny, tmp_path, one_rank, monkeypatch, capfd):
    """And with nothing of where in the code that was."""
    from sam_ds.clients.worker import Worker
    from sam_ds.federation import launch

    def broken(self, task):
        raise RuntimeError("CUDA out of memory")

    alone(monkeypatch, launch)
    monkeypatch.setattr(Worker, "train", broken)
    shutil.copytree(tiny.base, tmp_path / "run" / "base")
    assert launch.main(arguments(tiny, tmp_path / "run", "federation.void_retries=1")) == 1
    said = capfd.readouterr().err
    assert "run_federation: round 1 had no valid answer in 2 attempts; the state after round 0 is in" in said
    assert "Traceback" not in said
    rejected = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "client"]
    assert len(rejected) == 6 and all("CUDA out of memory" in r["status"] for r in rejected)


# ------------------------------------------------------------------ bad input, in this process


@pytest.fixture
def refused(tiny, tmp_path, one_rank, monkeypatch):
    """`refused(*overrides)` -> the message of a launch that ends with 2; `out` must stay as it was."""
    from sam_ds.federation import launch

    alone(monkeypatch, launch)
    out = tmp_path / "run"

    def run(*overrides, args=None):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            code = launch.main(arguments(tiny, out, *overrides) if args is None else args)
        assert code == 2, errors.getvalue()
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
        (line,) = [line for line in errors.getvalue().splitlines() if line.startswith("run_federation: ")]
        return line

    run.out = out
    return run


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model=./nowhere"], "model './nowhere' cannot be loaded"),
        (["data=./nowhere"], "data = './nowhere': there is no such folder"),
        (["sam.num_experts=7", "tiers.large.experts=7"], "num_experts=7 does not divide the 64 neurons"),
        (["sam.nmu_experts=8"], "did you mean 'sam.num_experts'"),
        (["federation.rounds=0"], "federation.rounds"),
        (["tiers.small.memory_gib=0.00001"], "tiers.small: 4 experts with 'full' training need about"),
        (["runtime.ranks_per_client=2"], "runtime.ranks_per_client=2 does not divide the 1 ranks"),
        (["federation.clients=2", "federation.clients_per_round=2"], "clients must be at least 3"),
        (["federation.forgetting=boats"], "forgetting names 'boats'"),
        (["tiers.small.ds_config=cpu_zero9.json"], "no DeepSpeed configuration 'cpu_zero9.json'"),
        (["tiers.small.trains=lora"], "tiers train full and lora"),
        (["train.sequence=65"], "train.sequence = 65 is longer than the model's context of 64"),
        (["evaluation.window=65"], "evaluation.window = 65 is longer than the model's context of 64"),
        (["sam.calibration_tokens=128"], "calibration has 128 tokens; fitting 8 experts needs 160"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_ends_with_2_and_a_message(refused, overrides, message):
    assert message in refused(*overrides)


def test_a_domain_without_test_documents(refused, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "ships" / "test.jsonl").unlink()
    assert "domain 'ships' of" in (line := refused(f"data={corpus}")) and "no test documents" in line


def test_a_client_with_too_little_text(refused, tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    (corpus / "ships" / "train.jsonl").write_text('{"text": "sail mast"}\n' * 6)
    line = refused(f"data={corpus}", "train.sequence=32")
    assert "train.sequence: client 2 of 6" in line and "give more text or a shorter sequence" in line


def test_a_model_whose_neurons_do_not_divide(refused, tiny, tmp_path):
    model = write_model(tmp_path / "model", tiny.corpus, neurons=60)
    assert "num_experts=8 does not divide the 60 neurons" in refused(f"model={model}")


def test_a_folder_that_holds_a_run(refused):
    refused.out.mkdir()
    (refused.out / "config.toml").write_text("seed = 1\n")
    assert "already holds a run; go on with --resume" in refused()


def test_resume_of_nothing(refused, tmp_path):
    assert "there is no" in refused(args=["--resume", str(tmp_path / "run")])
    assert "leave out --config" in refused(args=["--resume", str(tmp_path / "run"), "--config", "x.toml"])


def test_resume_in_either_form(refused, tiny):
    """`--resume=RUN` is the same as `--resume RUN`: a damaged checkpoint is found, not "already holds a run"."""
    from sam_ds.config import to_toml

    checkpoint = refused.out / "checkpoints" / "round-00001.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"damaged")
    (refused.out / "config.toml").write_text(to_toml(tiny.config(refused.out)))
    for args in (["--resume", str(refused.out)], [f"--resume={refused.out}"]):
        assert "checkpoint" in (line := refused(args=args)) and "cannot be read" in line


def test_no_rank_waits_for_a_compiler():
    """A killed compile of DeepSpeed's shared-memory op leaves a lock that hangs the next start: it is never begun."""
    from deepspeed.comm.torch import build_shm_op

    import sam_ds.federation.launch  # noqa: F401

    assert build_shm_op() is None
