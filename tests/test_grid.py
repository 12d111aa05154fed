"""Messages through a store: any length, any order, and everybody goes home."""

from __future__ import annotations

import queue
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run

from sam_ds.federation.grid import DeepSpeedGrid, Mailbox, answering, identify, serve


@pytest.fixture
def server_store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))


@pytest.fixture
def connect(server_store):
    """`connect()` -> a further handle, as a worker has one."""

    def make():
        return dist.TCPStore("127.0.0.1", server_store.port, is_master=False, timeout=timedelta(seconds=30))

    return make


@pytest.mark.parametrize("length", [0, 1, (4 << 20) - 1, 4 << 20, (4 << 20) + 1, 10_000_000])
def test_any_length_goes_through(server_store, connect, length):
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    here, there = Mailbox(server_store), Mailbox(connect())
    assert not there.has("key")
    here.put("key", data)
    assert there.take("key") == data
    # A store answers one handle's requests in order, so what this one asks now comes after its take.
    assert not there.has("key")
    # Nothing is left behind.
    assert not any(there.has(f"key/{index}") for index in range(0, length + 1, 4 << 20))


def test_take_waits(server_store, connect):
    here, there = Mailbox(server_store), Mailbox(connect())
    found = []
    thread = threading.Thread(target=lambda: found.append(there.take("late")))
    thread.start()
    time.sleep(0.1)
    assert not found
    here.put("late", b"here")
    thread.join(10)
    assert found == [b"here"]


class Alone:
    """A worker group of one, in a thread: its ranks do not matter."""

    ranks = (0,)
    position = 0


def context(node):
    return Context(run_id=1, node_id=node, node_config={"partition-id": node - 1}, state=RecordDict(), run_config={})


class Workers:
    """Groups in threads that serve an app, and the grid that speaks to them."""

    def __init__(self, server_store, connect, app, groups, clients=8):
        identify(0)
        self.grid = DeepSpeedGrid(Mailbox(server_store), clients, groups)
        self.threads = [
            threading.Thread(
                target=serve, args=(Mailbox(connect()), answering(app, context), Alone(), {1: Alone()}), daemon=True
            )
            for _ in range(groups)
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()

    def message(self, node, number=0):
        return self.grid.create_message(RecordDict({"in": ConfigRecord({"number": number})}), "train", node, "1")

    def stop(self):
        self.grid.stop()
        for thread in self.threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self.threads)


@pytest.fixture
def workers(server_store, connect):
    """`workers(train, groups)`: `train(number, node)` answers a number."""
    made = []

    def make(train, groups, **kwargs):
        app = ClientApp()

        @app.train()
        def answer(message, context):
            number = train(message.content["in"]["number"], context.node_id)
            return Message(RecordDict({"out": ConfigRecord({"number": number})}), reply_to=message)

        made.append(Workers(server_store, connect, app, groups, **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.mark.parametrize("groups", [1, 3])
def test_every_message_is_answered_once(workers, groups):
    served = workers(lambda number, node: number * number + node, groups)
    grid = served.grid
    assert list(grid.get_node_ids()) == list(range(1, 9))
    messages = [served.message(1 + number % 8, number) for number in range(20)]
    replies = list(grid.send_and_receive(messages, timeout=20))
    assert len(replies) == 20
    by_id = {reply.metadata.reply_to_message_id: reply for reply in replies}
    for number, message in enumerate(messages):
        reply = by_id[message.metadata.message_id]
        node = 1 + number % 8
        assert reply.metadata.src_node_id == node
        assert reply.content["out"]["number"] == number * number + node
    assert list(grid.pull_messages(by_id)) == []


def test_a_slow_client_holds_up_its_own_group_only(workers):
    release = threading.Event()

    def train(number, node):
        if number == 0:
            assert release.wait(20)
        return number

    served = workers(train, 2)
    identities = list(served.grid.push_messages([served.message(1, number) for number in range(6)]))
    waiting, found = set(identities), []
    deadline = time.monotonic() + 20
    while len(found) < 5 and time.monotonic() < deadline:
        for reply in served.grid.pull_messages(waiting):
            found.append(reply.content["out"]["number"])
            waiting.discard(reply.metadata.reply_to_message_id)
        time.sleep(0.01)
    assert sorted(found) == [1, 2, 3, 4, 5] and waiting == {identities[0]}
    # A timeout returns what there is.
    assert list(served.grid.send_and_receive([], timeout=0.01)) == []
    release.set()
    deadline = time.monotonic() + 20
    while not (late := list(served.grid.pull_messages(waiting))) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [reply.content["out"]["number"] for reply in late] == [0]


def test_send_and_receive_gives_up_in_time(workers):
    release = threading.Event()
    served = workers(lambda number, node: int(release.wait(20)), 1)
    began = time.monotonic()
    assert list(served.grid.send_and_receive([served.message(1)], timeout=0.2)) == []
    assert time.monotonic() - began < 5
    release.set()


def test_an_exception_becomes_an_error_reply(workers):
    def train(number, node):
        if number == 1:
            raise RuntimeError("out of memory")
        return number

    served = workers(train, 1)
    replies = list(served.grid.send_and_receive([served.message(3, n) for n in (0, 1, 2)], timeout=20))
    failed = [reply for reply in replies if reply.has_error()]
    assert len(replies) == 3 and len(failed) == 1
    assert failed[0].error.code == 2 and "out of memory" in failed[0].error.reason
    assert failed[0].metadata.src_node_id == 3


def test_stop_lets_pushed_work_finish(workers):
    done = []
    served = workers(lambda number, node: done.append(number) or number, 3)
    identities = list(served.grid.push_messages([served.message(1, number) for number in range(7)]))
    served.stop()
    assert sorted(done) == list(range(7))
    assert len(list(served.grid.pull_messages(identities))) == 7
    # What the fixture sends again, nobody is there to take.
    served.threads = []


class Rank:
    """One rank of a pod of two, in a thread; `peer` has the bytes that its leader shares."""

    def __init__(self, position, ranks, shared):
        self.position, self.ranks, self.shared = position, ranks, shared


def test_a_pod_takes_as_many_messages_as_it_has_groups(server_store, connect, monkeypatch):
    """Messages of even numbers want both ranks, those of odd numbers one: two of them are answered at a time."""
    from sam_ds.federation import grid as module

    def broadcast(data, group):
        if len(group.ranks) == 1:
            return data
        if group.position == 0:
            group.shared.put(data)
            return data
        return group.shared.get(timeout=20)

    monkeypatch.setattr(module, "_broadcast", broadcast)
    identify(0)
    app, seen, both = ClientApp(), {"0": [], "1": []}, threading.Barrier(2)

    @app.train()
    def answer(message, context):
        number = message.content["in"]["number"]
        # Two ranks are always here together: on one message, or on one each.
        both.wait(20)
        seen[threading.current_thread().name].append(number)
        return Message(RecordDict({"out": ConfigRecord({"number": number})}), reply_to=message)

    grid = DeepSpeedGrid(Mailbox(server_store), 8, 1, lambda message: 1 + message.content["in"]["number"] % 2)
    shared = queue.Queue()
    threads = []
    for position in (0, 1):
        groups = {1: Rank(position, (0, 1), shared), 2: Rank(0, (position,), None)}
        work = (Mailbox(connect()), answering(app, context), groups[1], groups)
        threads.append(threading.Thread(target=serve, name=str(position), daemon=True, args=work))
        threads[-1].start()
    messages = [
        grid.create_message(RecordDict({"in": ConfigRecord({"number": number})}), "train", 1, "1")
        for number in (1, 0, 3, 2, 4, 5, 7)
    ]
    replies = list(grid.send_and_receive(messages, timeout=20))
    grid.stop()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert sorted(reply.content["out"]["number"] for reply in replies) == [0, 1, 2, 3, 4, 5, 7]
    assert seen == {"0": [0, 1, 2, 4, 5], "1": [0, 3, 2, 4, 7]}


def test_the_run_is_kept(server_store):
    grid = DeepSpeedGrid(Mailbox(server_store), 1, 1)
    run = Run.create_empty(7)
    grid.set_run(run)
    assert grid.run is run
