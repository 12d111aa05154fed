"""Which Flower node is which client.

Every node is asked once who it is and what its data look like: those that are there when the run begins, which waits
for `federation.clients` of them, and between rounds those that have come since. Of which tier a client is both sides
know from the configuration (`clients/dealing.py`), and a client that says another one is refused. A run begins with
`federation.min_clients` clients. The others are then no part of the population: they are not drawn and weigh nothing,
and what the aggregate estimates is the sum over the clients that have registered; who comes later is a part from then
on. A client that has registered once stays a part: while its node is gone it is drawn and does not answer.

A registration that makes no sense (`messages.registration_of`), or of a client that another connected node is
(`taken-id`), is refused by name, and its node is not asked again. A client whose node has gone may come back as
another node: a SuperNode that starts anew is one.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from tqdm.auto import tqdm

from sam_ds.errors import InputError, RunStopped
from sam_ds.experts.checkpoint import fingerprint
from sam_ds.federation.exchange import Refuse, pause
from sam_ds.federation.messages import registration_of
from sam_ds.federation.server import Server
from sam_ds.wire.payload import RejectedUpdate


class Roster:
    """The nodes that were asked, and which client each said to be."""

    def __init__(self, server: Server, refuse: Refuse) -> None:
        self.nodes: dict[int, int] = {}
        """Client -> node, of the clients that have registered since this process began."""
        self._server = server
        self._dealt = server.dealt()
        self._refuse = refuse
        self._asked: set[int] = set()
        self._pending: dict[str, int] = {}
        self._why: list[str] = []

    def open(self, grid: Grid, timeout: float) -> None:
        """Ask every node, and wait until all clients have registered, or for `timeout` seconds. Raises InputError when
        the grid has too few nodes for the run, RunStopped when too few clients have registered."""
        section = self._server.config.federation
        least, deadline = section.least_clients, time.monotonic() + timeout
        while len(set(grid.get_node_ids())) < section.clients and time.monotonic() < deadline:
            time.sleep(min(1.0, timeout))
        connected = self._ask(grid)
        if len(connected) < least:
            raise InputError(f"federation.clients is {section.clients}, but only {len(connected)} nodes are connected: "
                             f"connect at least {least}, or lower federation.min_clients")
        deadline = time.monotonic() + timeout
        with tqdm(desc="register", unit="client", total=section.clients, leave=False) as progress:
            while self._pending and len(self.nodes) < section.clients and time.monotonic() < deadline:
                began = time.monotonic()
                if not self._take(grid, connected):
                    pause(time.monotonic() - began)
                if found := len(self.nodes) - progress.n:  # the bar draws itself at every update, of nothing too
                    progress.update(found)
        if len(self.nodes) < least:
            self._why += [f"node {node}: no answer within {timeout:g} s" for node in self._pending.values()]
            raise RunStopped(f"{len(self.nodes)} of {section.clients} clients registered, the run begins with {least} "
                             f"(federation.min_clients): {'; '.join(self._why[:10]) or 'no node answered'}")
        if absent := sorted(set(range(section.clients)) - set(self.nodes)):
            tqdm.write(f"clients {', '.join(map(str, absent))} did not register: the run goes on without them")

    def join(self, grid: Grid) -> None:
        """Take in who has answered since, and ask who has come; waits for nobody."""
        self._take(grid, self._ask(grid))

    def _ask(self, grid: Grid) -> set[int]:
        """Ask the nodes that were not asked before; returns all that are connected."""
        server, connected = self._server, set(grid.get_node_ids())
        nodes = sorted(connected - self._asked)
        asked = ConfigRecord({"trains": server.trains, "base": fingerprint(server.base)})
        messages = [Message(RecordDict({"task": asked}), node, "query") for node in nodes]
        if messages:
            taken = zip(grid.push_messages(messages), nodes, strict=False)
            sent = {identity: node for identity, node in taken if identity}
            self._pending |= sent
            self._asked |= set(sent.values())
        return connected

    def _take(self, grid: Grid, connected: Collection[int]) -> bool:
        """Whether an answer had come."""
        replies = list(grid.pull_messages(set(self._pending))) if self._pending else []
        for reply in replies:
            asked = self._pending.pop(reply.metadata.reply_to_message_id, None)
            node = reply.metadata.src_node_id if asked is None else asked
            try:
                if asked is None:
                    raise RejectedUpdate("duplicate", "a registration that was not asked for, or a second one")
                self._enter(reply, node, connected)
            except RejectedUpdate as error:
                self._why.append(f"node {node}: {error}")
                self._refuse(node, error.reason, f"registration: {error.message}")
        return bool(replies)

    def _enter(self, reply: Message, node: int, connected: Collection[int]) -> None:
        if reply.has_error():
            raise RejectedUpdate("client-failed", str(reply.error.reason)[-500:])
        state = self._server.state
        client, examples, scores, rates = registration_of(reply.content, state.scores.shape[1:], self._dealt)
        holder = self.nodes.get(client)
        if holder is not None and holder in connected:
            raise RejectedUpdate("taken-id", f"client {client} is node {holder}, which is still connected")
        self.nodes[client] = node
        # A resumed run keeps what it has begun with.
        if not state.examples[client]:
            state.examples[client] = examples
            state.scores[client] = scores
            state.rates[client] = state.fitness[client] = rates
