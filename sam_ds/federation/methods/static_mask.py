"""One sparse mask for all clients, found once by saliency: what a moving topology has to beat.

SSFL: Ohib, Thapaliya, Dziugaite, Liu, Calhoun, Plis, "SSFL: Discovering Sparse Unified Subnetworks at Initialization
for Efficient Federated Learning", arXiv 2405.09037: |w g| decides before training which weights live; the others are
neither trained, sent nor computed, and the mask never moves.

Deviations: the mask is of FFN neurons, so that it saves the FLOPs it claims on dense hardware, top_k / num_experts of
them; their saliency is taken on the server's public text instead of a minibatch of every client; what trains
in them is what the tiers train under `sam`. All tiers hold the mask, as the method must.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sam_ds.config import RunConfig, TierSection
from sam_ds.errors import InputError
from sam_ds.federation.methods.base import Method, Planned, adapt_nothing, weighted_mean
from sam_ds.federation.methods.sam import condition_of
from sam_ds.federation.participation import plan_round


def _configure(config: RunConfig) -> RunConfig:
    kept = config.sam.top_k
    if config.sam.semantics == "message":
        raise InputError("sam.semantics = 'message' needs edges, and method = 'static_mask' has none, as all that it "
                         "keeps is visited always: give 'reach', or method = 'sam'")  # fmt: skip
    always: dict[str, Any] = {"roots": kept, "root_choice": "saliency", "standin": "none", "regroups": 0}
    return replace(
        config, sam=replace(config.sam, allocation="uniform", **always), train=replace(config.train, whole=0.0),
        federation=replace(config.federation, floor=0.0, max_edits=0, score="uniform", refit_standins=False),
        tiers={name: replace(tier, experts=kept, sends=0) for name, tier in config.tiers.items()},
    )  # fmt: skip


def _plan(server: Any, round_: int) -> Planned:
    config, (layers, num_experts, _) = server.config, server.state.graph.shape
    plan = plan_round(
        server.draw_seed(), round_, server.members(), {name: [config.sam.roots] * layers for name in config.tiers},
        layers=layers, num_experts=num_experts, roots=config.sam.roots,
        per_round=server.per_round, scheme=config.federation.sampling, floor=0.0,
    )  # fmt: skip
    drawn = [client.client for client in plan.clients]
    return Planned(
        plan=plan, graphs=dict.fromkeys(drawn, server.state.graph),
        conditions={client: condition_of(server, client) for client in drawn},
    )  # fmt: skip


def _train(tier: TierSection) -> str:
    return tier.trains


METHOD = Method(
    plan=_plan, train=_train, aggregate=weighted_mean, adapt=adapt_nothing, sparse=True, configure=_configure
)  # fmt: skip
