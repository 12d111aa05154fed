"""Replies come back in the order of the messages, whatever the grid hands over; everything else is refused by name."""

from __future__ import annotations

from itertools import count

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from in_process import over_the_wire

from sam_ds.federation import exchange as exchange_module
from sam_ds.federation.exchange import Exchange
from sam_ds.federation.grid import identify

PATH = "../../../etc/passwd"


class Script:
    """A grid that hands over what it is told to, poll by poll, whatever it was asked for."""

    def __init__(self, polls):
        self.polls = polls
        """A list of lists of functions: message by place -> reply."""
        self.messages = []

    def push_messages(self, messages):
        for place, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{PATH}{len(self.messages) + place}"
        self.messages += messages
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, identities):
        return [make(self.messages) for make in (self.polls.pop(0) if self.polls else [])]


def reply_to(place, node=None, value=0, error=False):
    def make(messages):
        content = Error(3, "gone") if error else RecordDict({"out": ConfigRecord({"place": place, "value": value})})
        reply = Message(content, reply_to=over_the_wire(messages[place]))
        reply.metadata.__dict__["_src_node_id"] = messages[place].metadata.dst_node_id if node is None else node
        reply.metadata.__dict__["_message_id"] = PATH
        return reply

    return make


def to_nobody(messages):
    reply = reply_to(0)(messages)
    reply.metadata.__dict__["_reply_to_message_id"] = f"{PATH}x"
    return reply


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    identify(0)
    monkeypatch.setattr(exchange_module, "_POLL_SECONDS", 0.0)


@pytest.fixture
def exchange(tmp_path):
    """(the exchange, what it refused)."""
    refused = []
    return Exchange(tmp_path, lambda node, reason, detail: refused.append((node, reason))), refused


def ask(number, round_="1"):
    return [Message(RecordDict({}), 10 + place, "train", group_id=round_) for place in range(number)]


@settings(max_examples=40)
@given(data=st.data())
def test_in_order_each_once_and_in_time(data, tmp_path_factory):
    """Every message is answered in some poll, or never; amid answers that are none."""
    number = data.draw(st.integers(1, 6))
    when = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, None]), min_size=number, max_size=number))
    polls = [[reply_to(place) for place in range(number) if when[place] == poll] for poll in range(4)]
    extra, expected = count(), []
    for poll in range(4):
        for _ in range(data.draw(st.integers(0, 2))):
            next(extra)
            kind = data.draw(st.sampled_from(["wrong-node", "unasked", "duplicate"]))
            place = data.draw(st.integers(0, number - 1))
            if kind == "duplicate" and when[place] is not None and when[place] < poll:
                polls[poll].append(reply_to(place, value=9))
            elif kind == "wrong-node" and (when[place] is None or when[place] > poll):
                polls[poll].append(reply_to(place, node=99, value=9))
            else:
                polls[poll], kind = [*polls[poll], to_nobody], "unasked"
            expected.append((poll, kind))
        polls[poll] = data.draw(st.permutations(polls[poll]))
    refused, folder = [], tmp_path_factory.mktemp("spool")
    own = Exchange(folder, lambda node, reason, detail: refused.append(reason))
    # Whoever never answers is given up when all the others have come: after the fourth poll, with nobody else waiting.
    last = max([poll for poll in when if poll is not None], default=0)
    seconds = [1e9 if poll is not None else 0.0 for poll in when]
    places = []
    for reply in own.replies(Script(polls), ask(number), seconds):
        places.append((reply.content["out"]["place"], reply.content["out"]["value"], own.turn(reply)))
        assert all(path.name.startswith("reply-00000") for path in folder.iterdir())
    assert places == [(place, 0, place) for place in range(number) if when[place] is not None]
    in_time = [kind for poll, kind in expected if poll <= last]
    late = sum(kind == "wrong-node" for poll, kind in expected if 0 < poll <= last)
    assert len(refused) == len(in_time) and refused.count("unasked") == in_time.count("unasked")
    assert refused.count("late") <= late and not list(folder.iterdir())


def test_an_error_of_flowers_own_node_is_an_answer(exchange):
    own, refused = exchange
    (reply,) = own.replies(Script([[reply_to(0, node=1, error=True)]]), ask(1), [60.0])
    assert reply.has_error() and not refused


def test_a_late_answer_is_taken_off_the_grid_once(exchange):
    own, refused = exchange
    grid = Script([[]])
    assert list(own.replies(grid, ask(2), [0.0, 0.0])) == []
    grid.polls = [[reply_to(0), reply_to(0)]]
    own.refuse_late(grid)
    assert refused == [(10, "late"), (10, "duplicate")]
    grid.polls = [[reply_to(1), reply_to(2)]]
    (reply,) = own.replies(grid, ask(1, "2"), [60.0])
    assert own.turn(reply) == 0 and refused[2:] == [(11, "late")]


def test_what_the_grid_did_not_take_is_not_waited_for(exchange):
    own, _ = exchange
    for identities in ([None, PATH], []):
        grid = Script([])
        grid.push_messages = lambda messages, identities=identities: identities
        assert list(own.replies(grid, ask(2), [0.0, 0.0])) == []
        assert [own.sent(0), own.sent(1)] == [False, bool(identities)]
