"""One rank of a DeepSpeed launch: its process group, the pods and groups that it belongs to, its worker.

Ranks form pods as large as the largest worker group of a tier; in a pod as many clients train at a time as there are
groups of theirs in it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers.utils import logging as hf_logging

from sam_ds.clients.task import WorkerGroup
from sam_ds.clients.worker import Worker, engine_tier
from sam_ds.config import RunConfig
from sam_ds.errors import InputError
from sam_ds.federation.apps import set_worker
from sam_ds.federation.grid import FOREVER, identify
from sam_ds.federation.methods.registry import METHODS
from sam_ds.federation.setup import clients_of, corpus_of


@contextmanager
def process_group(config: RunConfig) -> Iterator[None]:
    """This rank in the launch's process group, with its share of the cores."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    torch.set_num_threads(config.runtime.threads or max(1, len(os.sched_getaffinity(0)) // local))
    hf_logging.disable_progress_bar()  # a bar for every reload of a few tensors hides the run's own
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Pods:
    """How the ranks of this launch are shared out among the tiers named."""

    def __init__(self, config: RunConfig, tiers: Iterable[str]) -> None:
        """`tiers`: of clients. Raises InputError where the launch has not a multiple of the ranks that one needs."""
        self.config = config
        wanted = {engine_tier(config, name, self.trains(name)) for name in tiers}
        self.tiers = [name for name in config.working_tiers if name in wanted]
        """Those that have an engine."""
        self._sizes = {name: config.ranks_of(config.tiers[name]) for name in self.tiers}
        self.size, ranks = max(self._sizes.values()), dist.get_world_size()
        if ranks % self.size:
            name = "runtime.ranks_per_client" if self.size == config.runtime.ranks_per_client else "a tier's ranks"
            raise InputError(f"{name}={self.size} does not divide the {ranks} ranks of this launch; start a multiple "
                             f"of {self.size} (deepspeed --num_gpus N) or lower it")
        self.count = ranks // self.size

    def trains(self, tier: str) -> str:
        """What clients of a tier train."""
        return METHODS[self.config.method].train(self.config.tiers[tier])

    def lanes(self, tier: str) -> int:
        """How many clients of this tier a pod trains at a time."""
        return self.size // self._sizes[engine_tier(self.config, tier, self.trains(tier))]

    def groups(self) -> dict[int, WorkerGroup]:
        """This rank's worker groups, by how many of them are in a pod. Collective."""
        rank, ranks, mine = dist.get_rank(), dist.get_world_size(), {}
        # Every rank makes every group, in the same order.
        for size in sorted(set(self._sizes.values())):
            for first in range(0, ranks, size):
                members = list(range(first, first + size))
                # A rank waits here for its next task, however long the others' take.
                handle = dist.new_group(members, timeout=FOREVER)
                if rank in members:
                    mine[self.size // size] = members, handle
        return {lanes: WorkerGroup(members, handle) for lanes, (members, handle) in mine.items()}


def make_worker(pods: Pods, groups: Sequence[WorkerGroup]) -> Worker:
    """This rank's worker with all its engines, for the ClientApp to use. Collective."""
    config = pods.config
    worker = Worker(config, Path(config.out) / "base", clients_of(config, corpus_of(config)), groups)
    worker.build({name: pods.trains(name) for name in pods.tiers})
    set_worker(worker)
    identify(dist.get_rank())
    return worker
