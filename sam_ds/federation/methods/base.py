"""A method of federated training is four small functions; everything else is shared.

    plan       who takes part, which experts each holds, with which probability, over which graph
    train      what is trainable on a client and so what it uploads
    aggregate  how the answers become one update
    adapt      what happens to the graph after the round

Two more for the methods that need them: `configure`, what the method asks of the run's configuration, and `stays`,
which of the units a client trains are its own and never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sam_ds.config import RunConfig, TierSection
from sam_ds.errors import InputError
from sam_ds.federation.aggregation import AggregationConfig
from sam_ds.federation.participation import RoundPlan, plan_round
from sam_ds.federation.server import Server
from sam_ds.wire.payload import Unit


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A round as it will be sent: the participation plan and each client's graph and condition."""

    plan: RoundPlan
    graphs: dict[int, NDArray[np.bool_]]
    """Client -> (L, E, E) edges it may use."""
    conditions: dict[int, NDArray[np.float32]]
    """Client -> (L, E + 1) for the assembler; empty where the method has none."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """The four functions, whether clients run a sparse model, and whether each has a graph of its own, which the
    assembler makes."""

    plan: Callable[[Server, int], Planned]
    train: Callable[[TierSection], str]
    aggregate: Callable[[RunConfig], AggregationConfig]
    adapt: Callable[[Server, int], dict[str, Any]]
    sparse: bool
    configure: Callable[[RunConfig], RunConfig] = lambda config: config
    """The run as this method needs it; of a run that is as it needs it, the same."""
    stays: Callable[[Unit], bool] = lambda unit: False
    """Whether a unit stays with its client. The server keeps it for the client, and its bytes are not counted."""
    assembles: bool = False


def plan_dense(server: Server, round_: int) -> Planned:
    """Every client holds the whole model; clients are drawn uniformly."""
    config, shape = server.config, server.state.graph.shape
    everything = {tier: [shape[1]] * shape[0] for tier in config.tiers}
    plan = plan_round(
        server.draw_seed(), round_, server.members(), everything, layers=shape[0], num_experts=shape[1],
        roots=config.sam.roots, per_round=server.per_round, scheme=config.federation.sampling,
        floor=0.0,
    )  # fmt: skip
    return Planned(plan=plan, graphs={c.client: server.state.graph for c in plan.clients}, conditions={})


def weighted_mean(config: RunConfig) -> AggregationConfig:
    """The example-weighted mean of the answers, with the run's server optimizer; with noise for privacy, their weighted
    sum over what its weights are on average (`privacy.py`)."""
    return aggregation_config(config, rule="ht" if config.federation.dp_noise else "none")


def aggregation_config(config: RunConfig, rule: str) -> AggregationConfig:
    """The run's server step and its guard against replies that lie, with this rule."""
    section = config.federation
    return AggregationConfig(
        rule=rule, clip=section.clip, robust=section.robust, trim=section.trim, norm_bound=section.norm_bound,
        contribution=section.dp_clip if section.dp_noise else math.inf, server_optimizer=section.server_optimizer,
        server_lr=section.server_lr, server_momentum=section.server_momentum, beta_1=section.beta_1,
        beta_2=section.beta_2, tau=section.tau,
    )  # fmt: skip


def adapt_nothing(server: Server, round_: int) -> dict[str, Any]:
    """The graph stays as it is."""
    return {}


def refuse(config: RunConfig, why: str, **off: object) -> None:
    """Raise InputError for a federation setting that the method has no use for; `off`: what must stand instead."""
    for name, value in off.items():
        if (given := getattr(config.federation, name)) != value:
            raise InputError(f"federation.{name} = {given!r} {why}: give {value!r}, or another method than "
                             f"{config.method!r}")  # fmt: skip
