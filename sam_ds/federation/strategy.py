"""The federation's round loop as a Flower `Strategy` (Message API): plan, ask, fold, adapt, evaluate, checkpoint.

Who is asked is in `registration.py`, how replies come back in `exchange.py`, what becomes of them in `folding.py`. A
reply that is no good, or does not come, is written down by name in `metrics.jsonl`, and the round goes on without it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sam_ds.clients.generations import drop_before, generation
from sam_ds.clients.task import Task
from sam_ds.errors import NotFinite, RunStopped
from sam_ds.federation.aggregation import weight_warnings
from sam_ds.federation.exchange import Exchange
from sam_ds.federation.folding import Folding
from sam_ds.federation.graphs import UNKNOWN, graph_records
from sam_ds.federation.judging import evaluate, validation_loss
from sam_ds.federation.messages import blobs_of, count_bytes, metrics_of, task_content
from sam_ds.federation.methods.base import Planned
from sam_ds.federation.metrics import MetricsLog, RoundClock, active_flops
from sam_ds.federation.participation import ClientPlan
from sam_ds.federation.privacy import spent
from sam_ds.federation.registration import Roster
from sam_ds.federation.server import Server
from sam_ds.federation.state import checkpoint_round, checkpoints, save_checkpoint
from sam_ds.graph.editlog import every_edge, pack_edges
from sam_ds.wire.bundle import bundle
from sam_ds.wire.payload import ByteCount, RejectedUpdate, Unit, encode_units, unit_name


class SamStrategy(Strategy):
    """Drives any `Method` over any Flower `Grid`.

    The state lives in `server`, not in an ArrayRecord: clients get different subsets of it.
    """

    def __init__(self, server: Server, run: Path, log: MetricsLog) -> None:
        self.server = server
        self.run = run
        self.log = log
        self._spool = run / "spool"
        """Where a round's replies wait for their turn, and a robust rule keeps the deltas of those accepted."""
        self._roster = Roster(server, self._refuse)
        self._exchange = Exchange(self._spool, self._refuse)
        self._planned: Planned | None = None
        self._asked: list[ClientPlan] = []
        """The clients of the round that have a node, in the order of their messages."""
        self._timeout = server.config.federation.timeout_seconds
        self._down: dict[int, ByteCount] = {}
        self._clock = RoundClock()
        self._known: dict[int, int] = {}
        """Edits of the graph that a node is known to hold (`graphs.py`)."""
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
        """Register the clients and run the rounds that are left; `timeout` stands for `federation.timeout_seconds`.

        Raises RunStopped when nobody answers a round and its repeats, when what they answer breaks the
        model, when too few clients register or a disk is full; InputError when the grid has too few nodes."""
        server, config = self.server, self.server.config
        rounds = num_rounds or config.federation.rounds
        self._timeout = timeout or config.federation.timeout_seconds
        self.summary()
        self._roster.open(grid, self._timeout)
        if server.state.round == 0 and not server.state.losses:
            server.state.losses.append(validation_loss(server, server.state.graph))
            self._evaluate_round(0)
        progress = tqdm(
            range(server.state.round + 1, rounds + 1), desc="rounds", unit="round", initial=server.state.round,
            total=rounds,
        )  # fmt: skip
        for round_ in progress:
            for attempt in range(config.federation.void_retries + 1):
                try:
                    answered = self._round(grid, round_, attempt)
                except NotFinite as error:
                    raise RunStopped(
                        f"round {round_} broke the model: {error}; lower train.lr or federation.server_lr, or bound "
                        f"what clients do with federation.robust, and resume; the state after round {round_ - 1} is "
                        f"in {self.run / 'checkpoints'}"
                    ) from error
                if answered:
                    break
                tqdm.write(f"round {round_}: nobody gave a valid answer (attempt {attempt + 1}), the round is void")
            else:
                raise RunStopped(
                    f"round {round_} had no valid answer in {config.federation.void_retries + 1} attempts; the state "
                    f"after round {server.state.round} is in {self.run / 'checkpoints'}"
                )
            progress.set_postfix(loss=f"{server.state.losses[-1]:.3f}")
        self._exchange.refuse_late(grid)
        return Result()

    def _round(self, grid: Grid, round_: int, attempt: int) -> bool:
        """One round; False if nobody gave a valid answer, with the state as it was. Raises NotFinite where the
        answers have broken the model."""
        self._clock = RoundClock()
        evaluated = self.server.evaluation_seconds
        self._exchange.refuse_late(grid)
        self._roster.join(grid)
        messages = list(self.configure_train(round_, ArrayRecord(), ConfigRecord(), grid))
        seconds = [self._patience(client) for client in self._asked]
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(parents=True)
        _, metrics = self.aggregate_train(round_, self._exchange.replies(grid, messages, seconds))
        shutil.rmtree(self._spool)
        if metrics is None:
            return False
        assert self._planned is not None
        loss = validation_loss(self.server, self.server.state.graph)
        if not math.isfinite(loss):
            raise NotFinite(f"its loss on public text is {loss}")
        record = self.server.method.adapt(self.server, round_)
        self.server.state.round = round_
        config = self.server.config
        if (due := generation(config, round_ + 1)) > generation(config, round_):
            self.server.redraw()
            record |= {"generation": due}
        if record:
            loss = validation_loss(self.server, self.server.state.graph)
        self.server.state.losses.append(loss)
        for kind, text in self._warnings.items():
            if kind not in self._said:
                tqdm.write(f"round {round_}: {text} (said once; metrics.jsonl has it of every round)")
        self._said |= self._warnings.keys()
        record |= {"aggregation": dict(metrics), "warnings": list(self._warnings.values()), "void": attempt}
        if epsilon := spent(self.server.state.released, config.federation.dp_delta):
            record["epsilon"] = epsilon
        self._evaluate_round(round_, record, evaluated)
        return True

    # ------------------------------------------------------------------ the four of Flower's contract

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for each client of the plan; a unit is encoded once, however many clients get it."""
        server = self.server
        planned = self._planned = server.method.plan(server, server_round)
        nodes = self._roster.nodes
        self._asked = [client for client in planned.plan.clients if client.client in nodes]
        self._down.clear()
        wire = server.config.wire
        encoded: dict[Unit, bytes] = {}
        for client in self._asked:
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
            known = self._known.pop(nodes[client.client], UNKNOWN)
            content.update(graph_records(server.state.graph, server.state.edits, task.graph_LEE, known))
            # A node that comes back when nobody waits any more finds nothing to do.
            message = Message(
                content, nodes[client.client], "train", ttl=self._patience(client), group_id=str(server_round)
            )
            self._down[client.client] = self._counted(message, units, also=task.standins)
            yield message

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the replies as they come and take the server's step; (None, None) if no reply was valid."""
        planned = self._planned
        assert planned is not None
        folding = Folding(self.server, planned, self._spool)
        silent = {client.client: client for client in planned.plan.clients}
        for reply in replies:
            turn = self._exchange.turn(reply)
            client = silent.pop(self._asked[turn].client)
            try:
                deltas = folding.add(reply, client)
            except RejectedUpdate as error:
                self._log_rejected(server_round, client, error)
                continue
            metrics = metrics_of(reply.content)
            if metrics["edits"] == len(self.server.state.edits):
                self._known[self._roster.nodes[client.client]] = len(self.server.state.edits)
            self._clock.busy(metrics)
            self._log_client(
                server_round, client, status="ok", train_seconds=metrics["train-seconds"],
                load_seconds=metrics["load-seconds"], loss_first=metrics["loss-first"],
                loss_last=metrics["loss-last"], tokens=metrics["tokens"],
                active_flops=active_flops(self.server, client, int(metrics["tokens"])),
                bytes_up=asdict(self._counted(reply, deltas)),
            )  # fmt: skip
        for client in silent.values():
            self._log_rejected(server_round, client, self._silence(client))
        if folding.answers == 0 and planned.plan.clients:
            return None, None
        result, facts = folding.step()
        self._warnings = weight_warnings(result, folding.rule)
        return None, MetricRecord(facts)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """None: the server evaluates on its own held-out text."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """None, as there is nothing to aggregate."""
        return None

    # ------------------------------------------------------------------ parts of a round

    def _silence(self, client: ClientPlan) -> RejectedUpdate:
        """Why a client that was drawn has not answered."""
        if client not in self._asked:
            return RejectedUpdate("absent", "no node has registered as this client since the run was started")
        turn = self._asked.index(client)
        if not self._exchange.sent(turn):
            return RejectedUpdate("not-sent", "the grid did not take the message: Flower's log says why")
        return RejectedUpdate("no-answer", f"nothing came within {self._patience(self._asked[turn]):g} s")

    def _patience(self, client: ClientPlan) -> float:
        """Seconds that a client has for a round."""
        return self.server.config.tiers[client.tier].timeout_seconds or self._timeout

    def _counted(
        self, message: Message, values: Mapping[Unit, NDArray[np.float32]], also: NDArray[np.float32] | None = None
    ) -> ByteCount:
        """The bytes of a message, less what only a simulation sends: the units that stay with their client."""
        raw = sum(value.nbytes for value in values.values()) + (0 if also is None else also.nbytes)
        total = count_bytes(message, raw)
        if not (stay := {unit_name(unit): value for unit, value in values.items() if self.server.method.stays(unit)}):
            return total
        blobs = blobs_of(message.content["units"])
        sent = {name: blob for name, blob in blobs.items() if name not in stay}
        kept = len(bundle(blobs)) - len(bundle(sent))
        raw -= sum(value.nbytes for value in stay.values())
        return ByteCount(raw=raw, encoded=total.encoded - kept, message=total.message - kept)

    def _log_client(self, round_: int, client: ClientPlan, *, status: str, **facts: Any) -> None:
        zero = ByteCount(raw=0, encoded=0, message=0)
        if self.server.method.assembles:
            assert self._planned is not None
            # It follows from an assembler that is not kept: `editlog.unpack_edges` within `every_edge`.
            graph_LEE = self._planned.graphs[client.client]
            facts["graph"] = pack_edges(graph_LEE, every_edge(*graph_LEE.shape[:2])).tobytes().hex()
        self.log.write(
            {
                "kind": "client", "round": round_, "client": client.client, "tier": client.tier, "status": status,
                "bytes_up": asdict(zero), "bytes_down": asdict(self._down.get(client.client, zero)),
            } | facts
        )  # fmt: skip

    def _log_rejected(self, round_: int, client: ClientPlan, error: RejectedUpdate) -> None:
        self._log_client(round_, client, status=f"rejected: {error}", reason=error.reason)

    def _refuse(self, node: int, reason: str, detail: str) -> None:
        """Write down a message that is nobody's answer to this round: `Roster` and `Exchange` say what it is."""
        client = next((c for c, own in self._roster.nodes.items() if own == node), None)
        # As part of the round to come: a run that is resumed before that forgets it.
        round_ = self.server.state.round + 1
        self.log.write({"kind": "refused", "round": round_, "node": node, "client": client, "reason": reason,
                        "detail": detail})  # fmt: skip
        if reason not in self._said:
            tqdm.write(f"refused from node {node}: {reason}, {detail} (said once; metrics.jsonl has all)")
        self._said.add(reason)

    def _evaluate_round(self, round_: int, facts: dict[str, Any] | None = None, evaluated: float = 0.0) -> None:
        """Evaluate, log and checkpoint the end of a round."""
        server, section = self.server, self.server.config.evaluation
        scores: dict[str, Any] = {"merged": None, "sparse": None}
        if round_ % section.every == 0 or round_ == server.config.federation.rounds:
            scores = evaluate(server, section.split, section.max_tokens)
        spent = server.evaluation_seconds - evaluated
        self.log.write_round(round_, scores, facts or {}, self._clock.times(spent), server.state)
        # Last: what a resumed run finds after its checkpoint's round it writes again, what is missing it never does.
        save_checkpoint(server.state, self.run / "checkpoints", keep=server.config.runtime.keep_checkpoints)
        oldest = checkpoint_round(checkpoints(self.run / "checkpoints")[0])
        # One more than needed: a client that was given up may be at work yet.
        drop_before(self.run / "base", generation(server.config, oldest + 1) - 1)
