"""What several tests do with a federation in one process, and the names of those that they use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam_ds.bench.in_process import ClientCrash, Federation, InProcessGrid, Late, over_the_wire, worker_of
from sam_ds.bench.tiny import SETTINGS, Tiny, write_corpus, write_model, write_tiny
from sam_ds.clients.dealing import dealt_tiers
from sam_ds.clients.task import Task
from sam_ds.config import RunConfig
from sam_ds.federation.methods.sam import condition_of
from sam_ds.federation.participation import sample_clients
from sam_ds.federation.server import Server
from sam_ds.federation.state import ServerState, save_checkpoint

__all__ = [
    "SETTINGS", "ClientCrash", "Federation", "InProcessGrid", "Late", "Stopped", "Tiny", "assert_equal_states",
    "copy_base", "first_clients", "over_the_wire", "status", "stop_at", "task_for", "worker_of", "write_corpus",
    "write_model", "write_tiny",
]  # fmt: skip


class Stopped(Exception):
    """Stands for kill -9."""


def stop_at(round_: int, when: str) -> Callable[..., Path]:
    """A `save_checkpoint` that dies just before the checkpoint of a round is in its place, or just after."""

    def save(state: ServerState, *args: Any, **kwargs: Any) -> Path:
        if state.round == round_ and when == "before":
            raise Stopped
        path = save_checkpoint(state, *args, **kwargs)
        if state.round == round_:
            raise Stopped
        return path

    return save


def copy_base(tiny: Tiny, run: Path) -> Path:
    """Put the converted model where a run looks for it, so that it is not converted again."""
    shutil.copytree(tiny.base, run / "base")
    return run / "base"


def assert_equal_states(one: Any, other: Any) -> None:
    """Bit for bit."""
    assert one.round == other.round
    assert one.losses == other.losses and one.gamma == other.gamma
    assert one.edits == other.edits
    assert one.released == other.released and one.downloads == other.downloads and one.factor_seed == other.factor_seed
    for name in ("graph", "scores", "rates", "examples", "fitness", "load", "used", "offered", "together",
                 "used_total", "ever_held"):  # fmt: skip
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert one.units.keys() == other.units.keys() and one.moments.keys() == other.moments.keys()
    for unit, value in one.units.items():
        np.testing.assert_array_equal(value, other.units[unit], err_msg=str(unit))
    for unit, values in one.moments.items():
        for mine, yours in zip(values, other.moments[unit], strict=True):
            np.testing.assert_array_equal(mine, yours, err_msg=str(unit))
    assert (one.standins is None) == (other.standins is None)
    if one.standins is not None:
        np.testing.assert_array_equal(one.standins, other.standins)


def status(federation: Federation, client: int | None = None, round_: int = 1) -> Any:
    """How a client fared in a round, or of all that were drawn how each did."""
    found = {r["client"]: r["status"] for r in federation.records("client") if r["round"] == round_}
    return found if client is None else found[client]


def first_clients(config: RunConfig) -> list[int]:
    """Who is drawn in round 1."""
    section = config.federation
    drawn, _ = sample_clients(config.seed, 1, tiers=dealt_tiers(config),
                              per_round=section.clients_per_round, scheme=section.sampling)  # fmt: skip
    return [int(client) for client in drawn]


def task_for(server: Server, client: int, *, round_: int = 1, seed: int = 0) -> Task:
    """A client's task on the server's own graph: the roots and some experts drawn from the seed."""
    config, state = server.config, server.state
    layers, num_experts = state.graph.shape[:2]
    tier, roots = server.tiers[client], config.sam.roots
    sparse = server.method.sparse
    slots = config.tiers[tier].experts if sparse else num_experts
    held = []
    for layer in range(layers):
        drawn = np.random.default_rng([seed, client, layer]).permutation(np.arange(roots, num_experts))[: slots - roots]
        held.append((*range(roots), *sorted(map(int, drawn))))
    return Task(
        round=round_, client=client, tier=tier, trains=server.trains, held=tuple(held), sent=tuple(held),
        graph_LEE=state.graph, condition=condition_of(server, client) if sparse else None,
        units=server.units_for(held, client),
        standins=state.standins,
    )  # fmt: skip
