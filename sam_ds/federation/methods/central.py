"""Central training: one client has all documents and does in a round the local steps of all that a round draws.

What a federation is measured against, of no paper. The whole model trains, as under `fedavg`.

Deviations from plain training: the optimizer and the warm-up begin anew every round, as everyone's do here, and the
model travels to its one client and back.
"""

from __future__ import annotations

from dataclasses import replace

from sam_ds.config import FederationSection, RunConfig
from sam_ds.federation.methods import fedavg
from sam_ds.federation.methods.base import refuse


def _configure(config: RunConfig) -> RunConfig:
    refuse(config, "is of several clients", robust="none", shift_round=0)
    steps = config.train.steps * config.federation.clients_per_round
    federation = replace(
        config.federation, clients=1, clients_per_round=1, min_clients=0,
        # One and the same run, whatever partition the others are under: a benchmark measures it once.
        partition="iid", alpha=FederationSection().alpha,
    )  # fmt: skip
    return replace(config, federation=federation, train=replace(config.train, steps=steps))


METHOD = replace(fedavg.METHOD, configure=_configure)
