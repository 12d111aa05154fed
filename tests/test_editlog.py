"""A copy of the graph of any age catches up; packed bits come back; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st
from test_edits import CHAIN, promote, prune, valid_edits

from sam_ds.errors import InputError
from sam_ds.federation.graphs import UNKNOWN, follow, graph_records
from sam_ds.graph.dag import random_graph
from sam_ds.graph.editlog import EditLog, catch_up, every_edge, pack_edges, unpack_edges
from sam_ds.graph.edits import apply


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[np.ndarray], EditLog]:
    """The graph after every round, ten of them, and the log."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    graphs, log = [np.stack([random_graph(6, 8, 2, rng) for _ in range(2)])], EditLog()
    for round_ in range(1, 11):
        graph_LEE, edits = graphs[-1], []
        for _ in range(rng.integers(0, 4)):
            edits.append(valid_edits(graph_LEE, 2)[rng.integers(len(valid_edits(graph_LEE, 2)))])
            graph_LEE = apply(graph_LEE, edits[-1:])
        graphs.append(graph_LEE)
        log = log.append(round_, edits)
    return graphs, log


@given(histories())
def test_a_copy_of_any_age_catches_up(history: tuple[list[np.ndarray], EditLog]) -> None:
    graphs, log = history
    for round_, graph_LEE in enumerate(graphs):
        count = sum(made <= round_ for made, _ in log.entries)
        assert (catch_up(graph_LEE, log, count) == graphs[-1]).all()
    again = EditLog.of_array(log.array())
    assert again == log and again.array().dtype == np.int64 and again.array().shape == (len(log), 5)


@given(histories(), st.integers(0, 2**32 - 1))
def test_bits_come_back(history: tuple[list[np.ndarray], EditLog], seed: int) -> None:
    for graph_LEE in history[0]:
        upper_LEE = every_edge(2, 6)
        mine_LEE = graph_LEE & (np.random.default_rng(seed).random(graph_LEE.shape) < 0.5)
        bits = pack_edges(mine_LEE, graph_LEE)
        assert len(bits) == -(-int(graph_LEE.sum()) // 8)
        assert (unpack_edges(bits, graph_LEE) == mine_LEE).all()
        assert (unpack_edges(pack_edges(graph_LEE, upper_LEE), upper_LEE) == graph_LEE).all()


@given(histories(), st.data())
def test_a_client_follows_the_server(history: tuple[list[np.ndarray], EditLog], data: st.DataObject) -> None:
    """Asked in some of the rounds, it has its graph each time, and the server's in its state."""
    graphs, log = history
    state, known = RecordDict(), UNKNOWN
    for round_, graph_LEE in enumerate(graphs):
        if data.draw(st.booleans()):
            so_far = EditLog(tuple(entry for entry in log.entries if entry[0] <= round_))
            mine_LEE = graph_LEE & (np.random.default_rng(round_).random(graph_LEE.shape) < 0.5)
            content = RecordDict(graph_records(graph_LEE, so_far, mine_LEE, known))
            found_LEE, holds = follow(content, state)
            assert (found_LEE == mine_LEE).all()
            assert holds == (UNKNOWN if known == UNKNOWN and "seen" not in state else len(so_far))
            state["seen"], known = state["graph"], holds


def test_what_conflicts_is_refused() -> None:
    log = EditLog().append(3, [promote(0, 2)]).append(6, [prune(1, 2)])
    end = catch_up(CHAIN, log, 0)
    assert (catch_up(end, log, 2) == end).all()
    for graph_LEE, count, words in (
        (CHAIN, 1, "last edge into"), (end, 0, "already there"), (end, 1, "not there"),
        (CHAIN, 3, "of 3 edits is not of this log, which has 2"), (CHAIN, -1, "of -1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            catch_up(graph_LEE, log, count)
    with pytest.raises(InputError, match="round 5 cannot follow those of round 6"):
        log.append(5, [])
    good = log.array()
    bad = (good[:, :4], good.astype(np.int32), good + [[0, 0, 0, 0, 2]], good[::-1].copy(), good * [[1, 1, 1, 0, 1]])
    for array in bad:
        with pytest.raises(InputError):
            EditLog.of_array(array)
    for bits in (np.zeros(2, np.uint8), np.zeros(1, np.int64), np.zeros((1, 1), np.uint8)):
        with pytest.raises(InputError, match="3 edges are 1 bytes"):
            unpack_edges(bits, CHAIN)
    with pytest.raises(AssertionError, match="has not"):
        pack_edges(end, CHAIN)


def test_a_copy_that_is_not_the_servers_is_named() -> None:
    log = EditLog().append(3, [promote(0, 2)])
    end = catch_up(CHAIN, log, 0)

    def sent(graph_LEE: np.ndarray, log: EditLog, known: int) -> RecordDict:
        return RecordDict(graph_records(graph_LEE, log, CHAIN, known))

    with pytest.raises(InputError, match="counts on a graph of 0 edits, this client has none"):
        follow(sent(end, log, 0), RecordDict())
    state = RecordDict()
    assert follow(sent(end, log, UNKNOWN), state)[1] == UNKNOWN
    with pytest.raises(InputError, match="counts on a graph of 0 edits, this client has one of 1 edits"):
        follow(sent(end, log, 0), state)
    with pytest.raises(InputError, match="the graph of 1 edits is not the server's"):
        follow(sent(CHAIN, log, 1), state)
    assert follow(sent(end, log, 1), state)[1] == 1
    assert follow(sent(end, log, UNKNOWN), state)[1] == 1
