"""Error feedback: what rounding took from a client's update is added to its next one.

A client sends Q(d + e), d its update and e its residual, rounded to nearest, and keeps e' = d + e - Q(d + e): over the
rounds it sends the sum of its updates but for the last residual (Seide et al., Interspeech 2014; Karimireddy et al.,
1901.09847, algorithm 2). A unit that is not sent in a round keeps its residual until it is.

- Under `ht` nothing is fed back: stochastic rounding is unbiased, as the aggregation is, and a residual would come back
  under another 1 / p than the error was made under.
- The residuals are in the client's Flower `Context.state`. A runtime that makes contexts anew, as the launcher's ranks
  do, where a client has no place of its own and a run must resume bit for bit, keeps none: rounding is stochastic
  there, and wherever a client finds no state of its own, as in its first round.
- Residuals of low-rank factors end with their generation (`train.redraw_every`): they are coordinates in factors that
  are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from sam_ds.clients.generations import generation
from sam_ds.config import RunConfig
from sam_ds.federation.messages import blob_record, blobs_of
from sam_ds.federation.methods.registry import METHODS
from sam_ds.wire.payload import RejectedUpdate, Unit, decode_units, encode_units

_UPLOAD = 4
"""Keeps the generator of stochastic rounding apart from those of participation (1, 2) and exploration (3)."""
_STEPS = ("int8", "int4")


def encode_update(
    deltas: Mapping[Unit, NDArray[np.float32]], state: RecordDict, config: RunConfig, *, round_: int, client: int
) -> dict[str, bytes]:
    """The blobs of a client's update, as `config.wire` has it; its residuals, where it has any, are in `state`."""
    wire = config.wire
    options: dict[str, Any] = {"values": wire.values, "base_round": round_, "compress": wire.compress}
    if wire.values in _STEPS and _feeds_back(config):
        residuals = _residuals(state, generation(config, round_))
        if residuals is not None:
            corrected = {unit: delta + residuals.get(unit, np.float32(0)) for unit, delta in deltas.items()}
            blobs = encode_units(corrected, **options)
            sent = decode_units(blobs)
            residuals |= {unit: value - sent[unit] for unit, value in corrected.items()}
            state["residuals"] = blob_record(encode_units(residuals))
            return blobs
    rng = np.random.default_rng([_UPLOAD, config.seed, round_, client])
    return encode_units(deltas, rng=rng if wire.values in _STEPS else None, **options)


def _feeds_back(config: RunConfig) -> bool:
    rule = METHODS[config.method].aggregate(config)
    return rule.rule != "ht" or rule.robust != "none"


def _residuals(state: RecordDict, generation_: int) -> dict[Unit, NDArray[np.float32]] | None:
    """Those of this generation; None where nothing says that the state was kept, and then something does."""
    kept = state["feedback"] if "feedback" in state else None
    state["feedback"] = ConfigRecord({"generation": generation_})
    if kept is None:
        return None
    if kept["generation"] != generation_ or "residuals" not in state:
        return {}
    try:
        return decode_units(blobs_of(state["residuals"]))
    except RejectedUpdate:
        return {}  # of another release of the codec, or damaged: as good as none
