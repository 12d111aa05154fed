"""What a federation does with clients that fail or lie, and with kill -9.

By default every fault of `bench/tampering.py`, on a tiny federation in one process: one of three clients errs in round
1 and is honest in round 2. `named` is the reason in `metrics.jsonl`; `equal` says whether the server's state after both
rounds is, bit for bit, that of a run in which the client was silent in round 1, or of the honest run where its answer
is folded; `formula`, how far the weights after round 1 are at most from the sum over the answers that are folded, in
float64, over the largest weight. `--kills` is `bench/kills.py`, `--hostile` `bench/hostile.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch.distributed as dist

from sam_ds.bench.hostile import hostile_rows
from sam_ds.bench.in_process import Federation, Tamper
from sam_ds.bench.kills import PHASES, kill_and_resume
from sam_ds.bench.options import add_rounds, add_seed
from sam_ds.bench.ranks import on_ranks
from sam_ds.bench.tampering import FAULTS
from sam_ds.bench.tiny import Tiny, write_corpus, write_model, write_tiny
from sam_ds.clients.task import WorkerGroup
from sam_ds.clients.worker import Worker
from sam_ds.errors import InputError
from sam_ds.federation.messages import blobs_of
from sam_ds.federation.setup import clients_of, corpus_of
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.wire.payload import ExpertUnit, decode_units

_SHORT = ("federation.timeout_seconds=0.3", "federation.edit_every=9", "evaluation.every=9", "evaluation.sparse=false")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=0, help="instead: kill so many runs, and resume them")
    parser.add_argument("--hostile", action="store_true", help="instead: perplexity under hostile updates")
    parser.add_argument("--model", help="of --kills and --hostile: Hugging Face folder; by default a tiny one")
    parser.add_argument("--data", help="of both: folder of <domain>/{train,valid,test}.*; by default a tiny one")
    parser.add_argument("--runs", default="runs/faults", help="of both: for runs; what is there is not done again")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of --hostile: a run's keys")
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a fault, over the seeds; or a phase's kills; or an attack under a rule. Ratios: the share of faults, or of
    kills, that ended as they must; or perplexity over that without hostile clients."""
    if options.kills < 0 or (options.kills and options.hostile):
        raise InputError(f"--kills {options.kills} must not be negative, nor go with --hostile")
    if not options.kills and not options.hostile:
        rows = on_ranks(1, fault_rows, options.seed, options.rounds)
        return {"rows": rows, "ratios": {"as_it_must": float(np.mean([row["as_it_must"] for row in rows]))}}
    runs = Path(options.runs)
    runs.mkdir(parents=True, exist_ok=True)
    data = Path(options.data) if options.data else runs / "corpus"
    model = Path(options.model) if options.model else runs / "model"
    if not data.exists():
        write_corpus(data)
    if not model.exists():
        write_model(model, data)
    if options.hostile:
        return on_ranks(1, hostile_rows, str(model), str(data), str(runs), options.seed, options.rounds, options.set)
    return _killed(kill_and_resume(options.kills, model=model, data=data, seed=options.seed, runs=runs))


def fault_rows(rank: int, seed: int, seeds: int) -> list[dict[str, Any]]:
    """Every fault on as many federations as there are seeds."""
    group = WorkerGroup([rank], dist.group.WORLD)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FAULTS}
    with TemporaryDirectory() as folder:
        root = Path(folder)
        tiny = write_tiny(root)
        for own in range(seed, seed + seeds):
            config = tiny.config(root / "first", *_SHORT, f"seed={own}")
            worker = Worker(config, tiny.base, clients_of(config, corpus_of(config)), [group])
            honest = _federation(tiny, root / f"{own}-honest", own, worker)
            # The second of those drawn in round 1, and in the middle of the order of folding.
            erring = honest.records("client")[1]["client"]
            silent = _federation(tiny, root / f"{own}-silent", own, worker, {erring: in_round(1, lambda reply: None)})
            for number, (name, fault) in enumerate(FAULTS.items()):
                tamper = {erring: in_round(1, fault.tamper)}
                began = time.perf_counter()
                federation = _federation(tiny, root / f"{own}-{number}", own, worker, tamper)
                seconds = time.perf_counter() - began
                expected = silent if fault.reason else honest
                named = [r["reason"] for r in federation.records("client") if r["status"] != "ok"]
                refused = [r["reason"] for r in federation.records("refused")]
                found[name].append({
                    "answers": federation.records("round")[1]["answers"],
                    "named": " + ".join([*named, *refused]),
                    "right": (named, refused) == tuple([name] * bool(name) for name in (fault.reason, fault.refused)),
                    "equal": _state(federation, -1) == _state(expected, -1),
                    "formula": _distance(tiny, federation, erring if fault.reason else None), "seconds": seconds,
                })  # fmt: skip
            worker.close()
    return [{
        "fault": name, "answers": cases[0]["answers"], "named": cases[0]["named"],
        "equal": sum(case["equal"] for case in cases), "of": len(cases),
        "formula": max(case["formula"] for case in cases),
        "seconds": float(np.median([case["seconds"] for case in cases])),
        "as_it_must": all(case["right"] and case["equal"] and case["formula"] < 1e-6 for case in cases),
    } for name, cases in found.items()]  # fmt: skip


def in_round(round_: int, tamper: Tamper) -> Tamper:
    """A tamper function that is honest in the other rounds."""
    return lambda reply: tamper(reply) if reply.metadata.group_id == str(round_) else reply


def _federation(
    tiny: Tiny, out: Path, seed: int, worker: Worker, tamper: Mapping[int, Tamper] | None = None
) -> Federation:
    return Federation.of(tiny.config(out, *_SHORT, f"seed={seed}"), tiny.base, worker, tamper=tamper).start()


def _state(federation: Federation, which: int) -> bytes:
    return checkpoints(federation.run / "checkpoints")[which].read_bytes()


def _distance(tiny: Tiny, federation: Federation, without: int | None) -> float:
    """Of round 1: the largest |theta' - (theta + sum of w_i / p delta_i times drawn / answered)|, over the largest
    |theta|."""
    first, second = (load_checkpoint(path) for path in checkpoints(federation.run / "checkpoints")[:2])
    fresh = Federation.of(federation.config, tiny.base).server
    fresh.state = first
    planned = fresh.method.plan(fresh, 1).plan.clients
    folded = [(c, r) for c, r in zip(planned, federation.grid.seen, strict=False) if c.client != without]
    expected = {unit: np.zeros(value.shape) for unit, value in first.units.items()}
    for client, reply in folded:
        weight = first.examples[client.client] / first.examples.sum() * len(planned) / len(folded)
        for unit, delta in decode_units(blobs_of(reply.content["units"])).items():
            p = client.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else client.pi
            expected[unit] += weight / p * delta
    off = max(float(np.abs(value - (first.units[u] + expected[u])).max()) for u, value in second.units.items())
    return off / max(float(np.abs(value).max()) for value in first.units.values())


def _killed(kills: list[dict[str, Any]]) -> dict[str, Any]:
    rows = []
    for phase in PHASES:
        own = [kill for kill in kills if kill["phase"] == phase]
        if own:
            rows.append({
                "phase": phase, "kills": len(own), "under_way": sum(kill["killed"] for kill in own),
                "left_unfinished": sum(bool(kill["unfinished"]) for kill in own),
                "equal": sum(kill["equal"] for kill in own),
                "seconds": float(np.median([kill["seconds"] for kill in own])),
            })  # fmt: skip
    return {"rows": rows, "ratios": {"equal": sum(kill["equal"] for kill in kills) / len(kills)}, "kills": kills}
