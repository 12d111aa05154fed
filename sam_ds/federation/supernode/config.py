"""What one SuperNode is told by `--node-config`, beside the run config that all share."""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from flwr.app import Message

import sam_ds
from sam_ds.checked import Checked, Natural
from sam_ds.config import RunConfig, from_flat, to_toml
from sam_ds.errors import InputError, nearest
from sam_ds.tables import Scalar

OWN = ("out", "data")
"""Keys of the run config that a node may have its own value of: where the run folder and the corpus are there."""


def _default_folder() -> str:
    return str(Path(tempfile.gettempdir()) / f"sam_ds-{os.getuid()}")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeConfig(Checked):
    """The keys of `--node-config`, with `-` for `_`. Raises `InputError` for a value out of its range."""

    prefix: ClassVar[str] = "node-config "
    partition_id: Natural  # which client this node is, from 0
    num_partitions: Natural = 0  # Flower's simulation says it; the run config's `federation.clients` counts
    tiers: tuple[str, ...] = ()  # those that the worker has engines of; none = all of the run
    ranks: Natural = 0  # of the worker; 0 = the largest worker group of these tiers
    worker: str = field(default_factory=_default_folder)  # folder of the resident worker's socket and log


def node_of(node_config: Mapping[str, Scalar], run_config: Mapping[str, Scalar]) -> tuple[NodeConfig, RunConfig]:
    """The node's own configuration, and the run's as it is on this node. Raises InputError."""
    own = {key: value for key, value in node_config.items() if key in OWN}
    config = from_flat({**run_config, **own})
    values: dict[str, Any] = {key.replace("-", "_"): value for key, value in node_config.items() if key not in OWN}
    known = [each.name for each in fields(NodeConfig)]
    for name in values:
        if name not in known:
            shown = [key.replace("_", "-") for key in [*known, *OWN]]
            given = name.replace("_", "-")
            raise InputError(f"unknown key {given!r} in --node-config; known are {', '.join(shown)}"
                             f"{nearest(given, shown)}")
    if "partition_id" not in values:
        raise InputError("this SuperNode does not say which client it is: start it with --node-config "
                         "'partition-id=0' (or 1, 2, ...)")
    node = NodeConfig(**values)
    for tier in node.tiers:
        if tier not in config.tiers:
            raise InputError(f"node-config tiers has {tier!r}; the run's are {', '.join(config.tiers)}")
    return node, config


def client_of(node_config: Mapping[str, Scalar]) -> int:
    """Which client a node is."""
    return int(node_config["partition-id"])


def tier_of(message: Message, client: int, dealt: Sequence[str]) -> str:
    """The tier of the client that a message is to: the task's word, or what the run deals it (`dealt_tiers`). Raises
    InputError where the run has no such client."""
    asked = message.content["task"]
    if "tier" in asked:
        return str(asked["tier"])
    if not 0 <= client < len(dealt):
        raise InputError(f"node-config partition-id = {client} is none of the run's {len(dealt)} clients: start the "
                         "SuperNodes with 0, 1, ...")
    return dealt[client]


def identity(config: RunConfig, tiers: Sequence[str]) -> str:
    """What a worker is made from, code included: it answers for nothing else."""
    digest = hashlib.sha256(to_toml(config).encode() + ",".join(tiers).encode())
    for file in sorted(package_folder().rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def package_folder() -> Path:
    """Where this code lies: where it is installed, or where Flower has unpacked the app."""
    return Path(sam_ds.__file__).resolve().parent
