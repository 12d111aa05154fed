"""`sam-ds plan`: what it counts without weights is what a run sends and computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from in_process import Federation, task_for

from sam_ds.cli import main
from sam_ds.config import load_config, to_toml
from sam_ds.errors import InputError
from sam_ds.federation.metrics import active_flops
from sam_ds.federation.participation import ClientPlan
from sam_ds.federation.plan import plan_run

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = {"small": 0, "medium": 4, "large": 5}
LORA = tuple(f"tiers.{tier}.trains=lora" for tier in CLIENTS)


@pytest.mark.parametrize("overrides", [(), LORA, (*LORA, "train.dense=false", "tiers.large.sends=3"),
                                       (*LORA, "train.attention_rank=3", "wire.values=bf16"),
                                       ("federation.refit_standins=true",)])
def test_bytes_and_flops_are_those_of_a_run(tiny, new_worker, tmp_path, overrides):
    config = tiny.config(tmp_path, *overrides)
    server = Federation.of(config, tiny.base).server
    if refits := config.federation.refit_standins:
        server.refit_standins()
    plan = plan_run(config, ranks=2, rank_gib=1.0)
    assert [own.clients for own in plan.tiers] == [server.tiers.count(name) for name in CLIENTS]
    for own in plan.tiers:
        task = task_for(server, CLIENTS[own.name])
        task = replace(task, sent=tuple(held[: own.tier.sends or len(held)] for held in task.sent))
        result = new_worker(*(() if refits else overrides)).train(task)
        sent = sum(value.nbytes for unit, value in task.units.items())
        assert own.down == sent + (0 if task.standins is None else task.standins.nbytes)
        counters = sum(value.nbytes for value in result.counters)
        width = 2 if config.wire.values == "bf16" else 4
        assert own.up == width * sum(value.size for value in result.deltas.values()) + counters
        # Where everything trains nothing is frozen.
        assert (own.first > 0) == (LORA[0] in overrides)
        held = ClientPlan(
            client=task.client, tier=own.name, experts=task.held, h=np.ones((2, 8)), pi=1.0, sent=task.sent
        )  # fmt: skip
        # The run visits top_k on average over the layers.
        assert own.flops == pytest.approx(active_flops(server, held, result.tokens), rel=0.05)


def test_the_command_prints_a_table(tiny, tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tiny.config(tmp_path)))
    assert main(["plan", str(path)]) == 0
    assert "8 ranks in 8 groups of 1" in capsys.readouterr().out


def test_groups_share_the_work(tiny, tmp_path):
    config = tiny.config(tmp_path, "runtime.ranks_per_client=2")
    plan = plan_run(config, ranks=4, rank_gib=1.0)
    assert (plan.ranks, plan.groups) == (4, 2)
    mean = sum(own.clients * own.flops for own in plan.tiers) / 6
    assert plan.expected("flops", 3) == pytest.approx(3 * mean)
    assert plan.seconds(3, 1e9) == pytest.approx(max(3 * mean / 2, max(own.flops for own in plan.tiers)) / 2e9)
    assert plan.rank_bytes < sum(own.memory.peak for own in plan.tiers)


def test_more_ranks_a_client_need_less_of_each_under_zero_3(tiny, tmp_path):
    sharded = [f"tiers.{tier}.ds_config=zero3.json" for tier in CLIENTS]
    one, two = (
        plan_run(tiny.config(tmp_path, *sharded, f"runtime.ranks_per_client={ranks}"), ranks=2, rank_gib=1.0).tiers[0]
        for ranks in (1, 2)
    )
    assert two.memory.gradients == pytest.approx(one.memory.gradients / 2, abs=1)
    for part in ("weights", "optimizer", "activations"):
        assert getattr(two.memory, part) < getattr(one.memory, part), part
    offloaded = tiny.config(tmp_path, *[f"tiers.{tier}.ds_config=zero3_offload_24gb.json" for tier in CLIENTS])
    memory = plan_run(offloaded, ranks=1, rank_gib=1.0).tiers[0].memory
    # But for buffers, and DeepSpeed's bucket.
    assert memory.gradients == 0 and memory.kept < 0.2 * one.memory.kept


@pytest.mark.parametrize(("overrides", "arguments", "message"), [
    (["method=fedavg"], {}, "plan is of method = 'sam'"),
    (["runtime.ranks_per_client=2"], {"ranks": 3}, "--ranks 3 is no multiple of the largest worker group, of 2"),
    ([], {"rank_gib": 1e-4}, r"a rank needs 0.0 GiB for the engines .* tiers.large fewer experts"),
    (["tiers.small.memory_gib=1e-5"], {}, "tiers.small: 4 experts with 'full' training need about"),
    (["sam.num_experts=12", "federation.floor=0.1", "federation.edges=20"], {}, "num_experts=12 does not divide"),
])  # fmt: skip
def test_what_cannot_run_is_refused(tiny, tmp_path, overrides, arguments, message):
    with pytest.raises(InputError, match=message):
        plan_run(tiny.config(tmp_path, *overrides), **{"ranks": 2, "rank_gib": 1.0} | arguments)


@pytest.mark.parametrize("name", ["a40x8.toml", pytest.param("a40x8_64.toml", marks=pytest.mark.slow)])
def test_llama_2_7b_on_eight_a40(name, capsys, monkeypatch):
    """From its sizes alone; the folder has no weights."""
    monkeypatch.chdir(ROOT)
    assert [file.name for file in (ROOT / "launch" / "llama2_7b").iterdir()] == ["config.json"]
    assert main(["plan", f"launch/{name}", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    config = load_config(f"launch/{name}")
    assert [own["clients"] for own in plan["tiers"]] == [15, 15, 10, 10] and plan["groups"] == 8
    phone, *_, server = plan["tiers"]
    assert plan["rank_bytes"] < 48 * 2**30
    # All 6.74 billion parameters in bf16, and what SAM adds.
    assert server["memory"]["weights"] == pytest.approx(2 * 6.738e9, rel=0.03)
    assert phone["memory"]["weights"] < 0.18 * server["memory"]["weights"]
    share = config.tiers["phone"].experts / config.sam.num_experts
    assert phone["down"] <= (share + 0.02) * server["down"]
    assert main(["plan", f"launch/{name}", "--gib", "24"]) == 2
    assert "it has 24" in capsys.readouterr().err
    assert main(["plan", f"launch/{name}", "--tflops", "0"]) == 2
