"""The federation's round loop as a Flower `Strategy` (Message API).

Flower's own loop keeps all replies in a list, polls every three seconds and stops at the first reply that differs;
this one pushes and pulls itself, spools every reply to disk as it comes and folds them one at a time *in plan order*,
so that memory does not grow with the clients of a round and the result does not depend on who was faster.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sam_ds.clients.generations import drop_before, generation
from sam_ds.clients.task import Task
from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import fingerprint
from sam_ds.federation.aggregation import Aggregated, Aggregator, ServerOptimizer, weight_warnings
from sam_ds.federation.graphs import UNKNOWN, graph_records
from sam_ds.federation.messages import (
    blobs_of,
    count_bytes,
    counters_of,
    registration_of,
    reply_content,
    task_content,
)
from sam_ds.federation.methods.base import Planned
from sam_ds.federation.metrics import MetricsLog, RoundClock, active_flops
from sam_ds.federation.participation import ClientPlan
from sam_ds.federation.robust import RobustAggregator, new_aggregator
from sam_ds.federation.scores import heard, load_shares, running_mean
from sam_ds.federation.server import Server
from sam_ds.federation.state import checkpoint_round, checkpoints, save_checkpoint
from sam_ds.graph.privacy import clip_counters
from sam_ds.wire.payload import (
    ByteCount,
    ExpertUnit,
    RejectedUpdate,
    Unit,
    decode_units,
    encode_units,
    unit_name,
)

_POLL_SECONDS = 0.002


class RunStopped(RuntimeError):
    """The run cannot go on (nobody answered); its last checkpoint is in place."""


class SamStrategy(Strategy):
    """Drives any `Method` over any Flower `Grid`.

    The state lives in `server`, not in an ArrayRecord: clients get different subsets of it.
    """

    def __init__(self, server: Server, run: Path, log: MetricsLog) -> None:
        self.server = server
        self.run = run
        self.log = log
        self._nodes: dict[int, int] = {}
        self._planned: Planned | None = None
        self._down: dict[int, ByteCount] = {}
        self._clock = RoundClock()
        self._known: dict[int, int] = {}
        """Edits of the graph that a client is known to hold (`graphs.py`)."""
        self._spool = run / "spool"
        """Where a round's replies wait for their turn, and a robust rule keeps the deltas of those accepted."""
        self._warnings: dict[str, str] = {}
        self._said: set[str] = set()
        """Kinds of warnings that the terminal has seen."""

    def summary(self) -> None:
        config = self.server.config
        tqdm.write(
            f"{config.method}: {config.federation.rounds} rounds, {config.federation.clients_per_round} of "
            f"{config.federation.clients} clients a round, {self.server.layers} layers of {self.server.num_experts} "
            f"experts, training {self.server.trains!r}"
        )

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, num_rounds: int | None = None,
        timeout: float | None = None, *_: Any, **__: Any,
    ) -> Result:  # fmt: skip
        """Register the clients and run the rounds that are left. Raises RunStopped when nobody answers a round and
        its repeats, InputError when the grid has too few nodes."""
        server, config = self.server, self.server.config
        rounds = num_rounds or config.federation.rounds
        timeout = timeout or config.federation.timeout_seconds
        self.summary()
        self._register(grid, timeout)
        if server.state.round == 0 and not server.state.losses:
            self._evaluate_round(0)
        progress = tqdm(
            range(server.state.round + 1, rounds + 1), desc="rounds", unit="round", initial=server.state.round,
            total=rounds,
        )  # fmt: skip
        for round_ in progress:
            for attempt in range(config.federation.void_retries + 1):
                if self._round(grid, round_, timeout):
                    break
                tqdm.write(f"round {round_}: nobody gave a valid answer (attempt {attempt + 1}), the round is void")
            else:
                raise RunStopped(
                    f"round {round_} had no valid answer in {config.federation.void_retries + 1} attempts; the state "
                    f"after round {server.state.round} is in {self.run / 'checkpoints'}"
                )
            progress.set_postfix(loss=f"{server.state.losses[-1]:.3f}")
        return Result()

    def _round(self, grid: Grid, round_: int, timeout: float) -> bool:
        """One round; False if nobody gave a valid answer, with the state as it was."""
        self._clock = RoundClock()
        evaluated = self.server.evaluation_seconds
        messages = list(self.configure_train(round_, ArrayRecord(), ConfigRecord(), grid))
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(parents=True)
        _, metrics = self.aggregate_train(round_, self._replies(grid, messages, timeout))
        shutil.rmtree(self._spool)
        if metrics is None:
            return False
        assert self._planned is not None
        record = self.server.method.adapt(self.server, round_)
        self.server.state.round = round_
        config = self.server.config
        if (due := generation(config, round_ + 1)) > generation(config, round_):
            self.server.redraw()
            record |= {"generation": due}
        for kind, text in self._warnings.items():
            if kind not in self._said:
                tqdm.write(f"round {round_}: {text} (said once; metrics.jsonl has it of every round)")
        self._said |= self._warnings.keys()
        record |= {"aggregation": dict(metrics), "warnings": list(self._warnings.values())}
        self._evaluate_round(round_, record, evaluated)
        return True

    # ------------------------------------------------------------------ the four of Flower's contract

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client of the plan; a unit is encoded once, however many clients get it."""
        server = self.server
        planned = self._planned = server.method.plan(server, server_round)
        self._down.clear()
        wire = server.config.wire
        encoded: dict[Unit, bytes] = {}
        for client in planned.plan.clients:
            units = server.units_for(client.experts, client.client)
            stays = server.method.stays
            missing = {unit: value for unit, value in units.items() if unit not in encoded or stays(unit)}
            # What goes down is exact: a lossy start would make every client's delta relative to another model.
            blobs = encode_units(missing, base_round=server_round, compress=wire.compress)
            encoded.update({unit: blobs[unit_name(unit)] for unit in missing})
            task = Task(
                round=server_round, client=client.client, tier=client.tier, trains=server.trains,
                held=client.experts, sent=client.sent, graph_LEE=planned.graphs[client.client],
                condition=planned.conditions.get(client.client), units=units, standins=server.state.standins,
            )  # fmt: skip
            content = task_content(task, {unit_name(unit): encoded[unit] for unit in units})
            # Taken back until the client says it again: a reply that fails may be for want of the graph.
            known = self._known.pop(client.client, UNKNOWN)
            content.update(graph_records(server.state.graph, server.state.edits, task.graph_LEE, known))
            message = Message(content, self._nodes[client.client], "train", group_id=str(server_round))
            self._down[client.client] = self._counted(message, units, also=task.standins)
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come and take the server's step; (None, None) if no reply was valid."""
        server, planned = self.server, self._planned
        assert planned is not None
        rule = server.method.aggregate(server.config)
        total = float(server.state.examples.sum())
        aggregator = new_aggregator(rule, total_weight=total, folder=self._spool)
        plans = {self._nodes[client.client]: client for client in planned.plan.clients}
        counters = {name: np.zeros_like(server.state.used) for name in ("used", "offered", "together")}
        valid = 0
        for reply in replies:
            client = plans.pop(reply.metadata.src_node_id)
            try:
                self._fold(aggregator, counters, reply, client, server_round)
                valid += 1
                if reply.content["metrics"]["edits"] == len(server.state.edits):
                    self._known[client.client] = len(server.state.edits)
            except RejectedUpdate as error:
                self._log_client(server_round, client, status=f"rejected: {error}")
        for client in plans.values():
            self._log_client(server_round, client, status="error: no answer in time")
        if valid == 0 and planned.plan.clients:
            return None, None
        result = aggregator.result()
        selected = len(planned.plan.clients)
        deltas = result.deltas
        if valid < selected and rule.sums:
            # Those who were drawn but did not answer: the share that did estimates p_answer (design 8).
            deltas = {unit: (delta * (selected / valid)).astype(delta.dtype) for unit, delta in deltas.items()}
        state = server.state
        state.units, state.moments = ServerOptimizer(rule).step(state.units, deltas, state.moments)
        state.used += counters["used"]
        state.offered += counters["offered"]
        state.together += counters["together"]
        state.used_total += counters["used"]
        if planned.plan.clients:
            held_LE = load_shares(planned.plan.clients, server.num_experts)
            state.load = running_mean(state.load, held_LE, server.config.federation.load_decay)
        server.follow_state()
        self._warnings = weight_warnings(result, rule)
        return None, MetricRecord(_facts(result) | {"p_answer": valid / max(selected, 1), "answers": valid})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: the server evaluates on its own held-out text."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as there is nothing to aggregate."""
        return None

    # ------------------------------------------------------------------ parts of a round

    def _register(self, grid: Grid, timeout: float) -> None:
        """Ask every node once who it is and what its data look like."""
        server, wanted = self.server, self.server.config.federation.clients
        deadline = time.monotonic() + timeout
        while len(nodes := sorted(grid.get_node_ids())) < wanted:
            if time.monotonic() > deadline:
                raise InputError(f"federation.clients is {wanted}, but only {len(nodes)} nodes are connected")
            time.sleep(1.0)
        asked: dict[str, Any] = {"tiers": server.tiers, "trains": server.trains, "base": fingerprint(server.base)}
        contents = [RecordDict({"task": ConfigRecord(asked)}) for _ in nodes]
        messages = [Message(content, node, "query") for content, node in zip(contents, nodes, strict=True)]
        fresh = not server.state.examples.any()
        replies = tqdm(
            self._pull(grid, messages, timeout), desc="register", unit="client", total=len(messages), leave=False
        )  # fmt: skip
        for reply in replies:
            if reply.has_error():
                raise RunStopped(f"node {reply.metadata.src_node_id} failed to register: {reply.error.reason}")
            try:
                client, examples, scores, rates = registration_of(reply.content, server.state.scores.shape)
            except RejectedUpdate as error:
                node = reply.metadata.src_node_id
                raise RunStopped(f"node {node} registered with what makes no sense: {error}") from None
            self._nodes[client] = reply.metadata.src_node_id
            if fresh:
                server.state.examples[client] = examples
                server.state.scores[client] = scores
                server.state.rates[client] = server.state.fitness[client] = rates
        if set(self._nodes) != set(range(wanted)):
            missing = sorted(set(range(wanted)) - set(self._nodes))
            raise RunStopped(f"clients {missing} did not register")

    def _pull(self, grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
        """Replies as they come, until all are here or the time is up."""
        waiting = set(grid.push_messages(messages))
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            asked = time.monotonic()
            pulled = list(grid.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            if not pulled:
                # Over a network asking is work, for the SuperLink too: at most a tenth of the time.
                time.sleep(max(_POLL_SECONDS, min(1.0, 10 * (time.monotonic() - asked))))
            yield from pulled

    def _replies(self, grid: Grid, messages: list[Message], timeout: float) -> Iterator[Message]:
        """Replies in the order of the messages, each spooled to disk until its turn comes."""
        spool = self._spool
        order = [message.metadata.dst_node_id for message in messages]
        turn = 0
        pulled = tqdm(
            self._pull(grid, messages, timeout), desc="clients", unit="client", total=len(messages), leave=False
        )  # fmt: skip
        for reply in pulled:
            path = spool / f"{int(reply.metadata.src_node_id)}.bin"
            path.write_bytes(message_to_proto(reply).SerializeToString())
            while turn < len(order) and (path := spool / f"{order[turn]}.bin").exists():
                yield message_from_proto(ProtoMessage.FromString(path.read_bytes()))
                path.unlink()
                turn += 1
        for node in order[turn:]:
            if (path := spool / f"{node}.bin").exists():
                yield message_from_proto(ProtoMessage.FromString(path.read_bytes()))

    def _fold(
        self, aggregator: Aggregator[Unit] | RobustAggregator[Unit], counters: dict[str, Any], reply: Message,
        client: ClientPlan, round_: int,
    ) -> None:  # fmt: skip
        """Check one reply and add it. Raises RejectedUpdate, and then nothing of it is added."""
        server = self.server
        content = reply_content(reply)
        expected = {unit: value.shape for unit, value in server.units_for(client.sent, client.client).items()}
        deltas = decode_units(blobs_of(content["units"]), expected=expected, base_round=round_)
        if wide := [unit for unit, delta in deltas.items() if delta.dtype != np.float32]:
            raise RejectedUpdate("wrong-shape", f"{unit_name(wide[0])} is {deltas[wide[0]].dtype}, not float32")
        counts = counters_of(content, client.experts, round_) if server.method.sparse else []
        own = {unit: delta for unit, delta in deltas.items() if server.method.stays(unit)}
        aggregator.add(
            {unit: delta for unit, delta in deltas.items() if unit not in own},
            weight=float(server.state.examples[server.holder(client.client, round_)]),
            probability=lambda unit: _probability(client, unit),
        )
        if own:
            before = server.units_for(client.sent, client.client)
            kept = server.state.personal.setdefault(client.client, {})
            kept.update({unit: before[unit] + delta for unit, delta in own.items()})
        counts = clip_counters(counts, server.config.counter_bound)
        for layer, (held, value) in enumerate(zip(client.experts, counts, strict=False)):
            for name, count in zip(("used", "offered", "together"), value, strict=True):
                counters[name][layer][np.ix_(held, held)] += count
            fitness_E, (_, offered_SS, together_SS) = server.state.fitness[client.client, layer], value
            fitness_E[list(held)] = heard(
                fitness_E[list(held)], offered_SS, together_SS, server.config.federation.fitness_decay
            )
        for layer, held in enumerate(client.experts):
            server.state.ever_held[client.client, layer, list(held)] = True
        metrics = dict(content["metrics"])
        self._clock.busy(metrics)
        self._log_client(
            round_, client, status="ok", train_seconds=metrics["train-seconds"],
            load_seconds=metrics["load-seconds"], loss_first=metrics["loss-first"], loss_last=metrics["loss-last"],
            tokens=metrics["tokens"], active_flops=active_flops(server, client, int(metrics["tokens"])),
            bytes_up=asdict(self._counted(reply, deltas)),
        )  # fmt: skip

    def _counted(
        self, message: Message, values: Mapping[Unit, NDArray[np.float32]], also: NDArray[np.float32] | None = None
    ) -> ByteCount:
        """The bytes of a message, less what only a simulation sends: the units that stay with their client."""
        stay = [unit for unit in values if self.server.method.stays(unit)]
        raw = sum(value.nbytes for value in values.values()) - sum(values[unit].nbytes for unit in stay)
        total = count_bytes(message, raw + (0 if also is None else also.nbytes))
        blobs = message.content.array_records["units"]
        kept = sum(len(blobs[unit_name(unit)].data) for unit in stay)
        return ByteCount(raw=total.raw, encoded=total.encoded - kept, message=total.message - kept)

    def _log_client(self, round_: int, client: ClientPlan, *, status: str, **facts: Any) -> None:
        zero = ByteCount(raw=0, encoded=0, message=0)
        self.log.write(
            {
                "kind": "client", "round": round_, "client": client.client, "tier": client.tier, "status": status,
                "bytes_up": asdict(zero), "bytes_down": asdict(self._down[client.client]),
            } | facts
        )  # fmt: skip

    def _evaluate_round(self, round_: int, facts: dict[str, Any] | None = None, evaluated: float = 0.0) -> None:
        """Evaluate, log and checkpoint the end of a round."""
        server, section = self.server, self.server.config.evaluation
        scores: dict[str, Any] = {"merged": None, "sparse": None}
        if round_ % section.every == 0 or round_ == server.config.federation.rounds:
            scores = server.evaluate(section.split, section.max_tokens)
        server.state.losses.append(server.validation_loss(server.state.graph))
        spent = server.evaluation_seconds - evaluated
        self.log.write_round(round_, scores, facts or {}, self._clock.times(spent), server.state)
        # Last: what a resumed run finds after its checkpoint's round it writes again, what is missing it never does.
        save_checkpoint(server.state, self.run / "checkpoints", keep=server.config.runtime.keep_checkpoints)
        oldest = checkpoint_round(checkpoints(self.run / "checkpoints")[0])
        # One more than needed: a client that was given up may be at work yet.
        drop_before(self.run / "base", generation(server.config, oldest + 1) - 1)


def _probability(client: ClientPlan, unit: Unit) -> float:
    """p of a unit: of an expert's own tensors, or pi for what every client holds."""
    return client.probability(unit.layer, unit.expert) if isinstance(unit, ExpertUnit) else client.pi


def _facts(result: Aggregated[Unit]) -> dict[str, float]:
    return {
        "effective_sample_size": result.effective_sample_size,
        "mean_effective_sample_size": result.mean_effective_sample_size,
        "largest_weight": result.largest_weight,
    }
