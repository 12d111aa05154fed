"""What server and client say to each other survives the wire, and is counted as it is sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from in_process import Federation, over_the_wire, task_for

from sam_ds.clients.task import Result
from sam_ds.federation.graphs import UNKNOWN, graph_records
from sam_ds.federation.grid import identify
from sam_ds.federation.messages import (
    blob_record,
    blobs_of,
    count_bytes,
    counters_of,
    message_bytes,
    registration_content,
    registration_of,
    result_content,
    task_content,
    task_of,
)
from sam_ds.graph.editlog import EditLog
from sam_ds.wire.bundle import bundle
from sam_ds.wire.codec import encode
from sam_ds.wire.payload import RejectedUpdate, decode_units, encode_units

HELD = ((0, 1, 4), (0, 1, 2, 7))


@pytest.fixture(autouse=True)
def _identity():
    identify(0)


def sent(content):
    """The content as the other side has it."""
    return over_the_wire(Message(content, 1, "train", group_id="1")).content


@pytest.mark.parametrize("method", ["sam", "fedavg", "fedit"])
def test_task_round_trip(tiny, tmp_path, method):
    task = task_for(Federation.of(tiny.config(tmp_path, f"method={method}"), tiny.base).server, 4, round_=7)
    assert task.standins is None
    if method == "sam":
        task = replace(task, standins=np.random.default_rng(0).normal(size=(2, 8, 5, 12)).astype(np.float32))
    found = task_of(sent(task_content(task, encode_units(task.units, base_round=7))), task.graph_LEE)
    assert (found.round, found.client, found.tier, found.trains) == (7, 4, "medium", task.trains)
    assert found.held == task.held
    assert found.graph_LEE is task.graph_LEE
    if method == "sam":
        np.testing.assert_array_equal(found.condition, task.condition)
        np.testing.assert_array_equal(found.standins, task.standins)
    else:
        assert found.condition is None and task.condition is None
        assert found.standins is None
    assert found.units.keys() == task.units.keys()
    for unit, value in task.units.items():
        np.testing.assert_array_equal(found.units[unit], value)


def test_a_task_of_another_round_is_refused(tiny, tmp_path):
    task = task_for(Federation.of(tiny.config(tmp_path), tiny.base).server, 0, round_=7)
    with pytest.raises(RejectedUpdate, match="wrong-round"):
        task_of(sent(task_content(task, encode_units(task.units, base_round=6))), task.graph_LEE)


@pytest.fixture
def result():
    rng = np.random.default_rng(0)
    counters = [rng.integers(0, 99, size=(3, len(held), len(held))) for held in HELD]
    return Result(
        deltas={}, counters=counters, examples=12, tokens=128, loss_first=3.5, loss_last=3.25, load_seconds=0.5,
        train_seconds=1.5, started=1e9,
    )  # fmt: skip


def test_result_round_trip(tiny, tmp_path, result):
    task = task_for(Federation.of(tiny.config(tmp_path), tiny.base).server, 0)
    content = sent(result_content(result, encode_units(task.units, base_round=7), 7, edits=4))
    for found, value in zip(counters_of(content, HELD, 7), result.counters, strict=True):
        np.testing.assert_array_equal(found, value)
        assert found.dtype == np.int64
    deltas = decode_units(blobs_of(content["units"]), base_round=7)
    assert deltas.keys() == task.units.keys()
    for unit, value in task.units.items():
        np.testing.assert_array_equal(deltas[unit], value)
    assert dict(content["metrics"]) == {
        "num-examples": 12, "tokens": 128, "loss-first": 3.5, "loss-last": 3.25, "load-seconds": 0.5,
        "train-seconds": 1.5, "started": 1e9, "edits": 4,
    }  # fmt: skip


def with_counter(result, blob):
    """The content of a reply whose second counter is this blob, or is missing."""
    content = result_content(result, {}, 7, edits=0)
    blobs = {name: data for name, data in blobs_of(content["counters"]).items() if name != "shared/counters/1"}
    content["counters"] = blob_record(blobs if blob is None else blobs | {"shared/counters/1": blob})
    return sent(content)


good = np.ones((3, 4, 4), np.int64)


@pytest.mark.parametrize(
    "blob, reason",
    [
        (None, "missing-unit"),
        (encode(good, base_round=7)[:-1], "corrupt"),
        (b"", "corrupt"),
        (encode(good, base_round=6), "wrong-round"),
        (encode(good[:, :3], base_round=7), "wrong-shape"),
        (encode(good.astype(np.float32), base_round=7), "wrong-shape"),
        (encode(good - 2, base_round=7), "corrupt"),
    ],
)
def test_bad_counters_are_refused(result, blob, reason):
    with pytest.raises(RejectedUpdate) as refusal:
        counters_of(with_counter(result, blob), HELD, 7)
    assert refusal.value.reason == reason


def test_another_serialisation_is_refused():
    """A pickle, for one."""
    with pytest.raises(RejectedUpdate, match="corrupt: an array of type 'numpy.ndarray'"):
        blobs_of(ArrayRecord({"blobs": Array(np.zeros(3))}))
    for record in (ArrayRecord({}), ArrayRecord({"shared/x": Array(np.zeros(3))})):
        with pytest.raises(RejectedUpdate, match=f"corrupt: {len(record)} arrays where one named 'blobs'"):
            blobs_of(record)
    cut = blob_record({"shared/x": b"1234"})
    cut["blobs"].data = cut["blobs"].data[:-1]
    with pytest.raises(RejectedUpdate, match="corrupt: the blob 'shared/x' of 4 bytes does not lie"):
        blobs_of(cut)


def test_bytes_are_counted_as_sent(tiny, tmp_path):
    task = task_for(Federation.of(tiny.config(tmp_path), tiny.base).server, 0)
    blobs = encode_units(task.units)
    content = task_content(task, blobs)
    content.update(graph_records(task.graph_LEE, EditLog(), task.graph_LEE, UNKNOWN))
    message = Message(content, 1, "train", group_id="1")
    serialised = len(message_to_proto(message).SerializeToString())
    assert message_bytes(message) == serialised
    counted = count_bytes(message, raw=123)
    assert (counted.raw, counted.message) == (123, serialised)
    # 14 of the 28 edges of either layer are there, and all are the client's: a bit each, and a bit each of all.
    tails, heads = np.triu_indices(8, 1)
    bits = (np.ones(28, bool), task.graph_LEE[:, tails, heads])
    mine, whole = (encode(np.packbits(flags)) for flags in bits)
    records = (blobs, {"condition": encode(task.condition, base_round=1)}, {"mine": mine, "whole": whole})
    assert counted.encoded == sum(len(bundle(record)) for record in records)
    assert counted.encoded < counted.message


@pytest.mark.parametrize(("wrong", "words"), [
    ({"client": 6}, "client 6 is none of the 6"),
    ({"client": 1.0}, "client 1.0 is none"),
    ({"num-examples": 0}, "has 0 examples"),
    ({"tier": "large"}, r"wrong-tier: client 1 says tier and experts are \('large', 4\), the run has \('small', 4\)"),
    ({"capacity": 8}, r"wrong-tier: client 1 says tier and experts are \('small', 8\)"),
    ({"rates": np.full((2, 8), 1.5, np.float32)}, "rates of client 1 are not finite, or no shares"),
    ({"scores": np.full((2, 8), np.nan, np.float32)}, "scores of client 1 are not finite"),
    ({"scores": np.zeros((2, 9), np.float32)}, r"scores of client 1 are float32 \(2, 9\)"),
    ({"scores": None}, "scores of client 1"),
])  # fmt: skip
def test_a_registration_is_checked(wrong, words):
    arrays = {"scores": np.zeros((2, 8), np.float32), "rates": np.ones((2, 8), np.float32)}
    facts = {"client": 1, "tier": "small", "capacity": 4, "num-examples": 3}
    dealt = [("small", 4)] * 4 + [("large", 8)] * 2

    def content(wrong):
        given, said = ({name: wrong.get(name, value) for name, value in all_.items()} for all_ in (arrays, facts))
        made = registration_content(
            said["client"], said["tier"], said["capacity"], said["num-examples"], arrays["scores"], arrays["rates"]
        )  # fmt: skip
        blobs = {f"shared/{name}": encode(value) for name, value in given.items() if value is not None}
        return RecordDict({**made, "description": blob_record(blobs)})

    client, examples, scores, rates = registration_of(content({}), (2, 8), dealt)
    assert (client, examples, scores.sum(), rates.sum()) == (1, 3, 0, 16)
    with pytest.raises(RejectedUpdate, match=words):
        registration_of(content(wrong), (2, 8), dealt)
