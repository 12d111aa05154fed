"""A converted model under ZeRO on ranks: bytes of parameters and optimizer on each, by stage and precision.

A Llama of random weights, converted; every rank trains on tokens of its own for a few steps of AdamW. `bytes` is what
the rank holds of parameters, fp32 copies and moments, summed over the tensors it has. Steps are of the CPU over gloo:
they say what ZeRO-3 costs where nothing hides its messages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sam_ds.bench.options import add_rounds, add_seed, check_sizes, numbers
from sam_ds.bench.ranks import on_ranks
from sam_ds.bench.tiers import converted_llama
from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.units import prepare

_CASES = ("fp32 full", "bf16 full", "bf16 lora", "nf4 lora")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, default=2, help="CPU processes, over gloo")
    parser.add_argument("--stages", default="0,2,3", help="of ZeRO; parted by commas")
    parser.add_argument("--d", type=int, default=512, help="hidden size")
    parser.add_argument("--m", type=int, default=2048, help="neurons of an FFN")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    add_rounds(parser)
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a precision and stage. Ratios: bytes of each stage / stage 0, and of 4 bits / half precision."""
    check_sizes(options, "ranks", "d", "m", "layers", "experts")
    stages = numbers("stages", options.stages, int)
    if not set(stages) <= {0, 1, 2, 3}:
        raise InputError(f"--stages must be of 0, 1, 2 and 3, got {options.stages}")
    cases = [(case, stage) for case in _CASES for stage in stages]
    with TemporaryDirectory() as folder:
        converted_llama(options, top_k=max(2, options.experts // 4)).save_pretrained(folder)
        rows = on_ranks(options.ranks, _rows, options, cases, folder)
    by = {(row["trains"], row["stage"]): row for row in rows}
    ratios = {
        f"{case} stage {stage} / 0": by[case, stage]["bytes"] / by[case, 0]["bytes"]
        for case in _CASES for stage in stages if stage and 0 in stages
    }  # fmt: skip
    return {"rows": rows, "ratios": ratios | {
        f"nf4 / bf16 matrices stage {stage}": by["nf4 lora", stage]["matrices"] / by["bf16 lora", stage]["matrices"]
        for stage in stages
    }}  # fmt: skip


def _rows(
    rank: int, options: argparse.Namespace, cases: Sequence[tuple[str, int]], folder: str
) -> list[dict[str, Any]]:
    import deepspeed

    from sam_ds.experts.nf4 import to_nf4

    rows = []
    for case, stage in cases:
        precision, trains = case.split()
        model = from_pretrained(folder, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
        if precision == "nf4":
            to_nf4(model)
        prepare(model, trains, rank=16, alpha=16, seed=0, dense=trains == "full")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(trained, lr=1e-4), config=_settings(precision, stage),
            dist_init_required=False,
        )  # fmt: skip
        seconds = []
        generator = torch.Generator().manual_seed(rank)
        for _ in range(options.rounds + 1):
            ids_BS = torch.randint(512, (4, 128), generator=generator)
            dist.barrier()
            start = time.perf_counter()
            loss = engine(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            seconds.append(time.perf_counter() - start)
        matrices = [p for name, p in engine.module.named_parameters() if ".nf4." in name or "_proj." in name]
        parameters, copies, moments = _held(engine)
        rows.append({
            "trains": case, "stage": stage, "bytes": parameters + copies + moments, "parameters": parameters,
            "copies": copies, "moments": moments, "matrices": sum(map(_bytes, matrices)) + _scales(engine.module),
            "step_s": float(np.median(seconds[1:])),
        })  # fmt: skip
        engine.destroy()
    return rows


def _settings(precision: str, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": precision != "fp32"}, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True, "steps_per_print": 10**9,
    }  # fmt: skip


def _bytes(value: Tensor) -> int:
    """On this rank: of the shard, where ZeRO-3 has cut one."""
    own = getattr(value, "ds_tensor", value)
    return own.numel() * own.element_size()


def _scales(model: torch.nn.Module) -> int:
    """Of what is in 4 bits: they are not sharded."""
    total = sum(_bytes(b) for name, b in model.named_buffers() if ".nf4." in name)
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            total += sum(_bytes(t) for t in (state.absmax, state.state2.absmax, state.offset))
    return total


def _held(engine: Any) -> tuple[int, int, int]:
    """Bytes of the parameters, of the fp32 copies that are trained in their place, and of the moments."""
    model = list(engine.module.parameters())
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = {id(p) for p in model}
    copies = [p for group in inner.param_groups for p in group["params"] if id(p) not in own]
    # ZeRO-3 hands them to the optimizer for the time of a step only.
    copies += [p for p in getattr(engine.optimizer, "fp32_partitioned_groups_flat", []) if p is not None]
    moments = [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(map(_bytes, model)) + _scales(engine.module), sum(map(_bytes, copies)), sum(map(_bytes, moments))
