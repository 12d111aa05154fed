"""`sam-ds plan CONFIG`: what a run will take, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from sam_ds.clients.memory import GIB
from sam_ds.config import load_config
from sam_ds.errors import InputError
from sam_ds.federation.plan import RunPlan, plan_run

_MIB = 2**20


def run(options: argparse.Namespace) -> int:
    """Raises InputError for a configuration that the run would refuse, or that does not fit the ranks' memory."""
    config = load_config(options.config, options.set)
    for name in ("gib", "tflops"):
        if not getattr(options, name) > 0:
            raise InputError(f"--{name} must be above 0, got {getattr(options, name)}")
    plan = plan_run(config, ranks=options.ranks, rank_gib=options.gib)
    drawn = config.federation.clients_per_round
    seconds = plan.seconds(drawn, options.tflops * 1e12)
    if options.json:
        values = asdict(plan)
        for tier, own in zip(values["tiers"], plan.tiers, strict=True):
            tier["memory"]["peak"] = own.memory.peak
        print(json.dumps(values | {
            "round": {name: plan.expected(name, drawn) for name in ("down", "up", "flops")} | {"seconds": seconds}
        }))  # fmt: skip
        return 0
    size = config.pod
    print(f"{config.model}: {config.federation.clients} clients, {drawn} a round, {config.federation.rounds} rounds; "
          f"{config.sam.num_experts} experts a layer, {config.sam.top_k} visited")  # fmt: skip
    print(f"{plan.ranks} ranks in {plan.groups} groups of {size}; a rank needs {plan.rank_bytes / GIB:.1f} of "
          f"{options.gib:g} GiB for the engines of all tiers\n")  # fmt: skip
    _table(plan)
    print(f"\na round: {plan.expected('down', drawn) / GIB:.2f} GiB down, {plan.expected('up', drawn) / GIB:.2f} up, "
          f"{plan.expected('flops', drawn) / 1e15:.2f} PFLOPs; {seconds:.0f} s of local training at "
          f"{options.tflops:g} TFLOP/s a rank, {seconds * config.federation.rounds / 3600:.1f} h in all")  # fmt: skip
    return 0


def _table(plan: RunPlan) -> None:
    header = [
        "tier", "clients", "experts", "precision", "trains", "ranks", "GiB a rank", "weights", "adapters", "optimizer",
        "and gradients", "or activations", "allowed", "first GiB", "MiB down", "MiB up", "PFLOPs",
    ]  # fmt: skip
    rows = [
        [
            own.name, str(own.clients), str(own.tier.experts), own.tier.precision, own.tier.trains, str(own.ranks),
            *(f"{value / GIB:.2f}" for value in (own.memory.peak, own.memory.weights, own.memory.adapters,
                                                 own.memory.optimizer, own.memory.gradients, own.memory.activations)),
            f"{own.tier.memory_gib:g}", f"{own.first / GIB:.2f}", f"{own.down / _MIB:.1f}", f"{own.up / _MIB:.1f}",
            f"{own.flops / 1e15:.2f}",
        ]
        for own in plan.tiers
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
