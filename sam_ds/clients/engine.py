"""Reading and writing the parameters of a live DeepSpeed engine, and resetting its optimizer.

One engine serves many virtual clients, so a round begins by replacing weights under it. ZeRO keeps up to two copies
of a parameter (the compute copy and the fp32 master), and writing only one of them is undone by the next forward or
the next step: both are written here. Verified for stages 0 to 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn

# On a CPU DeepSpeed compiles this op when a process group starts, for tensor-parallel inference, which nothing here
# does. Left out, no compiler is needed; no killed compile leaves the lock on which all later ones wait for ever; and
# no 66 MiB a rank stay behind in /dev/shm.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# ZeRO-3 compares the order in which it meets modules with that of rank 0 of the launch, where the other groups train
# other clients on other engines: it would wait for them for ever, and differ.
partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has sharded it away."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def write_parameters(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Replace parameters by name; every rank of the engine's group gives the same full values. No collectives."""
    stage = engine.zero_optimization_stage()
    parameters = dict(engine.module.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        if stage < 3:
            parameter.data.copy_(value)
            if stage > 0 and parameter.requires_grad:
                safe_set_full_fp32_param(parameter, value.to(parameter.device).float())
            continue
        # A shard is a slice of the flat vector, padded to equal lengths.
        shard = parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank(engine.data_parallel_group)
        flat = value.to(parameter.ds_tensor.device).flatten()
        own = flat[rank * shard : (rank + 1) * shard]
        own = torch.nn.functional.pad(own, (0, shard - own.numel()))
        parameter.ds_tensor.data.copy_(own)
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            # Small parameters stay whole on every rank: nothing gathers them anew before the next forward.
            parameter.data.copy_(value)
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, own.float())


class EngineParameters(Mapping[str, Tensor]):
    """Full fp32 values of an engine's trained parameters, by name, on the CPU, fetched when they are asked for.

    Asking is collective: every rank of the group asks for the same ones in the same order.
    """

    def __init__(self, engine: Any) -> None:
        self._sharded = engine.zero_optimization_stage() > 0
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        value = safe_get_full_fp32_param(parameter) if self._sharded else parameter
        return value.detach().float().cpu()

    def __contains__(self, name: object) -> bool:
        # The mixin's would fetch it.
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def reset_optimizer(engine: Any) -> None:
    """Forget the moments and step counts of the previous client; the same trajectory as a fresh optimizer."""
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    for state in inner.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    optimizer.zero_grad()


def set_learning_rate(engine: Any, lr: float) -> None:
    """Of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
