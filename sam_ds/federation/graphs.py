"""How graphs travel: the edits that a client missed, or the whole graph M, and the client's own part of it as bits.

A client keeps its copy of M in its Flower `Context.state`, and each reply says how many edits the copy holds, once the
client has found it again there: a runtime that makes contexts anew, as the launcher's ranks do, never says so. To whom
has said so the server sends the edits since; to anyone else, and after any reply that failed, M whole. A checksum of M
goes along, so that bits are never read over another graph.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from sam_ds.errors import InputError
from sam_ds.federation.messages import blob_record, blobs_of
from sam_ds.graph.editlog import EditLog, catch_up, every_edge, pack_edges, unpack_edges
from sam_ds.wire.codec import decode, encode

UNKNOWN = -1
"""Edits that a client is known to hold, where it is not known."""


def graph_records(
    graph_LEE: NDArray[np.bool_], log: EditLog, mine_LEE: NDArray[np.bool_], known: int
) -> dict[str, Any]:
    """The records `graph` and `edits` of a train message to a client that holds `known` edits, or `UNKNOWN`."""
    upper_LEE = every_edge(*graph_LEE.shape[:2])
    blobs = {"mine": encode(pack_edges(mine_LEE, graph_LEE))}
    if known == UNKNOWN:
        blobs["whole"] = encode(pack_edges(graph_LEE, upper_LEE))
    elif known < len(log):
        blobs["missed"] = encode(log.array()[known:])
    facts = ConfigRecord(
        {"shape": list(graph_LEE.shape[:2]), "count": len(log), "known": known, "checksum": _checksum(graph_LEE)}
    )
    return {"graph": blob_record(blobs), "edits": facts}


def follow(content: RecordDict, state: RecordDict) -> tuple[NDArray[np.bool_], int]:
    """The client's own graph (L, E, E), and how many edits its copy of M, brought up to date in `state`, is sure to
    hold at the next message.

    Raises InputError where the copy is not the one that the server counts on: it then sends M whole.
    """
    blobs = blobs_of(content["graph"])
    facts: dict[str, Any] = dict(content["edits"])
    upper_LEE = every_edge(*facts["shape"])
    copy: dict[str, Any] | None = dict(state["graph"]) if "graph" in state else None
    if facts["known"] == UNKNOWN:
        graph_LEE = unpack_edges(decode(blobs["whole"])[0], upper_LEE)
    else:
        if copy is None or copy["count"] != facts["known"]:
            held = "none" if copy is None else f"one of {copy['count']} edits"
            raise InputError(f"the server counts on a graph of {facts['known']} edits, this client has {held}")
        graph_LEE = unpack_edges(np.frombuffer(copy["graph"], np.uint8), upper_LEE)
        if "missed" in blobs:
            graph_LEE = catch_up(graph_LEE, EditLog.of_array(decode(blobs["missed"])[0]), 0)
    if _checksum(graph_LEE) != facts["checksum"]:
        raise InputError(f"the graph of {facts['count']} edits is not the server's")
    packed = pack_edges(graph_LEE, upper_LEE).tobytes()
    state["graph"] = ConfigRecord({"count": facts["count"], "graph": packed})
    return unpack_edges(decode(blobs["mine"])[0], graph_LEE), UNKNOWN if copy is None else facts["count"]


def _checksum(graph_LEE: NDArray[np.bool_]) -> int:
    return zlib.crc32(np.packbits(graph_LEE).tobytes())
