"""Flower's `Grid` over the ranks of one DeepSpeed launch: virtual clients are Flower nodes.

Messages travel as the protobuf bytes that Flower would send, through a key-value store (torch's TCPStore) that rank 0
serves. Pods of ranks take the next message from a shared counter as they become free, so a slow client holds up its own
pod only; a pod that is larger than a client's group takes as many messages of such clients as it has groups. The server
app runs in a thread beside rank 0's worker; the main threads do all DeepSpeed work.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from sam_ds.clients.task import WorkerGroup

_CHUNK = 4 << 20
"""Bytes a store entry: the store refuses payloads over 8 MiB."""
FOREVER = timedelta(days=30)
_CLIENT_RAISED = 2
"""Flower's error code for an exception in a ClientApp."""


def identify(node_id: int) -> None:
    """Tell Flower who this process is: a Message cannot be made without."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, node_id


class Mailbox:
    """Byte strings of any length in a store, by key; reading takes them out."""

    def __init__(self, store: dist.Store) -> None:
        self.store = store

    def put(self, key: str, data: bytes) -> None:
        """The length goes last: a key that can be seen is complete."""
        for index in range(0, len(data), _CHUNK):
            self.store.set(f"{key}/{index}", data[index : index + _CHUNK])
        self.store.set(key, str(len(data)))

    def take(self, key: str) -> bytes:
        """Wait for the key, however long, and remove it."""
        self.store.wait([key], FOREVER)
        size = int(self.store.get(key))
        parts = []
        for index in range(0, size, _CHUNK):
            parts.append(self.store.get(f"{key}/{index}"))
            self.store.delete_key(f"{key}/{index}")
        self.store.delete_key(key)
        return b"".join(parts)

    def has(self, key: str) -> bool:
        """Whether the key can be taken without waiting."""
        return bool(self.store.check([key]))


def open_stores() -> tuple[dist.Store | None, dist.Store]:
    """A store served by rank 0 on a free port: (the server app's handle, on rank 0 only; this rank's worker's handle).

    Two handles on rank 0, because a handle that waits for a key blocks every other thread that uses it. Collective.
    """
    server = None
    address: list[Any] = [None]
    if dist.get_rank() == 0:
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=FOREVER)
        address = [(host, server.port)]
    dist.broadcast_object_list(address, src=0)
    return server, dist.TCPStore(*address[0], is_master=False, timeout=FOREVER)


class DeepSpeedGrid(Grid):
    """The server's side: push messages for virtual clients, pull their replies. Used by one thread."""

    def __init__(
        self, mailbox: Mailbox, clients: int, pods: int, lanes: Callable[[Message], int] = lambda _: 1
    ) -> None:
        """`lanes(message)`: how many messages like this one a pod answers at a time."""
        self._mailbox = mailbox
        self._nodes = list(range(1, clients + 1))
        self._pods = pods
        self._lanes = lanes
        self._messages = self._tasks = 0
        self._run = Run.create_empty(1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        waiting: dict[int, list[str]] = {}
        for message in messages:
            identity = str(self._messages)
            self._messages += 1
            message.metadata.__dict__["_message_id"] = identity
            self._mailbox.put(f"message/{identity}", message_to_proto(message).SerializeToString())
            ids.append(identity)
            lanes = self._lanes(message)
            waiting.setdefault(lanes, []).append(identity)
            if len(waiting[lanes]) == lanes:
                self._put_task(lanes, waiting.pop(lanes))
        for lanes, identities in waiting.items():
            self._put_task(lanes, identities)
        return ids

    def _put_task(self, lanes: int, messages: list[str]) -> None:
        self._mailbox.put(f"task/{self._tasks}", json.dumps([lanes, messages]).encode())
        self._tasks += 1

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [identity for identity in message_ids if self._mailbox.has(f"reply/{identity}")]
        return [
            message_from_proto(ProtoMessage.FromString(self._mailbox.take(f"reply/{identity}")))
            for identity in ready
        ]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            pulled = list(self.pull_messages(waiting))
            replies += pulled
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            if not pulled:
                time.sleep(0.01)
        return replies

    def stop(self) -> None:
        """Send every pod home; each takes one empty task after all that were pushed before."""
        for _ in range(self._pods):
            self._mailbox.put(f"task/{self._tasks}", b"")
            self._tasks += 1


def serve(
    mailbox: Mailbox, app: ClientApp, pod: WorkerGroup, groups: Mapping[int, WorkerGroup],
    context: Callable[[int], Context],
) -> None:  # fmt: skip
    """A rank's main loop: its pod takes a task, the groups in it run the ClientApp on a message each and reply.

    `groups`: by the number of messages that a pod answers at a time, this rank's. `context(node_id)` gives the virtual
    client's Flower context. An exception becomes an error reply.
    """
    while True:
        task = b""
        if pod.position == 0:
            task = mailbox.take(f"task/{mailbox.store.add('next', 1) - 1}")
        task = _broadcast(task, pod)
        if not task:
            return
        lanes, messages = json.loads(task)
        group = groups[lanes]
        lane, leader = pod.position // len(group.ranks), group.position == 0
        if lane >= len(messages):
            continue
        identity = messages[lane]
        data = _broadcast(mailbox.take(f"message/{identity}") if leader else b"", group)
        message = message_from_proto(ProtoMessage.FromString(data))
        node = message.metadata.dst_node_id
        try:
            reply = app(message, context(node))
        except Exception:
            reply = Message(Error(_CLIENT_RAISED, traceback.format_exc(limit=-3)), reply_to=message)
        if leader:
            mailbox.put(f"reply/{identity}", message_to_proto(reply).SerializeToString())


def _broadcast(data: bytes, group: WorkerGroup) -> bytes:
    """The leader's bytes on every rank of the group."""
    if len(group.ranks) == 1:
        return data
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, group.ranks[0], group=group.group)
    if int(size) == 0:
        return b""
    buffer = torch.empty(int(size), dtype=torch.uint8, device=device)
    if group.position == 0:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, group.ranks[0], group=group.group)
    return buffer.cpu().numpy().tobytes()
