"""A function on several ranks of this machine, over gloo: what benchmarks of distributed layers are made of. And a
federation on one rank, as a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from sam_ds.federation.supernode.relay import free_port


def one_rank(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of `launch/run_federation.py` on one rank and one thread, without a launcher, its port
    free as of now."""
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [sys.executable, "-m", "sam_ds.federation.launch", *arguments], os.environ | ranks


def on_ranks(ranks: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work(rank, *arguments)` in a process for every rank, one thread each; returns what rank 0 did, as JSON."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (ranks, work, arguments, folder), nprocs=ranks)
        return json.loads((Path(folder) / "result.json").read_text())


def _rank(rank: int, ranks: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    # What a launcher would say; DeepSpeed reads it.
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    torch.set_num_threads(1)
    import deepspeed

    # Its compiled op is for tensor-parallel inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    deepspeed.init_distributed("gloo", verbose=False)
    result = work(rank, *arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
