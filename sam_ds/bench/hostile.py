"""`sam-ds bench faults --hostile`: perplexity of the merged model after a federation in which a fifth of the clients
send hostile updates, under each rule of `federation.robust`.

All of the federated code runs; only the replies of two of ten clients are changed before the strategy sees them:
`x10`, `x-10` and `flip` scale the honest update by 10, -10, -1; `collude` is -10 times an update that is the same from
both, the first one's of each unit. Settings: `fedavg`, all ten hold everything; `sam`, all ten are drawn and each holds
some experts; `sam of 3`, three are drawn a round, so that hardly two hold the same expert.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from flwr.app import Message

from sam_ds.bench.in_process import Federation, Tamper
from sam_ds.bench.tampering import Change, replace_blobs, scaled
from sam_ds.clients.task import WorkerGroup
from sam_ds.clients.worker import Worker
from sam_ds.config import load_config
from sam_ds.errors import RunStopped
from sam_ds.federation.aggregation import ROBUST
from sam_ds.federation.judging import evaluate
from sam_ds.federation.methods.registry import configured
from sam_ds.federation.run import prepare
from sam_ds.federation.setup import clients_of, corpus_of

KEYS = (
    "sam.num_experts=8", "sam.top_k=4", "sam.roots=2", "sam.calibration_tokens=4096", "federation.rounds=4",
    "federation.clients=10", "federation.clients_per_round=10", "federation.edges=14", "federation.max_edits=0",
    "federation.partition=iid", "train.steps=4", "train.batch=4", "train.sequence=64", "train.warmup_steps=1",
    "train.lr=0.004",
    "evaluation.window=64", "evaluation.stride=64", "evaluation.every=99", "evaluation.max_tokens=64",
    "evaluation.test_tokens=2048", "evaluation.sparse=false", "tiers.small.experts=4", "tiers.medium.experts=6",
    "tiers.large.experts=8", "runtime.threads=1",
)  # fmt: skip
SETTINGS = {
    "fedavg": ("method=fedavg",), "sam": (), "sam of 3": ("federation.clients_per_round=3",),
}  # fmt: skip
ATTACKS = ("no", "x10", "x-10", "flip", "collude")
HOSTILE = (3, 7)
"""Two clients of ten."""


def hostile_rows(
    rank: int, model: str, data: str, runs: str, seed: int, seeds: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Rows: an attack in a setting, the mean headline perplexity over the seeds under each rule; inf where a run stops
    for want of valid answers. Ratios: over that of `no` attack under the rule `none`."""
    group, results = WorkerGroup([rank], dist.group.WORLD), Path(runs) / "hostile.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {tuple(key): value for key, value in map(json.loads, lines)}
    found: dict[tuple[str, str, str], list[float]] = {}
    for own in range(seed, seed + seeds):
        for setting, keys in SETTINGS.items():
            out = Path(runs) / f"hostile-{own}"
            given = [*KEYS, f"model={model}", f"data={data}", f"seed={own}", *keys, *overrides]
            config = configured(load_config(None, [*given, f"out={out}"]))
            base = prepare(config)
            worker = Worker(config, base, clients_of(config, corpus_of(config)), [group])
            for attack in ATTACKS:
                for robust in ROBUST:
                    key = (*given, attack, robust)
                    if key not in done:
                        name = f"{setting}-{attack}-{robust}".replace(" ", "-")
                        run = load_config(None, [*given, f"federation.robust={robust}", f"out={out / name}"])
                        federation = Federation.of(configured(run), base, worker, tamper=hostile(attack))
                        done[key] = _perplexity(federation)
                        shutil.rmtree(out / name)
                        with open(results, "a") as file:
                            file.write(json.dumps([key, done[key]]) + "\n")
                    found.setdefault((setting, attack, robust), []).append(done[key])
            worker.close()
    mean = {key: sum(values) / len(values) for key, values in found.items()}
    rows = [
        {"setting": setting, "attack": attack, **{robust: mean[setting, attack, robust] for robust in ROBUST}}
        for setting in SETTINGS for attack in ATTACKS
    ]  # fmt: skip
    ratios = {" ".join(key): value / mean[key[0], "no", "none"] for key, value in mean.items()}
    return {"rows": rows, "ratios": ratios}


def hostile(attack: str) -> Mapping[int, Tamper]:
    """Tamper functions of the hostile clients."""
    if attack == "no":
        return {}
    if attack == "collude":
        return dict.fromkeys(HOSTILE, _collusion(-10.0))
    return dict.fromkeys(HOSTILE, scaled({"x10": 10.0, "x-10": -10.0, "flip": -1.0}[attack]))


def _collusion(factor: float) -> Change:
    """Of each unit, all send what the first of them who holds it sends."""
    agreed: dict[str, bytes] = {}
    rounds: list[str] = []

    def tamper(reply: Message) -> Message:
        if rounds != [reply.metadata.group_id]:
            rounds[:] = [reply.metadata.group_id]
            agreed.clear()
        return replace_blobs("units", lambda blobs: {n: agreed.setdefault(n, data) for n, data in blobs.items()})(
            scaled(factor)(reply)
        )

    return tamper


def _perplexity(federation: Federation) -> float:
    try:
        federation.start()
    except RunStopped:
        return math.inf
    return float(evaluate(federation.server, "test", federation.config.evaluation.test_tokens)["merged"]["headline"])
