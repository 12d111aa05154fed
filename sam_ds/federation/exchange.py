"""A round's messages out and its replies back, in the order of the messages.

Flower's own loop keeps all replies in a list and polls every three seconds; this one pushes and pulls itself and spools
every reply to disk as it comes, so that memory does not grow with the clients of a round and the result does not
depend on who was faster. A reply is taken for the answer to the message that it names, once, from the node that was
asked, and in time; any other is refused by name:

    late         its time was up, in this round or in an earlier one
    duplicate    the message has an answer
    wrong-node   from another node than the one that was asked: the right one is still waited for
    unasked      no message of this run has that name
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

from flwr.app import Message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from tqdm.auto import tqdm

from sam_ds.federation.state import writing

_POLL_SECONDS = 0.002

Refuse = Callable[[int, str, str], None]
"""Called with the node that a reply came from, the reason and a text: writes down that the reply was refused."""


def pause(took: float) -> None:
    """Before the grid is asked again, which took so many seconds. Over a network asking is work, for the SuperLink too:
    at most a tenth of the time."""
    time.sleep(max(_POLL_SECONDS, min(1.0, 10 * took)))


class Exchange:
    """What was asked in a run and is not answered yet."""

    def __init__(self, spool: Path, refuse: Refuse) -> None:
        """`spool`: a folder, there during a round, for replies that wait for their turn."""
        self._spool = spool
        self._refuse = refuse
        self._late: dict[str, str] = {}
        """Messages that were given up, and what they asked for: an answer may come yet."""
        self._turns: dict[str, int] = {}
        """Of this round's messages, the place in their order."""

    def turn(self, reply: Message) -> int:
        """The place, in the order of this round's messages, of the one that a reply from `replies` answers."""
        return self._turns[reply.metadata.reply_to_message_id]

    def sent(self, turn: int) -> bool:
        """Whether the grid took this round's message of that place."""
        return turn in self._turns.values()

    def replies(self, grid: Grid, messages: Sequence[Message], seconds: Sequence[float]) -> Iterator[Message]:
        """The answers, in the order of the messages; a message without one within its seconds is passed over."""
        began = time.monotonic()
        nodes = [message.metadata.dst_node_id for message in messages]
        # A grid gives None, or nothing, for a message that it could not send.
        identities = [identity for _, identity in zip_longest(messages, grid.push_messages(messages))]
        self._turns = {identity: turn for turn, identity in enumerate(identities) if identity}
        waiting, arrived, turn = dict(self._turns), set(), 0
        with tqdm(desc="clients", unit="client", total=len(messages), leave=False) as progress:
            while turn < len(messages):
                asked = time.monotonic()
                pulled = list(grid.pull_messages(set(waiting)))
                took = time.monotonic() - asked
                for reply in pulled:
                    if (found := self._accepted(reply, waiting, nodes)) is not None:
                        path = self._file(found)
                        with writing(path):
                            path.write_bytes(message_to_proto(reply).SerializeToString())
                        arrived.add(found)
                        progress.update()
                spent = time.monotonic() - began
                for identity, late in list(waiting.items()):
                    if spent >= seconds[late]:
                        del waiting[identity]
                        self._late[identity] = f"the task of round {messages[late].metadata.group_id}"
                while turn < len(messages) and turn not in waiting.values():
                    if turn in arrived:
                        path = self._file(turn)
                        yield message_from_proto(ProtoMessage.FromString(path.read_bytes()))
                        path.unlink()
                    turn += 1
                if waiting and not pulled:
                    pause(took)

    def refuse_late(self, grid: Grid) -> None:
        """Take answers to messages that were given up off the grid."""
        if self._late:
            for reply in grid.pull_messages(set(self._late)):
                self._accepted(reply, {}, ())

    def _accepted(self, reply: Message, waiting: dict[str, int], nodes: Sequence[int]) -> int | None:
        """The turn of a reply that is an answer, which is waited for no more; None for one that is refused."""
        identity, source = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
        if identity in waiting:
            # That there is no answer may also be said by Flower's own node.
            if reply.has_error() or source == nodes[waiting[identity]]:
                return waiting.pop(identity)
            self._refuse(source, "wrong-node", f"node {nodes[waiting[identity]]} was asked")
        elif identity in self._late:
            self._refuse(source, "late", f"an answer to {self._late.pop(identity)}, which was given up")
        elif identity in self._turns:
            self._refuse(source, "duplicate", "a second answer to one message")
        else:
            self._refuse(source, "unasked", f"an answer to a message {identity[:80]!r} that this run did not send")
        return None

    def _file(self, turn: int) -> Path:
        """No part of a message gets into a file's name."""
        return self._spool / f"reply-{turn:06d}.bin"
