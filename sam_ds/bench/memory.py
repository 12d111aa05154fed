"""What a client is said to need against what it took: the most resident memory of a rank, by tier and ZeRO stage.

A Llama of random weights, converted. Every case runs in processes of its own: a tiny model first, so that libraries and
what they keep are there, then the engine is built, filled and taken through two steps. `measured` is the kernel's high
water mark from before the model is loaded, less what the client is given, which is the host's. On a CPU there is no
memory but this one, so nothing here says what offloading saves.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from transformers import AutoConfig

from sam_ds.bench.options import add_seed, check_sizes, numbers
from sam_ds.bench.ranks import on_ranks
from sam_ds.bench.tiers import converted_llama
from sam_ds.config import RunConfig, TierSection, load_config
from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import check_architecture

CASES = (
    "fp32 full cpu_zero0 4/16 1", "fp32 full cpu_zero2 16/16 1", "fp32 full cpu_zero2 4/16 2",
    "fp32 full zero3 16/16 2", "fp32 lora cpu_zero2 4/16 1", "fp32 lora zero3 16/16 2",
    "bf16 full bf16_48gb 4/16 1", "bf16 full zero3 8/16 2", "bf16 lora bf16_48gb 16/16 1",
    "nf4 lora nf4_16gb 4/16 1", "nf4 lora nf4_16gb 16/16 1",
)  # fmt: skip
"""Precision, what trains, a file of ds_configs/, experts held of all, ranks a client."""
_CLEAR = Path("/proc/self/clear_refs")
"""What is written there says which record of the process to begin anew: 5 is the high water mark."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d", type=int, default=768, help="hidden size")
    parser.add_argument("--m", type=int, default=3072, help="neurons of an FFN")
    parser.add_argument("--layers", type=int, default=8)
    every = ",".join(map(str, range(len(CASES))))
    parser.add_argument("--cases", default=every, help="the rows to run, numbers parted by commas; all by default")
    add_seed(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Rows: a case. Ratios: estimated / measured."""
    from sam_ds.clients.memory import estimate

    check_sizes(options, "d", "m", "layers")
    cases = numbers("cases", options.cases, int)
    if not set(cases) <= set(range(len(CASES))):
        raise InputError(f"--cases must be from 0 to {len(CASES) - 1}, got {options.cases}")
    if not _CLEAR.exists():
        raise InputError(f"memory reads what Linux says of a process, and there is no {_CLEAR} here")
    rows = []
    with TemporaryDirectory() as folder, _one_mapping_a_tensor():
        large = argparse.Namespace(**vars(options), experts=16)
        small = argparse.Namespace(**{**vars(large), "d": 64, "m": 256, "layers": 2})
        for name, sizes in (("small", small), ("large", large)):
            converted_llama(sizes, top_k=4).save_pretrained(Path(folder) / name)
        for case in (CASES[number] for number in cases):
            config = config_of(case)
            ranks = config.runtime.ranks_per_client
            measured = on_ranks(ranks, _peaks, config, folder)
            dense = check_architecture(AutoConfig.from_pretrained(Path(folder) / "large"), SamConfig.of_run(config))
            said = estimate(dense, config.tiers["only"], config)
            rows.append({
                "case": case, "weights": said.weights, "adapters": said.adapters, "optimizer": said.optimizer,
                "gradients": said.gradients, "activations": said.activations, "estimated": said.peak, **measured,
                "ratio": said.peak / measured["measured"],
            })  # fmt: skip
    return {"rows": rows, "ratios": {row["case"]: row["ratio"] for row in rows}}


@contextmanager
def _one_mapping_a_tensor() -> Iterator[None]:
    """In child processes what is freed goes back to the system at once, or the high water mark would be of the heap."""
    before = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if before is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = before


def config_of(case: str) -> RunConfig:
    """The run of one of `CASES`, its tier named `only`."""
    precision, trains, ds_config, experts, ranks = case.split()
    held, num_experts = experts.split("/")
    # The section itself checks them.
    choices: dict[str, Any] = {"precision": precision, "trains": trains}
    tier = TierSection(experts=int(held), memory_gib=1e3, ds_config=f"{ds_config}.json", share=1.0, **choices)
    config = load_config(None, [
        f"sam.num_experts={num_experts}", "sam.top_k=4", "sam.roots=1", "federation.floor=0.05",
        f"runtime.ranks_per_client={ranks}", f"train.batch={4 * int(ranks)}",
        f"train.dense={str(trains == 'full').lower()}",
    ])  # fmt: skip
    return replace(config, tiers={"only": tier})


def _peaks(rank: int, config: RunConfig, folder: str) -> dict[str, int]:
    from sam_ds.clients.task import WorkerGroup

    # For products in half precision oneDNN keeps repacked weights, more than the model itself; no GPU does.
    exact = config.tiers["only"].precision == "fp32"
    torch.backends.mkldnn.enabled = exact  # type: ignore[assignment]  # a property of the module, which reads as a bool
    group = WorkerGroup(list(range(config.runtime.ranks_per_client)), dist.group.WORLD)
    train(config, Path(folder) / "small", group)
    return train(config, Path(folder) / "large", group)


def train(config: RunConfig, folder: Path, group: Any) -> dict[str, int]:
    """A client of the configuration's only tier, on this rank's device: bytes at the height of loading and of training,
    and the larger of them, above what was taken before."""
    from sam_ds.clients.engine import EngineParameters
    from sam_ds.clients.task import Task
    from sam_ds.clients.tier_engine import TierEngine
    from sam_ds.experts.units import read_units

    tier = config.tiers["only"]
    before = _taken()
    _forget_peak()
    engine = TierEngine(config, folder, tier, tier.trains, group)
    loading = _peak()
    held = (tuple(range(tier.experts)),) * len(engine.layers)
    found = read_units(engine.fields, engine.shared, EngineParameters(engine.engine), held)
    units = {unit: (0.02 * torch.randn(value.shape)).numpy() for unit, value in found.items()}
    del found
    given = sum(value.nbytes for value in units.values()) if _on_host() else 0
    experts = config.sam.num_experts
    task = Task(
        round=1, client=0, tier="only", trains=tier.trains, held=held, sent=held,
        graph_LEE=np.triu(np.ones((len(held), experts, experts), dtype=bool), 1),
        condition=np.zeros((len(held), experts + 1), dtype=np.float32), units=units,
    )  # fmt: skip
    _forget_peak()
    engine.load(task)
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        engine.step(torch.randint(512, (config.train.batch, config.train.sequence), generator=generator), 1e-4)
    training = _peak() - given
    engine.close()
    return {"loading": loading - before, "training": training - before, "measured": max(loading, training) - before}


def _on_host() -> bool:
    return get_accelerator().device_name() == "cpu"


def _taken() -> int:
    return resident("VmRSS") if _on_host() else get_accelerator().memory_allocated()


def _peak() -> int:
    return resident("VmHWM") if _on_host() else get_accelerator().max_memory_allocated()


def _forget_peak() -> None:
    if _on_host():
        _CLEAR.write_text("5")
    else:
        get_accelerator().reset_peak_memory_stats()


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS", or at most so far "VmHWM"."""
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
