"""The process that `sam-ds bench flower` starts for a message: the ClientApp on a context and a message in files."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext
from flwr.proto.message_pb2 import Message as ProtoMessage

from sam_ds.federation.apps import client_app


def main(way: str, folder: Path) -> None:
    """`relay` the message to the node's worker, or answer it `alone`."""
    context = context_from_proto(ProtoContext.FromString((folder / "context").read_bytes()))
    message = message_from_proto(ProtoMessage.FromString((folder / "message").read_bytes()))
    if way == "alone":
        import torch.distributed as dist

        from sam_ds.config import from_flat
        from sam_ds.federation.methods.registry import configured
        from sam_ds.federation.ranks import Pods, make_worker

        os.environ["LOCAL_RANK"] = "0"
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        config = configured(from_flat(context.run_config))
        pods = Pods(config, config.working_tiers)
        worker = make_worker(pods, list(pods.groups().values()))
        reply = client_app(message, context)
        worker.close()
        dist.destroy_process_group()
    else:
        reply = client_app(message, context)
    (folder / "context").write_bytes(context_to_proto(context).SerializeToString())
    (folder / "message").write_bytes(message_to_proto(reply).SerializeToString())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
