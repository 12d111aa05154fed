"""Error feedback: what rounding took comes back where the aggregation is not unbiased and a client's state is kept."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from in_process import Federation

from sam_ds.federation.feedback import encode_update
from sam_ds.federation.messages import blob_record, blobs_of
from sam_ds.wire.payload import ExpertUnit, decode_units, encode_units

UP, DOWN = ExpertUnit(0, 1, "up"), ExpertUnit(0, 2, "down")
BIASED = ("federation.aggregation=none",)


def updates(rounds):
    """One value of each row sets the scale; the others are below half a step of int4, so that rounding drops them."""
    rng = np.random.default_rng(0)
    small = rng.uniform(-0.05, 0.05, (rounds, 4, 64)).astype(np.float32) + np.float32(0.02)
    small[:, :, 0] = 1
    return small


def sent_in(config, deltas, state, *, units=lambda round_: (UP,), keep=True):
    """What a client sends in rounds 1, 2, ..., decoded and summed over the rounds."""
    total = {UP: np.zeros(deltas.shape[1:]), DOWN: np.zeros(deltas.shape[1:])}
    for round_, delta in enumerate(deltas, 1):
        own = state if keep else RecordDict()
        state.update(recorddict_from_proto(recorddict_to_proto(state)))  # as a node hands it to the ClientApp
        blobs = encode_update({unit: delta for unit in units(round_)}, own, config, round_=round_, client=3)
        for unit, value in decode_units(blobs, base_round=round_).items():
            total[unit] += value
    return total


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_the_rounds_send_the_sum_of_the_updates_but_for_the_residual(tiny, tmp_path, values):
    config = tiny.config(tmp_path, f"wire.values={values}", *BIASED)
    deltas, state = updates(20), RecordDict()
    first = sent_in(config, deltas[:1], state)[UP]
    assert "residuals" not in state, "nothing said that the state would be kept"
    total = sent_in(config, deltas[1:], state)[UP]
    left = decode_units(blobs_of(state["residuals"]))[UP]
    np.testing.assert_allclose(total + left, deltas[1:].sum(0, dtype=np.float64), atol=1e-5)
    steps = {"int8": 127, "int4": 7}[values]
    assert np.abs(left).max() <= 0.51 * 1.1 / steps
    nearest = decode_units(encode_units({UP: deltas[1]}, values=values))[UP]
    if values == "int4":
        assert not nearest[:, 1:].any(), "without feedback all of it would be lost"
    assert np.abs(first[:, 0] - 1).max() < 1 / steps


def test_a_unit_that_is_not_sent_keeps_its_residual(tiny, tmp_path):
    config = tiny.config(tmp_path, "wire.values=int4", *BIASED)
    deltas, state = updates(12), RecordDict()

    def units(round_):
        return (UP,) if round_ % 3 else (UP, DOWN)

    sent_in(config, deltas[:1], state)
    total = sent_in(config, deltas, state, units=units)
    left = decode_units(blobs_of(state["residuals"]))
    np.testing.assert_allclose(total[DOWN] + left[DOWN], deltas[2::3].sum(0, dtype=np.float64), atol=1e-5)
    np.testing.assert_allclose(total[UP] + left[UP], deltas.sum(0, dtype=np.float64), atol=1e-5)


@pytest.mark.parametrize(("overrides", "keep"), [
    (("federation.aggregation=ht",), True),
    (BIASED, False),
    (("federation.aggregation=hajek",), False),
])  # fmt: skip
def test_rounding_is_stochastic_under_ht_and_where_no_state_is_kept(tiny, tmp_path, overrides, keep):
    config = tiny.config(tmp_path, "wire.values=int4", *overrides)
    deltas, state = updates(3), RecordDict()
    total = sent_in(config, deltas, state, keep=keep)[UP]
    want = np.zeros_like(total)
    for round_, delta in enumerate(deltas, 1):
        rng = np.random.default_rng([4, config.seed, round_, 3])
        want += decode_units(encode_units({UP: delta}, values="int4", rng=rng))[UP]
    assert (total == want).all()
    assert not state


@pytest.mark.parametrize("overrides", [
    BIASED, ("federation.aggregation=hajek",), ("federation.aggregation=clipped",), ("method=fedavg",),
    ("federation.robust=median",),
])  # fmt: skip
def test_every_biased_rule_feeds_back(tiny, tmp_path, overrides):
    state = RecordDict()
    sent_in(tiny.config(tmp_path, "wire.values=int8", *overrides), updates(2), state)
    assert "residuals" in state


@pytest.mark.parametrize("values", ["raw", "bf16"])
def test_what_is_not_rounded_in_steps_has_no_residual(tiny, tmp_path, values):
    state = RecordDict()
    sent_in(tiny.config(tmp_path, f"wire.values={values}", *BIASED), updates(3), state)
    assert not state


def test_residuals_of_other_factors_or_that_cannot_be_read_are_dropped(tiny, tmp_path):
    sliced = [f"tiers.{tier}.trains=lora" for tier in ("small", "medium", "large")]
    config = tiny.config(tmp_path, "wire.values=int4", "train.redraw_every=2", *sliced, *BIASED)
    deltas = updates(3)

    def third(state):
        return encode_update({UP: deltas[2]}, state, config, round_=3, client=3)

    state = RecordDict()
    sent_in(config, deltas[:2], state)
    assert "residuals" in state
    fresh = encode_units({UP: deltas[2]}, values="int4", base_round=3)
    assert third(state) == fresh, "round 3 has factors of its own"
    kept = decode_units(blobs_of(state["residuals"]))[UP]
    assert third(state) != fresh
    state["residuals"] = blob_record({"expert/0/1/up": b"damaged"})
    assert third(state) == fresh
    assert (decode_units(blobs_of(state["residuals"]))[UP] == kept).all()


def test_clients_of_a_federation_keep_residuals(tiny, new_worker, tmp_path):
    """Through messages: nodes that keep their contexts have residuals of what they sent."""
    overrides = ("wire.values=int8", *BIASED, "federation.clients_per_round=6")
    config = tiny.config(tmp_path / "run", *overrides)
    federation = Federation.of(config, tiny.base, new_worker(*overrides), keep=True).start()
    assert federation.server.state.round == 2 and len(federation.grid.contexts) == 6
    for reply in federation.grid.seen[-6:]:
        kept = decode_units(blobs_of(federation.grid.contexts[reply.metadata.src_node_id]["residuals"]))
        assert kept.keys() == decode_units(blobs_of(reply.content["units"])).keys()
        assert any(value.any() for value in kept.values())
