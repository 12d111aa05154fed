"""A whole federation in one process: a tiny model and corpus on disk, and a Flower `Grid` that calls the ClientApp.

`InProcessGrid` answers at once what a remote client would answer, through the same protobuf bytes; `tamper` puts a
client's reply through a function first, which may change it, raise, or return None for a client that never answers.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from sam_ds.clients.task import Task
from sam_ds.clients.worker import Worker
from sam_ds.config import RunConfig, load_config
from sam_ds.errors import InputError
from sam_ds.federation import apps
from sam_ds.federation.grid import identify
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.methods.sam import condition_of
from sam_ds.federation.metrics import MetricsLog, read_records
from sam_ds.federation.server import Server
from sam_ds.federation.setup import clients_of, corpus_of
from sam_ds.federation.state import ServerState, save_checkpoint
from sam_ds.federation.strategy import SamStrategy

DOMAINS = ("gardens", "numbers", "ships")
WORDS = {
    "gardens": "rose soil leaf root water bloom seed hedge path moss fern",
    "numbers": "one two three add seven equals minus half twice count zero",
    "ships": "sail mast harbour anchor tide deck crew north wind keel rope",
}
SETTINGS = (
    "sam.num_experts=8", "sam.top_k=4", "sam.roots=2", "sam.standin_rank=4", "sam.calibration_tokens=512",
    "federation.rounds=2", "federation.clients=6", "federation.clients_per_round=3", "federation.edges=14",
    "federation.edit_every=2", "federation.min_offered=20", "federation.edit_tolerance=0.05",
    "train.steps=2", "train.batch=4", "train.sequence=16", "train.warmup_steps=1", "train.lora_rank=4",
    "evaluation.window=32", "evaluation.stride=16", "evaluation.max_tokens=128", "evaluation.test_tokens=128",
    "tiers.small.experts=4", "tiers.medium.experts=6", "tiers.large.experts=8", "runtime.threads=1",
)  # fmt: skip
"""Three tiers, two clients of each domain; a round takes a fraction of a second."""


def write_corpus(folder: Path, domains: Iterable[str] = DOMAINS) -> Path:
    """Three small domains of different words, as jsonl."""
    for index, domain in enumerate(domains):
        rng = np.random.default_rng(index)
        words = WORDS[domain].split()
        home = folder / domain
        home.mkdir(parents=True)
        for split, documents in (("train", 24), ("valid", 4), ("test", 4)):
            texts = [" ".join(rng.choice(words, size=24)) for _ in range(documents)]
            (home / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def write_model(folder: Path, corpus: Path, *, neurons: int = 64) -> Path:
    """A random Llama of 2 layers and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sam_ds.data.base_model import train_tokenizer

    files = sorted(corpus.glob("*/train.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.model_max_length = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=neurons, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
                initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What is on disk: a corpus, a dense model, and a run folder whose `base/` is the converted model."""

    corpus: Path
    model: Path
    base: Path

    def config(self, out: Path, *overrides: str) -> RunConfig:
        """The tiny run with some keys changed."""
        return load_config(None, [*SETTINGS, f"model={self.model}", f"data={self.corpus}", f"out={out}", *overrides])


Tamper = Callable[[Message], Message | None]


class InProcessGrid(Grid):
    """Virtual clients 0..N-1 are the nodes 1..N; a message is answered while it is pushed."""

    def __init__(
        self, clients: int, *, tamper: Mapping[int, Tamper] | None = None, reverse: bool = False, keep: bool = False
    ) -> None:
        self.clients = clients
        self.tamper = dict(tamper or {})
        self.reverse = reverse
        """Hand the replies over in the opposite order."""
        self.keep = keep
        """A node's context stays, as under Flower; else it is made anew, as under the launcher."""
        self.contexts: dict[int, RecordDict] = {}
        self.sent: list[Message] = []
        self.pushed = 0
        self.replies: dict[str, Message] = {}
        self.seen: list[Message] = []
        """Every train reply as it was before tampering."""

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(1)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        identities = []
        for message in messages:
            identity = str(self.pushed)
            self.pushed += 1
            message.metadata.__dict__["_message_id"] = identity
            node = message.metadata.dst_node_id
            context = Context(
                run_id=1, node_id=node, node_config={"partition-id": node - 1}, run_config={},
                state=self.contexts.setdefault(node, RecordDict()) if self.keep else RecordDict(),
            )  # fmt: skip
            self.sent.append(message)
            try:
                reply: Message | None = over_the_wire(apps.client_app(over_the_wire(message), context))
            except InputError as error:
                reply = Message(Error(2, str(error)), reply_to=message)
            if message.metadata.message_type == "train":
                self.seen.append(reply)
                if node - 1 in self.tamper:
                    try:
                        reply = self.tamper[node - 1](over_the_wire(reply))
                    except ClientCrash as error:
                        reply = Message(Error(2, str(error)), reply_to=message)
            if reply is not None:
                self.replies[identity] = reply
            identities.append(identity)
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = sorted((i for i in message_ids if i in self.replies), key=int, reverse=self.reverse)
        return [self.replies.pop(identity) for identity in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


class ClientCrash(Exception):
    """Raised by a `tamper` function: what Flower reports when a ClientApp raises."""


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
