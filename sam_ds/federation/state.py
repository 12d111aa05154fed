"""Everything the server knows between two rounds, and its checkpoint on disk.

A checkpoint is one safetensors file, written beside its place, synced and renamed into it, with a checksum of its
contents: it is there whole or not at all, and a damaged one is told from a good one before anything is overwritten.
Equal states are equal bytes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sam_ds.errors import InputError, RunStopped
from sam_ds.federation.privacy import Released
from sam_ds.graph.editlog import EditLog
from sam_ds.wire.payload import Unit, parse_unit, unit_name

_VERSION = 3
_ARRAYS = ("graph", "scores", "rates", "examples", "fitness", "load", "used", "offered", "together", "used_total",
           "ever_held")  # fmt: skip
_SCALARS = ("round", "losses", "gamma", "downloads", "factor_seed", "released")


@dataclass(kw_only=True)
class ServerState:
    """Legend: N clients, L layers, E experts a layer."""

    round: int
    """The last round that is finished; 0 before the first."""
    units: dict[Unit, NDArray[np.float32]]
    moments: dict[Unit, tuple[NDArray[Any], ...]] = field(default_factory=dict)
    personal: dict[int, dict[Unit, NDArray[np.float32]]] = field(default_factory=dict)
    """Client -> the units that are its own, of the methods that have such."""
    graph: NDArray[np.bool_]
    """(L, E, E) M, the edges there are."""
    edits: EditLog = field(default_factory=EditLog)
    """That made M out of the converted model's graph."""
    scores: NDArray[np.float32]
    """(N, L, E) mean gate scores on each client's text, from registration."""
    rates: NDArray[np.float32]
    """(N, L, E) how often a route over the full graph visits each expert on that text."""
    examples: NDArray[np.int64]
    """(N,) |D_i|."""
    fitness: NDArray[np.float64]
    """(N, L, E) running mean of how often each client's tokens visit the experts it held; `rates` at first."""
    load: NDArray[np.float64]
    """(L, E) running mean of the share of a round's clients that held each expert."""
    used: NDArray[np.int64]
    """(L, E, E) counters since the last edit: credited edges."""
    offered: NDArray[np.int64]
    together: NDArray[np.int64]
    used_total: NDArray[np.int64]
    """(L, E, E) credited edges since the start."""
    ever_held: NDArray[np.bool_]
    """(N, L, E) which clients have downloaded which base experts of this generation."""
    downloads: int = 0
    """Base experts downloaded in the generations before it."""
    factor_seed: int | None = None
    """What the frozen low-rank factors of the next round are drawn from; None where there are none."""
    standins: NDArray[np.float32] | None = None
    """(L, E, Q, p) the stand-ins' cores since they were refitted; None: as they came with the base model."""
    losses: list[float] = field(default_factory=list)
    """Validation loss after each round, round 0 first; nats a token."""
    gamma: float = 0.0
    """Largest change of the loss that one edit has made so far."""
    released: Released = field(default_factory=dict)
    """What has left the server, with which noise."""


def save_checkpoint(state: ServerState, folder: Path, *, keep: int) -> Path:
    """Write `folder/round-NNNNN.safetensors` atomically and remove all but the newest `keep`."""
    arrays: dict[str, NDArray[Any]] = {name: getattr(state, name) for name in _ARRAYS}
    arrays["edits"] = state.edits.array()
    arrays |= {f"unit/{unit_name(unit)}": value for unit, value in state.units.items()}
    if state.standins is not None:
        arrays["standins"] = state.standins
    for unit, moments in state.moments.items():
        arrays |= {f"moment{index}/{unit_name(unit)}": value for index, value in enumerate(moments)}
    for client, own in state.personal.items():
        arrays |= {f"personal{client}/{unit_name(unit)}": value for unit, value in own.items()}
    arrays = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    scalars = {name: getattr(state, name) for name in _SCALARS}
    facts = {"version": _VERSION, "scalars": scalars, "checksum": _checksum(arrays, scalars)}
    # One entry: safetensors writes several in an order that differs from one process to the next.
    metadata = {"sam_ds": json.dumps(facts)}
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"round-{state.round:05d}.safetensors"
    write_atomically(target, save(arrays, metadata))
    for old in checkpoints(folder)[:-keep]:
        old.unlink()
    return target


def load_checkpoint(path: Path) -> ServerState:
    """Raises InputError for a file that is truncated, altered or of another version; the file is left as it is."""
    older = [other for other in checkpoints(path.parent) if other < path]
    hint = f"delete it to resume from {older[-1].name}" if older else "there is no older one: start the run anew"
    try:
        with safe_open(path, "np") as file:
            facts = json.loads((file.metadata() or {}).get("sam_ds", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"checkpoint {path} cannot be read ({error}); {hint}") from error
    if facts.get("version") != _VERSION:
        raise InputError(f"checkpoint {path} has version {facts.get('version')}, this package reads {_VERSION}")
    scalars = facts.get("scalars")
    if facts.get("checksum") != _checksum(arrays, scalars):
        raise InputError(f"checkpoint {path} is damaged: its checksum does not fit its contents; {hint}")
    units = {parse_unit(n.removeprefix("unit/")): v for n, v in arrays.items() if n.startswith("unit/")}
    moments: dict[Unit, list[NDArray[Any]]] = {}
    for name in sorted(name for name in arrays if name.startswith("moment")):
        moments.setdefault(parse_unit(name.partition("/")[2]), []).append(arrays[name])
    personal: dict[int, dict[Unit, NDArray[np.float32]]] = {}
    for name in sorted(name for name in arrays if name.startswith("personal")):
        owner, _, unit = name.removeprefix("personal").partition("/")
        personal.setdefault(int(owner), {})[parse_unit(unit)] = arrays[name]
    return ServerState(
        units=units, personal=personal, moments={unit: tuple(values) for unit, values in moments.items()},
        edits=EditLog.of_array(arrays["edits"]), standins=arrays.get("standins"),
        **{name: arrays[name] for name in _ARRAYS}, **scalars,
    )  # fmt: skip


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("round-*.safetensors") if re.fullmatch(r"round-\d{5}\.safetensors", p.name))


def checkpoint_round(path: Path) -> int:
    """The round that a checkpoint is of, by its name."""
    return int(path.stem.removeprefix("round-"))


def write_atomically(target: Path, data: bytes) -> None:
    """The file has the old contents or the new ones, whatever happens in between. Raises RunStopped where the disk
    does not take them."""
    temporary = unfinished(target)
    with writing(target):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(target.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or one that fails, ends the run with the name of what it was to take."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise RunStopped(f"cannot write {path}: {why}; make room and go on with --resume") from error


def unfinished(target: Path) -> Path:
    """Where a file or folder is made before it is renamed into its place; what an earlier process, killed at that,
    has left there is removed."""
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return target.with_name(f".{target.name}.{os.getpid()}")


def sync(*paths: Path) -> None:
    """Have files or folders on the disk before going on."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _checksum(arrays: dict[str, NDArray[Any]], scalars: Any) -> int:
    total = zlib.crc32(json.dumps(scalars).encode())
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(f"{name} {value.dtype} {value.shape}".encode(), total)
        total = zlib.crc32(value.tobytes(), total)
    return total
