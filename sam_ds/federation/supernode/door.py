"""Where the resident worker takes requests: a socket that rank 0 listens at, and the reasons for which it closes."""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sam_ds.federation.grid import TaskQueue
from sam_ds.federation.supernode.frames import pack, receive, send, unpack
from sam_ds.federation.supernode.relay import ACCEPTED, OTHER, SOCKET, STOP

_POLL_SECONDS, _LOOK_SECONDS = 0.005, 0.2
_GRACE_SECONDS = 20.0
"""For what is being trained when the worker is stopped."""


class Door:
    """Answers each connection in a thread of its own, through the pods' task queue, and sends the pods home at the end:
    when the worker was stopped, its owner has ended, another run is asked for, or nobody has come for long.
    """

    def __init__(
        self, folder: Path, run: str, queue: TaskQueue, lanes: Callable[[str], int], *, owner: int | None,
        idle_seconds: float,
    ) -> None:  # fmt: skip
        """Opens at once. `run`: the only one served. `lanes(tier)`: how many requests of its clients a pod answers at
        a time. `owner`: a process without which nobody will come."""
        self._run = run.encode()
        self._queue, self._lock = queue, threading.Lock()
        self._lanes = lanes
        self._owner = None if owner is None else os.pidfd_open(owner)
        self._idle_seconds = idle_seconds
        self._guests, self._left, self._closed = 0, time.monotonic(), False
        self._patience: float | None = None
        """Seconds that what has begun may still take, once the door is to close."""
        self._path = folder / SOCKET
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode says who may connect, and there must be no moment at which it says more.
        before = os.umask(0o177)
        self._socket.bind(str(self._path))
        os.umask(before)
        self._socket.listen()
        threading.Thread(target=self._listen, name="door", daemon=True).start()

    def close(self) -> None:
        """The last thing: who waits outside knows by it that the worker has left."""
        self._path.unlink(missing_ok=True)
        self._socket.close()

    def _listen(self) -> None:
        self._socket.settimeout(_LOOK_SECONDS)
        while not self._over():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()
        deadline = time.monotonic() + (self._patience or 0.0)
        while self._guests and not self._orphaned() and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        if self._guests:
            # A collective cannot be called off; the launcher ends the other ranks.
            os._exit(1)
        with self._lock:
            self._queue.stop()

    def _over(self) -> bool:
        with self._lock:
            idle = not self._guests and time.monotonic() - self._left > self._idle_seconds
            self._closed = idle or self._patience is not None or self._orphaned()
            return self._closed

    def _orphaned(self) -> bool:
        return self._owner is not None and bool(select.select([self._owner], [], [], 0)[0])

    def _receive(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(None)
                while not select.select([connection], [], [], _LOOK_SECONDS)[0]:
                    if self._closed:
                        return
                [wanted] = receive(connection, 1)
                if wanted == STOP:
                    self._patience = _GRACE_SECONDS
                    send(connection, ACCEPTED)
                elif wanted != self._run:
                    self._patience = math.inf
                    send(connection, OTHER)
                else:
                    self._answer(connection)
        except OSError:
            # Whoever asked has gone: there is nobody to tell.
            pass

    def _answer(self, connection: socket.socket) -> None:
        with self._lock:
            if self._closed:
                return
            self._guests += 1
        try:
            send(connection, ACCEPTED)
            tier, context, message = receive(connection, 3)
            with self._lock:
                identity = self._queue.put(pack(context, message))
                self._queue.assign(self._lanes(tier.decode()), [identity])
            send(connection, *unpack(self._reply(identity), 2))
        finally:
            with self._lock:
                self._guests -= 1
                self._left = time.monotonic()

    def _reply(self, identity: str) -> bytes:
        while True:
            with self._lock:
                if self._queue.has(identity):
                    return self._queue.take(identity)
            time.sleep(_POLL_SECONDS)
