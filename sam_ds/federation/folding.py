"""The replies of one round become the server's step: each is checked whole, then added whole, or refused by name and
nothing of it is added.

What a reply must be is what its client was asked for (`wire/payload.py`, `messages.py`): those units and no others, of
their shapes, of this round, of finite numbers that are small enough to be weighed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from sam_ds.federation.aggregation import Aggregated, ServerOptimizer
from sam_ds.federation.messages import blobs_of, counters_of, reply_content
from sam_ds.federation.methods.base import Planned
from sam_ds.federation.participation import ClientPlan
from sam_ds.federation.privacy import noised, note_release
from sam_ds.federation.robust import new_aggregator
from sam_ds.federation.scores import heard, load_shares, running_mean
from sam_ds.federation.server import Server
from sam_ds.graph.privacy import clip_counters
from sam_ds.wire.payload import ExpertUnit, RejectedUpdate, Unit, decode_units, unit_name


class Folding:
    """One round's sums. Memory does not grow with the replies; the order of `add` matters through rounding only."""

    def __init__(self, server: Server, planned: Planned, folder: Path) -> None:
        """`folder`: there for the round, for the deltas that a robust rule keeps."""
        self._server = server
        self._planned = planned
        self.rule = server.method.aggregate(server.config)
        total = float(server.state.examples.sum())
        self._aggregator = new_aggregator(self.rule, total_weight=total, folder=folder)
        self._counters = {name: np.zeros_like(server.state.used) for name in ("used", "offered", "together")}
        self.answers = 0
        """Replies that were added."""

    def add(self, reply: Message, client: ClientPlan) -> dict[Unit, NDArray[np.float32]]:
        """Check the reply of a client and add it; returns its deltas. Raises RejectedUpdate."""
        server, round_ = self._server, self._planned.plan.round
        content = reply_content(reply)
        expected = {unit: value.shape for unit, value in server.units_for(client.sent, client.client).items()}
        deltas = decode_units(blobs_of(content["units"]), expected=expected, base_round=round_, copy=False)
        for unit, delta in deltas.items():
            if delta.dtype != np.float32:
                raise RejectedUpdate("wrong-shape", f"{unit_name(unit)} is {delta.dtype}, not float32")
        counts = counters_of(content, client.experts, round_) if server.method.sparse else []
        own = {unit: delta for unit, delta in deltas.items() if server.method.stays(unit)}
        self._aggregator.add(
            {unit: delta for unit, delta in deltas.items() if unit not in own},
            weight=float(server.state.examples[server.holder(client.client, round_)]),
            probability=lambda unit: _probability(client, unit),
        )
        if own:
            before = server.units_for(client.sent, client.client)
            kept = server.state.personal.setdefault(client.client, {})
            kept.update({unit: before[unit] + delta for unit, delta in own.items()})
        self._count(counts, client)
        self.answers += 1
        return deltas

    def _count(self, counts: list[NDArray[np.int64]], client: ClientPlan) -> None:
        """What the client says of its routes, and what it has downloaded."""
        state, config = self._server.state, self._server.config
        counts = clip_counters(counts, config.counter_bound)
        for layer, (held, value) in enumerate(zip(client.experts, counts, strict=False)):
            for name, count in zip(("used", "offered", "together"), value, strict=True):
                self._counters[name][layer][np.ix_(held, held)] += count
            fitness_E, (_, offered_SS, together_SS) = state.fitness[client.client, layer], value
            fitness_E[list(held)] = heard(
                fitness_E[list(held)], offered_SS, together_SS, config.federation.fitness_decay
            )
        for layer, held in enumerate(client.experts):
            state.ever_held[client.client, layer, list(held)] = True

    def step(self) -> tuple[Aggregated[Unit], dict[str, Any]]:
        """Take the server's step with what was added; the update, and what the round's record says of it."""
        server, state, clients = self._server, self._server.state, self._planned.plan.clients
        result = self._aggregator.result()
        selected, deltas, section = len(clients), result.deltas, server.config.federation
        if self.rule.bounded:
            deltas = noised(deltas, state.units, section.dp_noise * section.dp_clip)
        elif self.answers < selected and self.rule.sums:
            # Those who were drawn but did not answer: the share that did estimates p_answer.
            for delta in deltas.values():
                delta *= selected / self.answers
        drawn_from = np.count_nonzero(state.examples)
        rate = min(1.0, section.clients_per_round / drawn_from) if section.sampling == "poisson" else 1.0
        note_release(state.released, "weights", section.dp_noise, rate)
        state.units, state.moments = ServerOptimizer(self.rule).step(state.units, deltas, state.moments)
        for name in ("used", "offered", "together"):
            getattr(state, name)[:] += self._counters[name]
        state.used_total += self._counters["used"]
        if clients:
            held_LE = load_shares(clients, server.num_experts)
            state.load = running_mean(state.load, held_LE, server.config.federation.load_decay)
        server.follow_state()
        return result, {
            "effective_sample_size": result.effective_sample_size,
            "mean_effective_sample_size": result.mean_effective_sample_size,
            "largest_weight": result.largest_weight, "p_answer": self.answers / max(selected, 1),
            "answers": self.answers, **result.bounded,
        }  # fmt: skip


def _probability(client: ClientPlan, unit: Unit) -> float:
    """p of a unit: of an expert's own tensors, or pi for what every client holds."""
    return client.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else client.pi
