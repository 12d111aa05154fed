"""A Flower grid of any number of clients that train nothing: what is left of a round's time is the server's.

Its clients register with made-up scores and answer a task with Gaussian deltas of the shapes that they were sent, which
are encoded once a round for each shape. `seconds` is the processor's time that the grid itself took; `registration` is
what the server took from asking for the nodes to the last registration, `asked` the bytes of its question.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
from flwr.app import Message

from sam_ds.clients.task import Result
from sam_ds.federation.grid import LocalGrid
from sam_ds.federation.messages import blobs_of, message_bytes, registration_content, result_content
from sam_ds.wire.codec import encode

_AT_ONCE = 64
"""Replies that one pull hands over: they are made when they are asked for."""


class VirtualGrid(LocalGrid):
    """Clients 0..N-1 are the nodes 1..N.

    Args:
        dealt: of every client its tier and the experts it can hold (`Server.dealt`).
        shapes: of every unit that trains, by its name on the wire.
        layers, experts: of the model.
    """

    def __init__(
        self, dealt: Sequence[tuple[str, int]], shapes: Mapping[str, tuple[int, ...]], layers: int, experts: int
    ) -> None:
        self.dealt = dealt
        self.seconds = self.registration = 0.0
        self.asked = 0
        self._began = 0.0
        self._shapes = shapes
        self._rng = np.random.default_rng(0)
        self._scores, self._rates = self._rng.random((2, layers, experts), np.float32)
        self._waiting: dict[str, Message] = {}
        self._pushed = 0
        self._blobs: dict[tuple[int, tuple[int, ...]], bytes] = {}

    def get_node_ids(self) -> Iterable[int]:
        self._began = self._began or time.process_time()
        return range(1, len(self.dealt) + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        began = time.process_time()
        identities = []
        for message in messages:
            identity = str(self._pushed)
            self._pushed += 1
            message.metadata.__dict__["_message_id"] = identity
            self._waiting[identity] = message
            identities.append(identity)
        self.seconds += time.process_time() - began
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        began = time.process_time()
        asked = list(islice((identity for identity in self._waiting if identity in message_ids), _AT_ONCE))
        replies = [self._reply(self._waiting.pop(identity)) for identity in asked]
        self.seconds += time.process_time() - began
        if replies and not self.registration and not self._waiting:
            self.registration = time.process_time() - self._began - self.seconds
        return replies

    def _reply(self, message: Message) -> Message:
        if message.metadata.message_type == "query":
            self.asked = self.asked or message_bytes(message)
            client = message.metadata.dst_node_id - 1
            content = registration_content(client, *self.dealt[client], 100, self._scores, self._rates)
            return Message(content, reply_to=message)
        task: dict[str, Any] = dict(message.content["task"])
        round_ = task["round"]
        blobs = {name: self._blob(round_, self._shapes[name]) for name in blobs_of(message.content["units"])}
        result = Result(
            deltas={}, counters=[np.ones((3, held, held), np.int64) for held in task["held-per-layer"]], examples=100,
            tokens=100, loss_first=1.0, loss_last=1.0, load_seconds=0.0, train_seconds=0.0, started=time.time(),
        )  # fmt: skip
        edits: dict[str, Any] = dict(message.content["edits"])
        content = result_content(result, blobs, round_, edits["count"])
        return Message(content, reply_to=message)

    def _blob(self, round_: int, shape: tuple[int, ...]) -> bytes:
        if (round_, shape) not in self._blobs:
            self._blobs = {key: blob for key, blob in self._blobs.items() if key[0] == round_}
            delta = 1e-4 * self._rng.standard_normal(shape, dtype=np.float32)
            self._blobs[round_, shape] = encode(delta, base_round=round_)
        return self._blobs[round_, shape]
