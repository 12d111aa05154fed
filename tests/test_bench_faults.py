"""`sam-ds bench faults`: it tells what ends as it must from what does not, and hostile clients do what they say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from sam_ds.bench import faults, hostile
from sam_ds.bench.tampering import FAULTS, Fault, crash
from sam_ds.cli import main
from sam_ds.federation.grid import identify
from sam_ds.federation.messages import blob_record, blobs_of
from sam_ds.wire.codec import decode, encode


@pytest.mark.parametrize("arguments", [["--kills", "-1"], ["--kills", "2", "--hostile"]], ids=" ".join)
def test_bad_input_ends_with_2(arguments, capsys):
    assert main(["bench", "faults", *arguments]) == 2
    assert f"--kills {arguments[1]} must not be negative" in capsys.readouterr().err


def test_what_is_not_as_it_must_be_is_seen(tiny, one_rank, monkeypatch):
    """A wrong name, and an answer that is taken for one that is folded."""
    own = {name: FAULTS[name] for name in ("answers a round later", "answers twice")}
    own |= {"misnamed": Fault(crash, "no-answer"), "not folded": Fault(crash)}
    monkeypatch.setattr(faults, "FAULTS", own)
    monkeypatch.setattr(faults, "write_tiny", lambda root: tiny)
    rows = {row["fault"]: row for row in faults.fault_rows(0, 0, 1)}
    assert [rows[name]["as_it_must"] for name in own] == [True, True, False, False]
    assert [rows[name]["equal"] for name in own] == [1, 1, 1, 0]
    assert [rows[name]["named"] for name in own] == ["no-answer + late", "duplicate", "client-failed", "client-failed"]
    assert rows["not folded"]["formula"] > 1e-4 > 1e-6 > rows["misnamed"]["formula"]


def answer(value, round_="1"):
    """A reply of two units."""
    identify(0)
    message = Message(RecordDict({}), 5, "train", group_id=round_)
    units = {"expert/0/1/up": encode(np.full(3, value, np.float32)), "shared/norm": encode(np.ones(2, np.float32))}
    return Message(RecordDict({"units": blob_record(units), "metrics": MetricRecord({"edits": 0})}), reply_to=message)


def sent(reply):
    return {name: decode(blob)[0] for name, blob in blobs_of(reply.content["units"]).items()}


@pytest.mark.parametrize("attack, factor", [("x10", 10), ("x-10", -10), ("flip", -1)])
def test_attacks_scale_the_update(attack, factor):
    tampers = hostile.hostile(attack)
    assert tampers.keys() == set(hostile.HOSTILE)
    found = sent(tampers[hostile.HOSTILE[0]](answer(0.5)))
    np.testing.assert_array_equal(found["expert/0/1/up"], np.full(3, 0.5 * factor))
    np.testing.assert_array_equal(found["shared/norm"], np.full(2, factor))


def test_colluders_send_the_same_within_a_round():
    first, second = hostile.hostile("collude").values()
    one, other, later = sent(first(answer(0.5))), sent(second(answer(0.25))), sent(first(answer(0.25, "2")))
    np.testing.assert_array_equal(one["expert/0/1/up"], np.full(3, -5.0))
    np.testing.assert_array_equal(other["expert/0/1/up"], np.full(3, -5.0))
    np.testing.assert_array_equal(later["expert/0/1/up"], np.full(3, -2.5))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_kills_in_every_phase_resume_to_the_same_bytes(tiny, tmp_path, capsys):
    arguments = ["bench", "faults", "--kills", "5", "--runs", str(tmp_path), "--model", str(tiny.model), "--data",
                 str(tiny.corpus), "--json"]  # fmt: skip
    for _ in range(2):  # the second time nothing is run again
        assert main(arguments) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["ratios"] == {"equal": 1.0} and len(result["rows"]) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_hostile_updates_hurt_the_mean_more_than_the_median(tiny, tmp_path, one_rank, monkeypatch):
    monkeypatch.setattr(hostile, "SETTINGS", {"fedavg": ("method=fedavg",)})
    monkeypatch.setattr(hostile, "ATTACKS", ("no", "x-10"))
    monkeypatch.setattr(hostile, "ROBUST", ("none", "median"))
    small = ("evaluation.window=32", "evaluation.stride=32", "train.sequence=16", "sam.calibration_tokens=1024")
    given = (0, str(tiny.model), str(tiny.corpus), str(tmp_path), 0, 1, small)
    ratios = hostile.hostile_rows(*given)["ratios"]
    assert ratios["fedavg x-10 none"] > 1.2 > ratios["fedavg x-10 median"]
    assert hostile.hostile_rows(*given)["ratios"] == ratios
