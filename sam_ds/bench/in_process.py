"""A whole federation in one process: a Flower `Grid` that calls the ClientApp.

`InProcessGrid` answers at once what a remote client would answer, through the same protobuf bytes; a client's reply
goes through a *tamper* function first, which may change it, raise `ClientCrash`, or return None for a client that
never answers, several replies, or one that comes `Late`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from sam_ds.clients.worker import Worker
from sam_ds.config import RunConfig
from sam_ds.errors import InputError
from sam_ds.federation import apps
from sam_ds.federation.grid import LocalGrid, identify
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.metrics import MetricsLog, read_records
from sam_ds.federation.server import Server
from sam_ds.federation.setup import clients_of, corpus_of
from sam_ds.federation.strategy import SamStrategy


@dataclass(frozen=True)
class Late:
    """A reply that comes when messages of a later round are pushed."""

    reply: Message


Tamper = Callable[[Message], Message | Sequence[Message] | Late | None]


class ClientCrash(Exception):
    """Raised by a tamper function: what Flower reports when a ClientApp raises."""


class InProcessGrid(LocalGrid):
    """Virtual clients 0..N-1 are the nodes 1..N; a message is answered while it is pushed."""

    def __init__(
        self, clients: int, *, tamper: Mapping[int, Tamper] | None = None, reverse: bool = False, keep: bool = False
    ) -> None:
        """`tamper`: by client, of its answers to train messages."""
        self.partitions = {node: node - 1 for node in range(1, clients + 1)}
        """Node -> the client it is; of the nodes that are connected."""
        self.tamper = dict(tamper or {})
        self.tamper_query: dict[int, Tamper] = {}
        """By node, of its registration."""
        self.reverse = reverse
        """Hand the replies over in the opposite order."""
        self.keep = keep
        """A node's context stays, as under Flower; else it is made anew, as under the launcher."""
        self.contexts: dict[int, RecordDict] = {}
        self.sent: list[Message] = []
        self.pushed = 0
        self.replies: dict[str, list[Message]] = {}
        self.seen: list[Message] = []
        """Every train reply as it was before tampering."""
        self._late: list[tuple[str, str, Message]] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = str(self.pushed)
            self.pushed += 1
            message.metadata.__dict__["_message_id"] = identity
            self.sent.append(message)
            self._answer(message, identity)
            identities.append(identity)
        return identities

    def _answer(self, message: Message, identity: str) -> None:
        node, group = message.metadata.dst_node_id, message.metadata.group_id
        for _, late, reply in [entry for entry in self._late if entry[0] != group]:
            self.replies.setdefault(late, []).append(reply)
        self._late = [entry for entry in self._late if entry[0] == group]
        client = self.partitions[node]
        context = Context(
            run_id=1, node_id=node, node_config={"partition-id": client}, run_config={},
            state=self.contexts.setdefault(node, RecordDict()) if self.keep else RecordDict(),
        )  # fmt: skip
        try:
            reply = over_the_wire(apps.client_app(over_the_wire(message), context))
        except InputError as error:
            reply = Message(Error(2, str(error)), reply_to=message)
        if message.metadata.message_type == "train":
            self.seen.append(reply)
            tamper = self.tamper.get(client)
        else:
            tamper = self.tamper_query.get(node)
        try:
            given = reply if tamper is None else tamper(over_the_wire(reply))
        except ClientCrash as error:
            given = Message(Error(2, str(error)), reply_to=message)
        if isinstance(given, Late):
            self._late.append((group, identity, given.reply))
        elif given is not None:
            self.replies[identity] = [given] if isinstance(given, Message) else list(given)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = sorted((i for i in message_ids if i in self.replies), key=int, reverse=self.reverse)
        return [reply for identity in wanted for reply in self.replies.pop(identity)]


def over_the_wire(message: Message) -> Message:
    """The message as the other side reads it."""
    return message_from_proto(ProtoMessage.FromString(message_to_proto(message).SerializeToString()))


@contextmanager
def worker_of(worker: Worker) -> Iterator[Worker]:
    """The ClientApp works with this worker inside the block."""
    before = apps._worker
    apps.set_worker(worker)
    identify(0)
    try:
        yield worker
    finally:
        apps._worker = before



@dataclass(kw_only=True)
class Federation:
    """A server, its strategy and its records, over an in-process grid."""

    config: RunConfig
    server: Server
    strategy: SamStrategy
    grid: InProcessGrid
    run: Path
    worker: Worker | None

    @classmethod
    def of(cls, config: RunConfig, base: Path, worker: Worker | None = None, **grid: Any) -> Federation:
        """A fresh federation in `config.out`, on a converted model; without a worker it cannot start."""
        run = Path(config.out)
        run.mkdir(parents=True, exist_ok=True)
        corpus = corpus_of(config)
        domains = [client.domain for client in clients_of(config, corpus)]
        server = Server(config, base, corpus, METHODS[config.method], domains)
        log = MetricsLog(run / "metrics.jsonl", domains)
        strategy = SamStrategy(server, run, log)
        return cls(config=config, server=server, strategy=strategy, run=run, worker=worker,
                   grid=InProcessGrid(config.federation.clients, **grid))  # fmt: skip

    def start(self) -> Federation:
        """Run the rounds that are left."""
        assert self.worker is not None
        with worker_of(self.worker):
            self.strategy.start(self.grid)
        return self

    def records(self, kind: str) -> list[dict[str, Any]]:
        """The records of one kind so far."""
        return [record for record in read_records(self.run / "metrics.jsonl") if record["kind"] == kind]
