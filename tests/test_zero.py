"""The views under ZeRO: the numbers of stage 0 in every stage, whatever each rank routes, offloaded or not, and from
the first byte in shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import build, convert, tokens

from sam_ds.clients.engine import EngineParameters, deepspeed, full_shape
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.nf4 import to_nf4
from sam_ds.experts.units import prepare

CONFIG = SamConfig(num_experts=8, top_k=3, standin_rank=4)
STEPS = 6
OFFLOAD = {"device": "cpu"}
CASES = {
    "llama-0": ("llama", {"stage": 0}), "llama-2": ("llama", {"stage": 2}), "llama-3": ("llama", {"stage": 3}),
    "llama-3-offload": ("llama", {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
    "llama-3-checkpointing": ("llama", {"stage": 3}), "llama-3-loaded": ("llama", {"stage": 3}),
    "lora-0": ("lora", {"stage": 0}), "lora-2": ("lora", {"stage": 2}), "lora-3": ("lora", {"stage": 3}),
    "nf4-0": ("nf4", {"stage": 0}), "nf4-2": ("nf4", {"stage": 2}), "nf4-3": ("nf4", {"stage": 3}),
    "gpt2-0": ("gpt2", {"stage": 0}), "gpt2-3": ("gpt2", {"stage": 3}), "gpt2-3-loaded": ("gpt2", {"stage": 3}),
    "phi3-0": ("phi3", {"stage": 0}), "phi3-3-loaded": ("phi3", {"stage": 3}),
    "opt-0": ("opt", {"stage": 0}), "opt-3": ("opt", {"stage": 3}),
    "bf16-2": ("bf16", {"stage": 2}), "bf16-3": ("bf16", {"stage": 3}),
}  # fmt: skip
"""Name: what is trained, and `zero_optimization`. The first of a kind is what the others must equal."""
FAMILY = {"lora": "llama", "nf4": "llama", "bf16": "llama"}


def settings_of(name: str) -> dict:
    kind, zero = CASES[name]
    zero = {"stage3_param_persistence_threshold": 0, "overlap_comm": False} | zero
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero, "steps_per_print": 10**9,
        "bf16": {"enabled": kind == "bf16"},
    }  # fmt: skip


def engine_of(name: str, folder: Path, settings: dict):
    from transformers.integrations import HfDeepSpeedConfig

    kind, _ = CASES[name]
    if name.endswith("loaded"):
        # As long as it lives, what transformers loads goes into shards.
        alive = HfDeepSpeedConfig(settings)
        model = from_pretrained(folder / kind)
        assert full_shape(model.sam_layers[0].ffn.module.get_submodule(model.sam_layers[0].ffn.down).weight) != (0,)
        assert all(p.numel() == 0 for p in model.sam_layers[0].ffn.module.parameters() if hasattr(p, "ds_shape"))
        del alive
    else:
        model = from_pretrained(folder / FAMILY.get(kind, kind))
    if kind == "nf4":
        to_nf4(model)
    slices = kind in ("lora", "nf4")
    prepare(model, "lora" if slices else "full", rank=2, alpha=4, seed=0, dense=not slices, attention_rank=2)
    if name.endswith("checkpointing"):
        model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def train_on_two_ranks(rank: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo")
    found = {}
    for name in CASES:
        engine = engine_of(name, folder, settings_of(name))
        losses = []
        for step in range(STEPS):
            ids = tokens(2 + (rank + step) % 3, 7 + 2 * rank, seed=100 * step + rank)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()))
        state = dict(EngineParameters(engine))
        shards = sum(p.ds_tensor.numel() for p in engine.module.parameters() if hasattr(p, "ds_tensor"))
        whole = sum(torch.Size(full_shape(p)).numel() for p in engine.module.parameters())
        found[name] = {"losses": losses, "state": state, "shards": shards / whole}
        engine.destroy()
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """By rank and case: losses, trained parameters, share of the parameters that the rank has."""
    folder = tmp_path_factory.mktemp("zero")
    for family in {FAMILY.get(kind, kind) for kind, _ in CASES.values()}:
        model = convert(build(family), CONFIG)
        with torch.no_grad():
            for layer in model.sam_layers:
                # One expert that no token visits, on any rank.
                layer.sam.wg[3] = 0
                layer.sam.wg[3, -1] = -1e3
        model.save_pretrained(folder / family)
    torch.multiprocessing.spawn(train_on_two_ranks, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_every_stage_trains_as_stage_0(trained, name):
    kind, zero = CASES[name]
    first = next(other for other, (same, _) in CASES.items() if same == kind)
    loose = {"rtol": 2e-2, "atol": 2e-3} if kind == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for found in trained:
        assert found[name]["losses"] == pytest.approx(found[first]["losses"], abs=1e-2 if kind == "bf16" else 1e-5)
        for parameter, value in found[first]["state"].items():
            torch.testing.assert_close(found[name]["state"][parameter], value, msg=f"{name} {parameter}", **loose)
        # Two ranks: half of everything each, padded to equal lengths.
        assert found[name]["shards"] == (pytest.approx(0.5, abs=0.01) if zero["stage"] == 3 else 0)
