"""A whole run on the server's side: prepare, federate, judge on test text, save, report."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.serverapp import Grid
from tqdm.auto import tqdm

from sam_ds.clients.generations import check_generation, generation
from sam_ds.config import RunConfig
from sam_ds.data.batches import pack
from sam_ds.evaluation.report import summary_table, write_report
from sam_ds.federation.judging import evaluate
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.metrics import MetricsLog, read_records
from sam_ds.federation.privacy import spent
from sam_ds.federation.server import Server
from sam_ds.federation.setup import check_model, clients_of, corpus_of, prepare_base, write_config
from sam_ds.federation.state import checkpoints, load_checkpoint
from sam_ds.federation.strategy import SamStrategy
from sam_ds.graph.bounds import corrected_bound, fit_rate, uncorrected_bound


def prepare(config: RunConfig) -> Path:
    """Check the whole input, then convert the base model into the run folder; returns `run/base`.

    Raises InputError before anything expensive starts; what is on disk is left alone. From here on this process keeps
    to `runtime.threads`: a server beside workers that took all cores would wait in each for what they are busy with.
    """
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    run = Path(config.out)
    check_model(config)
    if found := checkpoints(run / "checkpoints"):
        state = load_checkpoint(found[-1])
        check_generation(config, run / "base", state.round, state.factor_seed)
    corpus = corpus_of(config)
    clients_of(config, corpus)
    run.mkdir(parents=True, exist_ok=True)
    base = prepare_base(config, run, corpus)
    if not found:
        # After the last check: a folder with a configuration holds a run that can be resumed.
        write_config(config, run)
    return base


def run_server(grid: Grid, config: RunConfig) -> None:
    """Run the federation, or go on with it from the newest checkpoint in the run folder."""
    began = time.perf_counter()
    run = Path(config.out)
    base = prepare(config)
    corpus = corpus_of(config)
    clients = clients_of(config, corpus)
    domains = [client.domain for client in clients]
    server = Server(config, base, corpus, METHODS[config.method], domains)
    log = MetricsLog(run / "metrics.jsonl", domains)
    test_tokens = config.evaluation.test_tokens
    if found := checkpoints(run / "checkpoints"):
        server.load_state(load_checkpoint(found[-1]))
        # Not before: one that the checkpoint refuses would be what the next resume reads.
        write_config(config, run)
        log.rewind(server.state.round)
        before = next(r for r in read_records(log.path) if r["kind"] == "run")["before"]
        tqdm.write(f"resume after round {server.state.round}")
    else:
        log.rewind(-1)
        before = evaluate(server, "test", test_tokens)
        log.write(_run_record(server, clients, before))
    strategy = SamStrategy(server, run, log)
    strategy.start(grid)
    after = evaluate(server, "test", test_tokens)
    log.write(_end_record(server, log, before, after, time.perf_counter() - began))
    write_report(log.path, run / "report.html")
    server.save_model(run / "model")
    tqdm.write(summary_table(log.path))
    tqdm.write(f"report: {run / 'report.html'}   model: {run / 'model'}")


def _run_record(server: Server, clients: list[Any], before: dict[str, Any]) -> dict[str, Any]:
    config, corpus = server.config, server.corpus

    def tokens(texts: tuple[str, ...]) -> int:
        return sum(len(ids) for ids in server.tokenizer(list(texts))["input_ids"]) if texts else 0

    return {
        "kind": "run", "method": config.method, "config": asdict(config), "before": before,
        "data": {
            "name": corpus.name, "fingerprint": corpus.fingerprint,
            "domains": {
                name: {split: tokens(getattr(splits, split)) for split in ("public", "train", "valid", "test")}
                for name, splits in corpus.domains.items()
            },
        },
        "model": {
            "name": config.model, "parameters": sum(p.numel() for p in server.model.parameters()),
            "layers": server.layers, "experts": server.num_experts, "top_k": config.sam.top_k,
            "roots": config.sam.roots,
        },
        "clients": [
            {"client": c.client, "domain": c.domain, "tier": tier,
             "examples": len(pack(c.texts, server.tokenizer, config.train.sequence))}
            for c, tier in zip(clients, server.tiers, strict=True)
        ],
        "tiers": [
            {"name": name, "experts": tier.experts, "memory_gib": tier.memory_gib, "precision": tier.precision,
             "trains": server.trains, "ds_config": tier.ds_config}
            for name, tier in config.tiers.items()
        ],
        "graph": server.state.graph.astype(int).tolist(),
    }  # fmt: skip


def _end_record(
    server: Server, log: MetricsLog, before: dict[str, Any], after: dict[str, Any], seconds: float
) -> dict[str, Any]:
    records = read_records(log.path)
    rounds = [record for record in records if record["kind"] == "round" and record["round"] > 0]
    took = {(r["client"], generation(server.config, r["round"])) for r in records
            if r["kind"] == "client" and r["status"] == "ok"}  # fmt: skip
    first = sum(due == 0 for _, due in took)
    wall = sum(record["wall_seconds"] for record in rounds)
    return {
        "kind": "end", "rounds": server.state.round, "merged_before": before["merged"],
        "merged_after": after["merged"], "sparse_before": before["sparse"], "sparse_after": after["sparse"],
        "graph": server.state.graph.astype(int).tolist(), "used": server.state.used_total.tolist(),
        "bounds": bounds(server), "wall_seconds": seconds,
        "orchestration_share": sum(r["orchestration_seconds"] for r in rounds) / wall if wall else 0.0,
        "bytes_base": (server.state.downloads + int(server.state.ever_held.sum())) * server.base_expert_bytes()
        + (len(took) - first) * server.attention_bytes + first * server.factor_bytes,
        "epsilon": spent(server.state.released, server.config.federation.dp_delta),
    }  # fmt: skip


def bounds(server: Server) -> dict[str, Any] | None:
    """The uncorrected bound and the corrected one beside the measured gap, from the fitted rate.

    Estimates: on a real run nothing proves the loss to be PL; None where the losses do not allow a fit.
    """
    losses, section = server.state.losses, server.config.federation
    # What follows a round's answers, as refitted stand-ins, may leave a loss that is not finite: the report says so.
    if not np.isfinite(losses).all() or (fit := fit_rate(losses)) is None:
        return None
    # With the rate per round eta mu = fit.rate, eta is taken as 1 round and mu = rate; at step size 1 / Lip the noise
    # term is sigma2 / (2 mu), and the residuals of the fit estimate it directly: sigma2 = 2 mu * their variance.
    common: dict[str, Any] = {
        "eta": 1.0, "mu": fit.rate, "sigma2": 2 * fit.rate * fit.residual_variance, "rho_max": section.max_edits,
        "gamma": server.state.gamma, "T_m": section.edit_every, "gap0": fit.gap0,
    }  # fmt: skip
    return {
        "uncorrected": uncorrected_bound(len(losses) - 1, **common),
        "corrected": corrected_bound(len(losses) - 1, **common, lip=1.0),
        "measured": losses[-1] - fit.floor,
        "note": f"estimates, nats a token: rate {fit.rate:.3g} a round, floor {fit.floor:.4f} and noise fitted to the "
        f"validation loss of {len(losses)} rounds; gamma {server.state.gamma:.3g} is the largest change by an edit, "
        "kept or rolled back, of the loss of domains over their own graphs",
    }
