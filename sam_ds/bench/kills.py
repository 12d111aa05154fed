"""`sam-ds bench faults --kills N`: a federation killed (SIGKILL) at random moments and resumed, against the one that
nobody stopped: the same bytes of every checkpoint and of the model, and nothing beside them that a kill has left.

Every fifth kill is in one phase: before the conversion, in it, in the rounds, while a checkpoint is being written, from
the last round's checkpoint to the end. A phase's beginning is seen in the run folder; within it the moment is drawn
uniformly over the seconds that the phase took in the run that nobody stopped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_ds.bench.ranks import one_rank
from sam_ds.bench.tiny import SETTINGS
from sam_ds.errors import InputError

PHASES = ("start", "conversion", "rounds", "checkpoint", "end")
ROUNDS = 6
_LOOK_SECONDS = 0.0005
_CHECKPOINT_SECONDS = 0.01
"""Within so many of the beginning of a checkpoint's file it is killed."""


def kill_and_resume(kills: int, *, model: Path, data: Path, seed: int, runs: Path) -> list[dict[str, Any]]:
    """One record a kill. What is done already, in `runs`, is not done again. Raises InputError for a run that fails
    without having been killed."""
    keys = [*SETTINGS, f"model={model}", f"data={data}", f"seed={seed}", f"federation.rounds={ROUNDS}",
            "federation.server_optimizer=momentum", "train.redraw_every=2", "evaluation.every=3",
            "evaluation.sparse=false", f"runtime.keep_checkpoints={ROUNDS}",
            *(f"tiers.{tier}.trains=lora" for tier in ("small", "medium", "large"))]  # fmt: skip
    settings = [part for key in keys for part in ("--set", key)]
    whole, results = runs / f"whole-{seed}", runs / f"kills-{seed}.jsonl"
    if not (whole / "timeline.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        timeline = _timeline(settings, whole)
        (whole / "timeline.json").write_text(json.dumps(timeline))
    timeline = json.loads((whole / "timeline.json").read_text())
    expected = _bytes_of(whole)
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for number in range(len(done), kills):
        rng = np.random.default_rng([seed, number])
        phase, folder = PHASES[number % len(PHASES)], runs / f"killed-{seed}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        seen = _kill(settings, folder, phase, rng, timeline)
        _finish(settings, folder)
        found = _bytes_of(folder)
        differ = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        done.append({
            "kill": number, "phase": phase, **seen, "equal": not differ, "differ": differ,
            "seconds": time.perf_counter() - began,
        })  # fmt: skip
        with open(results, "a") as lines:
            lines.write(json.dumps(done[-1]) + "\n")
        if not differ:
            shutil.rmtree(folder)
    return done[:kills]


def _start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    command, environment = one_rank(arguments)
    with open(log, "a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment)


def _begun(folder: Path, phase: str, round_: int = 0) -> bool:
    """Whether the run in this folder is seen to have come to a phase."""
    if phase == "start":
        return True
    if phase == "conversion":
        return (folder / "base").exists() or any(folder.glob(".base.*"))
    if phase == "rounds":
        return (folder / "metrics.jsonl").exists()
    if phase == "checkpoint":
        return any((folder / "checkpoints").glob(f".round-{round_:05d}.*"))
    return (folder / "checkpoints" / f"round-{ROUNDS:05d}.safetensors").exists()


def _timeline(settings: Sequence[str], folder: Path) -> dict[str, float]:
    """Run without a kill; the seconds that each phase took, but for the checkpoints."""
    process = _start([*settings, "--set", f"out={folder}"], _log(folder))
    reached: dict[str, float] = {}
    phases = [phase for phase in PHASES if phase != "checkpoint"]
    while process.poll() is None:
        reached |= {p: time.perf_counter() for p in phases if p not in reached and _begun(folder, p)}
        time.sleep(_LOOK_SECONDS)
    _check(process, folder)
    times = [reached[phase] for phase in phases] + [time.perf_counter()]
    return {phase: after - before for phase, before, after in zip(phases, times, times[1:], strict=False)}


def _kill(
    settings: Sequence[str], folder: Path, phase: str, rng: np.random.Generator, timeline: dict[str, float]
) -> dict[str, Any]:
    """Start a run and kill it; what it had come to."""
    process = _start([*settings, "--set", f"out={folder}"], _log(folder))
    round_, share = int(rng.integers(0, ROUNDS + 1)), float(rng.random())
    while not _begun(folder, phase, round_) and process.poll() is None:
        time.sleep(_LOOK_SECONDS)
    time.sleep(share * timeline.get(phase, _CHECKPOINT_SECONDS))
    process.kill()
    process.wait()
    finished = sorted((folder / "checkpoints").glob("round-*.safetensors"))
    left = sorted(path.name.rsplit(".", 1)[0] for path in folder.rglob(".*.*") if path.name[-1].isdigit())
    return {
        "share": share, "killed": process.returncode < 0, "round": int(finished[-1].stem[6:]) if finished else None,
        "unfinished": left,
    }  # fmt: skip


def _finish(settings: Sequence[str], folder: Path) -> None:
    """What the user does next: `--resume`, or the same command where the run had not begun."""
    resumable = (folder / "config.toml").exists()
    arguments = ["--resume", str(folder)] if resumable else [*settings, "--set", f"out={folder}"]
    process = _start(arguments, _log(folder))
    process.wait()
    _check(process, folder)


def _check(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.returncode:
        raise InputError(f"the run in {folder} ended with {process.returncode}; {_log(folder)} says why")


def _log(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.with_name(f"{folder.name}.log")


def _bytes_of(folder: Path) -> dict[str, bytes]:
    """Checkpoints, merged weights and the model byte for byte; of all else that is in the folder, that it is there."""
    exact = ("checkpoints", "redrawn", "model", "base")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timeline.json"]
    names = {path: path.relative_to(folder).as_posix() for path in files}
    return {name: path.read_bytes() if name.split("/")[0] in exact else b"" for path, name in names.items()}
