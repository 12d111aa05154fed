"""The examples as a user starts them; under DeepSpeed the Trainer gets the losses and weights it gets without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sam_ds.config import ds_config_path
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.federation.supernode.relay import free_port

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = shutil.which("deepspeed") or str(Path(sys.executable).parent / "deepspeed")


def run(folder: Path, *command: object) -> str:
    """The command's output, started in `folder`; it must end well."""
    # What other tests tell DeepSpeed of this process is not so of the new one.
    own = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    environment = own | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    process = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.mark.parametrize("default", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gates_go_on_a_model_and_off_again(tiny, tmp_path, default):
    """By default the model is made on the spot, which takes a minute, and is wider and deeper than the tiny one."""
    model = [] if default else [tiny.model]
    printed = run(tmp_path, sys.executable, ROOT / "examples" / "add_gates_to_llama.py", *model)
    # The root's neurons and a constant are gate features too.
    features, layers = (192 + 512 // 16 + 1, 4) if default else (32 + 64 // 16 + 1, 2)
    assert f"trainable params: {16 * features * layers:,} ||" in printed
    assert "a LlamaForCausalLM as before" in printed
    assert from_pretrained(tmp_path / "runs" / "gates").sam_config.num_experts == 16


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """The Trainer without DeepSpeed: its folder."""
    return train(tiny, tmp_path_factory.mktemp("alone"), sys.executable)


def train(tiny, folder: Path, *command: object, config: Path | None = None) -> Path:
    given = [] if config is None else ["--deepspeed", config]
    script = ROOT / "examples" / "trainer_deepspeed.py"
    run(folder.parent, *command, script, "--model", tiny.model, "--out", folder, "--steps", 4, *given)
    return folder


def launch(ranks: int) -> tuple[object, ...]:
    return LAUNCHER, "--num_gpus", ranks, "--master_port", free_port()


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_trainer_is_the_same_under_zero_3(tiny, alone, tmp_path, ranks):
    # No parameter of a tiny model is large enough to be cut into shards otherwise.
    settings = json.loads(ds_config_path("zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "sharded.json").write_text(json.dumps(settings))
    sharded = train(tiny, tmp_path / "sharded", *launch(ranks), config=tmp_path / "sharded.json")

    ours, theirs = (json.loads((folder / "losses.json").read_text()) for folder in (sharded, alone))
    assert (ours["ranks"], ours["zero_stage"], theirs["zero_stage"]) == (ranks, 3, None)
    assert len(theirs["losses"]) == 4 and theirs["losses"][-1] < theirs["losses"][0]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    for file in ("model.safetensors", "sam.safetensors"):
        weights = load_file(sharded / file)
        torch.testing.assert_close(weights, load_file(alone / file), atol=1e-4, rtol=1e-3)
    from_pretrained(sharded)


@pytest.mark.distributed
def test_a_loop_of_ones_own_learns_the_same_under_zero_3_and_in_moe_layers(tiny, tmp_path):
    losses, weights = [], []
    for name, choice in (("sharded", ["--zero", 3]), ("moe", ["--zero", 2, "--ep-size", 2])):
        given = ["--model", tiny.model, "--out", tmp_path / name, "--steps", 3]
        printed = run(tmp_path, *launch(2), ROOT / "examples" / "pretrain_deepspeed.py", *given, *choice)
        losses.append([float(line.split()[-1]) for line in printed.splitlines() if line.startswith("step ")])
        weights.append(load_file(tmp_path / name / "model.safetensors"))
        from_pretrained(tmp_path / name)
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=2e-4)
    torch.testing.assert_close(weights[1], weights[0], atol=1e-4, rtol=1e-3)
