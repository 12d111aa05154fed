"""What a rank of a resident worker does: the launcher's main loop, fed from the door that rank 0 keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from flwr.common.serde import (
    context_from_proto,
    message_from_proto,
    message_to_proto,
    recorddict_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

from sam_ds.config import RunConfig
from sam_ds.errors import InputError
from sam_ds.federation.apps import client_app
from sam_ds.federation.grid import Mailbox, TaskQueue, open_stores, reply_of, serve
from sam_ds.federation.methods.registry import configured
from sam_ds.federation.ranks import Pods, make_worker, process_group
from sam_ds.federation.setup import check_node
from sam_ds.federation.supernode.config import identity
from sam_ds.federation.supernode.door import Door
from sam_ds.federation.supernode.frames import pack, unpack
from sam_ds.federation.supernode.relay import connect


def serve_rank(asked: RunConfig, tiers: Sequence[str], folder: Path, owner: int | None) -> None:
    """Serve the run `asked` for, and clients of these tiers (none: of all), until rank 0's door closes.

    Raises InputError for what is wrong with the node, and where another worker is in the folder.
    """
    config = configured(asked)
    check_node(config)
    with process_group(config):
        pods = Pods(config, tiers or config.working_tiers)
        if dist.get_rank() == 0 and connect(folder) is not None:
            raise InputError(f"there is a worker in {folder} already: stop it with --stop, or give another folder")
        groups = pods.groups()
        server_store, store = open_stores()
        worker = make_worker(pods, list(groups.values()))
        door = None
        if server_store is not None:
            queue = TaskQueue(Mailbox(server_store), pods.count)
            door = Door(folder, identity(asked, tiers), queue, pods.lanes, owner=owner,
                        idle_seconds=config.federation.timeout_seconds)  # fmt: skip
        serve(Mailbox(store), answer, groups[1], groups)
        worker.close()
        # Rank 0 holds the store, and may leave last.
        dist.barrier()
        if door is not None:
            door.close()


def answer(request: bytes) -> Callable[[], bytes]:
    """For a context and a message, packed: the context's new state and the ClientApp's reply."""
    context_bytes, message_bytes = unpack(request, 2)
    context = context_from_proto(ProtoContext.FromString(context_bytes))
    reply = reply_of(client_app, message_from_proto(ProtoMessage.FromString(message_bytes)), context)
    return lambda: pack(
        recorddict_to_proto(context.state).SerializeToString(), message_to_proto(reply).SerializeToString()
    )
