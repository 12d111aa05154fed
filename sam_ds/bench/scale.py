"""The server of a federation of many clients, a few hundred a round: seconds and bytes by N and K.

Everything of the server is the run's own, from the plan to the checkpoint, on a Llama of a few thousand weights; the
clients are made up (`virtual_grid.py`). `register_ms` is of a client, `asked_mb` what registering them all sends;
`plan_ms` is of a round's plan, `reply_ms` all else that a round takes, from the tasks' messages to the checkpoint, for
each reply, without the grid's own time. Times are the processor's. `rss_mb` is resident memory as the last round, whose
end is evaluated, begins, `rss3_mb` as the third does.

Ratios: time of one more reply at the largest N over the smallest, the slope over K, for `reply_ms` spreads over the
replies of a round what grows with N alone, as its checkpoint; and memory at the last round over the third, of the last
case. `round_ms` is that rest of a round at the largest N. `extrapolated` is what the cases say of more clients, for
this model and for one of 32 layers of 16 experts.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sam_ds.bench.memory import resident
from sam_ds.bench.options import add_rounds, add_seed, check_sizes, numbers
from sam_ds.bench.virtual_grid import VirtualGrid
from sam_ds.config import RunConfig, load_config
from sam_ds.data.corpus import load_corpus
from sam_ds.data.splits import Corpus
from sam_ds.errors import InputError
from sam_ds.federation.grid import identify
from sam_ds.federation.methods.base import Planned
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.metrics import MetricsLog, read_records
from sam_ds.federation.server import Server
from sam_ds.federation.setup import prepare_base
from sam_ds.federation.state import save_checkpoint
from sam_ds.federation.strategy import SamStrategy
from sam_ds.wire.payload import unit_name

_PAIRS_HERE = 2 * 8
"""Layers times experts of the model that is measured."""
_PER_CLIENT = ("scores", "rates", "examples", "fitness", "ever_held")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="1000:50,1000:200,10000:200,100000:50,100000:200",
                        help="clients:clients a round, with commas, the largest last")  # fmt: skip
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """A row a case; `--rounds` rounds of each, at least 4."""
    check_sizes(options, "rounds")
    cases = [tuple(numbers("cases", case.replace(":", ","), int)) for case in options.cases.split(",")]
    if options.rounds < 4 or any(len(case) != 2 or not 1 <= case[1] <= case[0] for case in cases):
        raise InputError(f"--cases must be like 1000:50,10000:200 and --rounds at least 4, got {options.cases} and "
                         f"{options.rounds}")  # fmt: skip
    identify(0)
    with TemporaryDirectory() as folder:
        corpus = load_corpus("embedded", public_every=4)
        base = _base(Path(folder), corpus, options.seed)
        rows = [_case(base, corpus, clients, drawn, options) for clients, drawn in cases]
    small, large = min(clients for clients, _ in cases), max(clients for clients, _ in cases)
    (reply, _), (at_large, beside) = _reply_and_round(rows, small), _reply_and_round(rows, large)
    return {"rows": rows, "ratios": {
        "reply, N": at_large / reply, "memory over rounds": rows[-1]["rss_mb"] / rows[-1]["rss3_mb"],
    }, "round_ms": beside, "extrapolated": _extrapolated(rows)}  # fmt: skip


def _reply_and_round(rows: list[dict[str, Any]], clients: int) -> tuple[float, float]:
    """Milliseconds of one more reply, and of a round's rest, which does not depend on how many there are: the line
    through the cases of so many clients, NaN where all have one number of replies."""
    drawn, rounds = np.array([(r["drawn"], r["drawn"] * r["reply_ms"]) for r in rows if r["clients"] == clients]).T
    if len(set(drawn)) < 2:
        return math.nan, math.nan
    slope, rest = np.polyfit(drawn, rounds, 1)
    return float(slope), float(rest)


def _config(folder: Path, clients: int, drawn: int, rounds: int, seed: int) -> RunConfig:
    return load_config(None, [
        f"seed={seed}", f"model={folder / 'dense'}", "data=embedded", f"out={folder / f'{clients}-{drawn}'}",
        "evaluation.stride=32", "sam.num_experts=8", "sam.top_k=4", "sam.standin_rank=2", "sam.calibration_tokens=512",
        f"federation.clients={clients}", f"federation.clients_per_round={drawn}", f"federation.rounds={rounds}",
        "federation.edges=14", "federation.max_edits=0", "federation.partition=iid", "evaluation.window=32",
        f"evaluation.every={rounds}", "evaluation.max_tokens=64", "evaluation.sparse=false", "train.sequence=32",
        "tiers.small.experts=4", "tiers.medium.experts=6", "tiers.large.experts=8",
    ])  # fmt: skip


def _base(folder: Path, corpus: Corpus, seed: int) -> Path:
    """A converted Llama of two layers, hidden size 8 and 32 neurons, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sam_ds.data.base_model import train_tokenizer

    tokenizer = train_tokenizer([text for own in corpus.domains.values() for text in own.public], 300)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        )).save_pretrained(folder / "dense")  # fmt: skip
    tokenizer.save_pretrained(folder / "dense")
    return prepare_base(_config(folder, 8, 8, 3, seed), folder, corpus)


def _case(base: Path, corpus: Corpus, clients: int, drawn: int, options: argparse.Namespace) -> dict[str, Any]:
    config = _config(base.parent, clients, drawn, options.rounds, options.seed)
    domains = [list(corpus.domains)[client % len(corpus.domains)] for client in range(clients)]
    method, plans = METHODS[config.method], []

    def timed(server: Server, round_: int) -> Planned:
        began = time.process_time()
        planned = method.plan(server, round_)
        seconds = time.process_time() - began
        plans.append({"at": began, "seconds": seconds, "rss": resident("VmRSS"), "grid": grid.seconds})
        return planned

    began = time.process_time()
    server = Server(config, base, corpus, replace(method, plan=timed), domains)
    built = time.process_time() - began
    out = Path(config.out)
    out.mkdir()
    log = MetricsLog(out / "metrics.jsonl", domains)
    grid = VirtualGrid(
        server.dealt(), {unit_name(unit): value.shape for unit, value in server.state.units.items()},
        server.layers, server.num_experts,
    )  # fmt: skip
    SamStrategy(server, out, log).start(grid)
    plans.append({"at": time.process_time(), "seconds": 0.0, "rss": resident("VmRSS"), "grid": grid.seconds})
    began = time.process_time()
    written = save_checkpoint(server.state, out / "once", keep=1)
    saved = time.process_time() - began
    rounds = [record for record in read_records(log.path) if record["kind"] == "round" and record["round"]]
    assert all(record["answers"] == drawn for record in rounds), "a made-up reply was refused"
    replies = [
        (after["at"] - plan["at"] - plan["seconds"] - (after["grid"] - plan["grid"])) / drawn
        for plan, after in pairwise(plans)
    ]
    return {
        "clients": clients, "drawn": drawn, "build_s": built, "register_ms": 1e3 * grid.registration / clients,
        "asked_mb": clients * grid.asked / 1e6,
        "plan_ms": 1e3 * float(np.median([plan["seconds"] for plan in plans[:-1]])),
        "reply_ms": 1e3 * float(np.median(replies)), "checkpoint_ms": 1e3 * saved,
        "checkpoint_mb": written.stat().st_size / 1e6,
        "state_bytes": sum(getattr(server.state, name).nbytes for name in _PER_CLIENT) / clients,
        "rss3_mb": plans[2]["rss"] / 1e6, "rss_mb": plans[-2]["rss"] / 1e6,
    }  # fmt: skip


def _extrapolated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of 10^3 to 10^6 clients, on straight lines through the smallest and the largest N of the cases."""
    most = [row for row in rows if row["drawn"] == max(row["drawn"] for row in rows)]
    small, large = (pick(most, key=lambda row: row["clients"]) for pick in (min, max))

    def line(name: str, clients: int) -> float:
        slope = (large[name] - small[name]) / max(large["clients"] - small["clients"], 1)
        return float(large[name] + slope * (clients - large["clients"]))

    pair = large["state_bytes"] / _PAIRS_HERE
    return [
        {"clients": clients, "register_s": clients * large["register_ms"] / 1e3,
         "asked_mb": line("asked_mb", clients),
         "plan_s": line("plan_ms", clients) / 1e3, "checkpoint_s": line("checkpoint_ms", clients) / 1e3,
         "checkpoint_mb": line("checkpoint_mb", clients), "checkpoint_mb of 32 x 16": clients * pair * 512 / 1e6}
        for clients in (10**3, 10**4, 10**5, 10**6)
    ]  # fmt: skip
