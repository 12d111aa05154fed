"""Federated methods side by side: the same model, clients, local steps and accounts of bytes and FLOPs.

The suite says which (`bench/suite.py`). Every variant first finds its own learning rate, and then its warm-up where
the suite has some to try, on validation text and a seed that no table has; then every cell of the table runs. Cells
that `--results` has are not run again, and one that was stopped goes on from its last round. How they are compared:
`bench/side_by_side.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sam_ds.bench.ranks import one_rank
from sam_ds.bench.side_by_side import compared, drawn, end_of, rows_of
from sam_ds.bench.suite import Cell, Suite, read_results
from sam_ds.config import to_toml
from sam_ds.errors import InputError, nearest
from sam_ds.evaluation.records import Records, read
from sam_ds.federation.metrics import read_records

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="TOML file of the suite")
    parser.add_argument("--table", default="main", help="one of the suite's")
    parser.add_argument("--quick", action="store_true", help="the table 'quick': some minutes, embedded data")
    parser.add_argument("--models", default=".", help="folder where models lie under the suite's names for them")
    parser.add_argument("--data", help="the base's data, where they are on this machine")
    parser.add_argument("--results", help="JSON lines, a cell a line; by default beside --config, in benchmarks/")
    parser.add_argument("--runs", default="runs/bench", help="where the runs are; of a finished one the metrics stay")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, a thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: variant and setting, over the seeds. Ratios: headline / headline of the suite's comparisons, the mean."""
    began = time.monotonic()
    path = Path(options.config)
    if options.quick:
        options.table = "quick"
    suite = Suite(path, models=Path(options.models), data=options.data)
    if options.table not in suite.tables:
        hint = nearest(options.table, suite.tables)
        raise InputError(f"--table must be one of {', '.join(suite.tables)}, got {options.table!r}{hint}")
    if options.jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {options.jobs}")
    table = suite.tables[options.table]
    results = Path(options.results or path.parent / "benchmarks" / f"{path.stem}.jsonl")
    results.parent.mkdir(parents=True, exist_ok=True)

    failed: list[str] = []

    def run_all(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
        records = read_results(results)
        left = list({cell.digest: cell for cell in cells if cell.digest not in records}.values())
        deadline = began + 60 * options.minutes

        def measure(cell: Cell) -> None:
            try:
                _measure(cell, Path(options.runs), results, deadline)
            except InputError as error:
                # The others do not wait for its repair.
                failed.append(str(error))

        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(measure, left))
        return read_results(results)

    def best_of(trials: Mapping[str, Mapping[T, Cell]], margin: float = 0.0) -> dict[str, T]:
        """Variant -> what ends lowest, of the variants whose trials have all run; the first, where no other ends lower
        by more than that share of it."""
        records = run_all([cell for tried in trials.values() for cell in tried.values()])
        found = {}
        for variant, tried in trials.items():
            if all(cell.digest in records for cell in tried.values()):
                ends = {value: end_of(records[cell.digest]) for value, cell in tried.items()}
                first, lowest = next(iter(ends)), min(ends, key=ends.__getitem__)
                found[variant] = lowest if ends[lowest] < (1 - margin) * ends[first] else first
        return found

    trials = suite.trials(table)
    rates = best_of(trials)
    warmups = suite.warmups(rates)
    tuned = {
        # What was not tried is the configuration's, of the setting or of a variant that takes another's rate too.
        variant: {"lr": rates[variant]} | ({"warmup_steps": steps} if len(warmups[variant]) > 1 else {})
        for variant, steps in best_of(warmups, suite.margin).items()
    }
    cells = [
        cell for cell in suite.cells(table, tuned)
        if suite.rates_of(cell.variant) in tuned or suite.rates_of(cell.variant) not in trials
    ]  # fmt: skip
    records = run_all(cells)
    done = [(cell, records[cell.digest]) for cell in cells if records.get(cell.digest, {}).get("curve")]
    diverged = [cell.name for cell in cells if records.get(cell.digest, {}).get("diverged")]
    if not done:
        why = f"all that ran diverged: {', '.join(diverged)}" if diverged else "give it more --minutes"
        raise InputError("\n".join([f"no cell is finished: {why}", *failed]))
    texts = {(cell.setting, record["data"]) for cell, record in done if cell.config.method != "central"}
    if len({setting for setting, _ in texts}) < len(texts):
        raise InputError(f"{results} has records of different texts under one setting: {sorted(texts)}; give another "
                         "file")  # fmt: skip
    pairs = [pair for comparison in table.compare for pair in compared(comparison, done)]
    if plots := drawn(table, done):
        results.with_name(f"{results.stem}-{options.table}.svg").write_text(plots, encoding="utf-8")
    return {
        "rows": rows_of(table, done), "ratios": {pair["name"]: pair["ratio"] for pair in pairs}, "pairs": pairs,
        "tuned": tuned, "missing": len(suite.cells(table, tuned)) - len(done) - len(diverged),
        "diverged": diverged, "failed": failed,
    }  # fmt: skip


def _measure(cell: Cell, runs: Path, results: Path, deadline: float) -> None:
    """Run a cell, or go on with it, and write its record; nothing if it is too late to begin, or it runs elsewhere.

    Raises InputError where it stops for another reason than that it diverged, which is an outcome.
    """
    if time.monotonic() > deadline:
        return
    folder = runs / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if cell.digest in read_results(results):
            # Another process has run it since this one looked.
            return
        (folder / "given.toml").write_text(to_toml(cell.config))
        if (folder / "config.toml").exists():
            arguments = ["--resume", str(folder)]
        else:
            arguments = ["--config", str(folder / "given.toml"), "--set", f"out={folder}"]
        began = time.perf_counter()
        command, environment = one_rank(arguments)
        with open(folder / "log.txt", "a") as log:
            # It keeps the lock: should this process die, nobody else takes the folder while it goes on.
            code = subprocess.run(
                command, stdout=log, stderr=log, pass_fds=(lock.fileno(),), env=environment
            ).returncode
        record = {
            "digest": cell.digest, "variant": cell.variant, "setting": cell.setting, "seed": cell.config.seed,
            "lr": cell.config.train.lr, "warmup_steps": cell.config.train.warmup_steps,
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        if code == 0:
            record |= facts(read(folder / "metrics.jsonl"))
        elif _diverged(folder, why := (folder / "log.txt").read_text()[-2000:]):
            record |= {"diverged": True}
        else:
            raise InputError(f"the cell {cell.name} stopped with {code}; {folder / 'log.txt'} says why:\n{why}")
        with open(results, "a") as file:
            file.write(json.dumps(record) + "\n")
        for part in ("base", "checkpoints", "model", "redrawn", "spool"):
            shutil.rmtree(folder / part, ignore_errors=True)


def _diverged(folder: Path, said: str) -> bool:
    """Whether a run stopped for want of a finite model, or as all that its clients sent was NaN or out of range."""
    if " broke the model: " in said:
        return True
    if "had no valid answer" not in said:
        return False
    clients = [record for record in read_records(folder / "metrics.jsonl") if record["kind"] == "client"]
    reasons = {record.get("reason") for record in clients if record["round"] == clients[-1]["round"]}
    return reasons == {"not-finite"}


def facts(records: Records) -> dict[str, Any]:
    """What a finished run is compared by: scores at the evaluated rounds, with what was spent until then."""
    assert records.end is not None
    flops = {record["round"]: 0.0 for record in records.rounds}
    for client in records.clients:
        flops[client["round"]] += client.get("active_flops", 0.0)
    curve, spent = [], {"up": 0, "down": 0, "flops": 0.0}
    for record in records.rounds:
        spent["up"] += record["bytes_up"]["message"]
        spent["down"] += record["bytes_down"]["message"]
        spent["flops"] += flops[record["round"]]
        if record["merged"] is not None:
            scores = {name: record[name] and record[name]["headline"] for name in ("merged", "sparse")}
            curve.append({
                "round": record["round"], **spent, **scores, "domains": record["merged"]["domains"],
                "sparse_domains": record["sparse"] and record["sparse"]["domains"],
            })  # fmt: skip
    last = records.end["merged_after"]
    return {
        "model": Path(records.run["model"]["name"]).name, "data": records.run["data"]["fingerprint"],
        "curve": curve, "before": records.end["merged_before"]["domains"], "after": last["domains"],
        "sparse_after": records.end["sparse_after"] and records.end["sparse_after"]["domains"],
        "forgetting": last["forgetting"], "forgotten": records.end["merged_before"]["forgetting"],
    }  # fmt: skip
