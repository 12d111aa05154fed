"""A message on its way from the ClientApp to the resident worker of its node, and the reply on its way back.

Flower starts a process for every message, which would load torch, the model and an engine each time. The worker
(`resident.py`) keeps them; it is found by a socket in a folder that only its user may enter. Where there is none, or
one of another run, this process starts it, and it ends with the SuperExec that this process is a child of.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message
from flwr.common.serde import (
    context_to_proto,
    message_from_proto,
    message_to_proto,
    recorddict_from_proto,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from sam_ds.clients.dealing import dealt_tiers
from sam_ds.config import RunConfig, to_toml
from sam_ds.errors import InputError
from sam_ds.federation.supernode.config import NodeConfig, client_of, identity, node_of, package_folder, tier_of
from sam_ds.federation.supernode.frames import receive, send

SOCKET, LOG = "worker.sock", "worker.log"
STOP = b"stop"
"""Asked for instead of a run, it ends the worker."""
ACCEPTED, OTHER = b"accepted", b"other"
_POLL_SECONDS = 0.02
_LEAVE_SECONDS = 60.0
"""A worker says by then whether it takes a message, and one that was stopped is gone."""


class WorkerDied(RuntimeError):
    """The node's worker ended instead of answering."""


def relay(message: Message, context: Context) -> Message:
    """The worker's reply; `context.state` becomes what the worker made of it.

    Raises InputError for a node that is set up wrongly, WorkerDied where the worker ends before it has answered: the
    next message starts another.
    """
    node, config = node_of(context.node_config, context.run_config)
    tier = tier_of(message, client_of(context.node_config), dealt_tiers(config))
    if node.tiers and tier not in node.tiers:
        raise InputError(f"this node is for clients of {', '.join(node.tiers)} (node-config tiers), but client "
                         f"{node.partition_id} is of the tier {tier}: give it another partition-id, or tiers")
    folder = private_folder(node.worker)
    request = (
        tier.encode(), context_to_proto(context).SerializeToString(), message_to_proto(message).SerializeToString()
    )  # fmt: skip
    with _connection(folder, config, node) as connection:
        try:
            send(connection, *request)
            state, reply = receive(connection, 2)
        except OSError as error:
            raise WorkerDied(f"the worker of this node ended before it had answered ({error}):\n{_tail(folder)}") \
                from error
    context.state = recorddict_from_proto(ProtoRecordDict.FromString(state))
    return message_from_proto(ProtoMessage.FromString(reply))


def stop(folder: Path) -> bool:
    """Send the worker of this folder home and wait until it has left; False where there was none."""
    with _locked(folder):
        if (connection := connect(folder)) is None:
            return False
        with connection:
            _accepted(connection, STOP)
        _wait_until_gone(folder, _LEAVE_SECONDS)
    return True


def private_folder(name: str) -> Path:
    """The folder, made if need be. Raises InputError unless it is this user's alone: who may write to the socket in it
    has the worker read what he likes."""
    folder = Path(name).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise InputError(f"node-config worker: {folder} must belong to the user of the SuperNode and be closed to all "
                         "others (chmod 700)")
    # The kernel's limit on the address of a socket.
    if len(os.fsencode(folder / SOCKET)) > 107:
        raise InputError(f"node-config worker: {folder} is too long a path for a socket, give a shorter one")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time starts or ends the worker."""
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _connection(folder: Path, config: RunConfig, node: NodeConfig) -> socket.socket:
    """A connection to the worker of this run, which waits for a request. Starts one if need be."""
    wanted = identity(config, node.tiers).encode()
    with _locked(folder):
        if (connection := connect(folder)) is not None:
            if _accepted(connection, wanted):
                return connection
            connection.close()
            _wait_until_gone(folder, config.federation.timeout_seconds)
        connection = _start(folder, config, node)
        if not _accepted(connection, wanted):
            connection.close()
            raise WorkerDied(f"the worker was started for another run, or from other code:\n{_tail(folder)}")
        return connection


def connect(folder: Path) -> socket.socket | None:
    """A connection to whatever worker is in this folder, or None."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(folder / SOCKET))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return connection


def _accepted(connection: socket.socket, wanted: bytes) -> bool:
    """Whether the worker is of the run that is wanted; one of another, or one that is leaving, goes home."""
    connection.settimeout(_LEAVE_SECONDS)
    try:
        send(connection, wanted)
        accepted = receive(connection, 1) == [ACCEPTED]
    except OSError:
        return False
    connection.settimeout(None)
    return accepted


def _wait_until_gone(folder: Path, seconds: float) -> None:
    """A worker that leaves keeps its socket until its memory is free, and answers what it has begun."""
    deadline = time.monotonic() + seconds
    while (connection := connect(folder)) is not None:
        with connection:
            connection.settimeout(max(_POLL_SECONDS, deadline - time.monotonic()))
            try:
                connection.recv(1)  # nothing comes: the door ends it, or the worker's end does
            except TimeoutError:
                raise WorkerDied(f"the worker in {folder} was sent home but stays:\n{_tail(folder)}") from None
            except ConnectionError:
                pass


def _start(folder: Path, config: RunConfig, node: NodeConfig) -> socket.socket:
    """Start the ranks of a worker and wait for its door to open."""
    file = folder / "config.toml"
    file.write_text(to_toml(config))
    ranks = node.ranks or max(config.ranks_of(config.tiers[name]) for name in node.tiers or config.working_tiers)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--module", "sam_ds.federation.supernode.resident", "--config", str(file), "--worker", str(folder),
        "--owner", str(os.getppid()), *(["--tiers", ",".join(node.tiers)] if node.tiers else []),
    ]  # fmt: skip
    paths = [str(package_folder().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open(folder / LOG, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    deadline = time.monotonic() + config.federation.timeout_seconds
    while (connection := connect(folder)) is None:
        if process.poll() is not None:
            raise WorkerDied(f"the worker of this node could not start (exit code {process.returncode}):\n"
                             f"{_tail(folder)}")
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            raise WorkerDied(f"the worker of this node did not start in federation.timeout_seconds = "
                             f"{config.federation.timeout_seconds:g}:\n{_tail(folder)}")
        time.sleep(_POLL_SECONDS)
    return connection


def free_port() -> int:
    """One of this machine that nobody listens at, as of now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(folder: Path) -> str:
    """The end of the worker's log; one that was started by hand has none here."""
    if not (folder / LOG).exists():
        return f"(no {folder / LOG})"
    with open(folder / LOG, "rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
        return f"{log.read().decode(errors='replace').strip()}\n(from {folder / LOG})"
