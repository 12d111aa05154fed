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
from collections.abc import Callable, Iterable, Mapping, Sequence
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
_POLL_SECONDS = 0.001
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
            part = data[index : index + _CHUNK]
            self.store.set(f"{key}/{index}", part)  # type: ignore[arg-type]  # the stub knows only of strings
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
    host, port = address[0]
    return server, dist.TCPStore(host, port, is_master=False, timeout=FOREVER)


class TaskQueue:
    """Rank 0's side of the store: requests and tasks go up, replies come down. Used by one thread at a time."""

    def __init__(self, mailbox: Mailbox, pods: int) -> None:
        self._mailbox = mailbox
        self._pods = pods
        self._requests = self._tasks = 0

    @property
    def next(self) -> str:
        """The identity that the next request will have."""
        return str(self._requests)

    def put(self, request: bytes) -> str:
        """The identity under which a request can be assigned, and its reply taken."""
        identity = self.next
        self._requests += 1
        self._mailbox.put(f"message/{identity}", request)
        return identity

    def assign(self, lanes: int, identities: Sequence[str]) -> None:
        """A task for the next pod that is free: at most `lanes` requests, which it answers at a time."""
        self._put_task(json.dumps([lanes, identities]).encode())

    def has(self, identity: str) -> bool:
        """Whether the reply to a request is there."""
        return self._mailbox.has(f"reply/{identity}")

    def take(self, identity: str) -> bytes:
        """The reply to a request, once."""
        return self._mailbox.take(f"reply/{identity}")

    def stop(self) -> None:
        """Send every pod home; each takes one empty task after all that were assigned before."""
        for _ in range(self._pods):
            self._put_task(b"")

    def _put_task(self, task: bytes) -> None:
        self._mailbox.put(f"task/{self._tasks}", task)
        self._tasks += 1


class LocalGrid(Grid):
    """What Flower asks of a grid beside nodes, messages and replies: alike for all whose nodes are not Flower's."""

    _run = Run.create_empty(1)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            pulled = list(self.pull_messages(waiting))
            replies += pulled
            waiting -= {reply.metadata.reply_to_message_id for reply in pulled}
            if not pulled:
                time.sleep(_POLL_SECONDS)
        return replies


class DeepSpeedGrid(LocalGrid):
    """The server's side: push messages for virtual clients, pull their replies. Used by one thread."""

    def __init__(
        self, mailbox: Mailbox, clients: int, pods: int, lanes: Callable[[Message], int] = lambda _: 1
    ) -> None:
        """`lanes(message)`: how many messages like this one a pod answers at a time."""
        self._queue = TaskQueue(mailbox, pods)
        self._nodes = list(range(1, clients + 1))
        self._lanes = lanes

    def get_node_ids(self) -> Iterable[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        waiting: dict[int, list[str]] = {}
        for message in messages:
            lanes = self._lanes(message)
            message.metadata.__dict__["_message_id"] = identity = self._queue.next
            self._queue.put(message_to_proto(message).SerializeToString())
            ids.append(identity)
            waiting.setdefault(lanes, []).append(identity)
            if len(waiting[lanes]) == lanes:
                self._queue.assign(lanes, waiting.pop(lanes))
        for lanes, identities in waiting.items():
            self._queue.assign(lanes, identities)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = [identity for identity in message_ids if self._queue.has(identity)]
        return [message_from_proto(ProtoMessage.FromString(self._queue.take(identity))) for identity in ready]

    def stop(self) -> None:
        """Send every pod home, after all that was pushed before."""
        self._queue.stop()


def serve(
    mailbox: Mailbox, answer: Callable[[bytes], Callable[[], bytes]], pod: WorkerGroup,
    groups: Mapping[int, WorkerGroup],
) -> None:  # fmt: skip
    """A rank's main loop: its pod takes a task, the groups in it answer a request each.

    `answer(request)` does the work, on all ranks of a group, and returns what serialises the reply, which the first of
    them calls. `groups`: by the number of requests that a pod answers at a time, this rank's.
    """
    while True:
        task = b""
        if pod.position == 0:
            task = mailbox.take(f"task/{mailbox.store.add('next', 1) - 1}")
        task = _broadcast(task, pod)
        if not task:
            return
        lanes, requests = json.loads(task)
        group = groups[lanes]
        lane, leader = pod.position // len(group.ranks), group.position == 0
        if lane >= len(requests):
            continue
        identity = requests[lane]
        data = _broadcast(mailbox.take(f"message/{identity}") if leader else b"", group)
        serialised = answer(data)
        if leader:
            mailbox.put(f"reply/{identity}", serialised())


def answering(app: ClientApp, context: Callable[[int], Context]) -> Callable[[bytes], Callable[[], bytes]]:
    """What `serve` answers a serialised message with; `context(node_id)` gives the virtual client's Flower context."""

    def answer(request: bytes) -> Callable[[], bytes]:
        message = message_from_proto(ProtoMessage.FromString(request))
        reply = reply_of(app, message, context(message.metadata.dst_node_id))
        return lambda: message_to_proto(reply).SerializeToString()

    return answer


def reply_of(app: ClientApp, message: Message, context: Context) -> Message:
    """The ClientApp's reply; an exception becomes an error reply."""
    try:
        return app(message, context)
    except Exception:
        return Message(Error(_CLIENT_RAISED, traceback.format_exc(limit=-3)), reply_to=message)


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
