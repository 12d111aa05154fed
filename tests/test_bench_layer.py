"""`sam-ds bench layer`: that all compute the same at a tiny size; never how long it took."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from sam_ds.bench import layer as bench
from sam_ds.bench.layer_peers import TRANSFORMERS, DeepSpeedLayer, TransformersLayer
from sam_ds.cli import main
from sam_ds.graph.route import route

TINY = ["bench", "layer", "--d", "16", "--m", "64", "--tokens", "40", "--experts", "8", "--rounds", "1"]


def test_layer_prints_one_json_object_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--active", "3,5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    calls = ("dense", "sam", "message", *TRANSFORMERS, "deepspeed")
    table = result["rows"]
    assert [(row["k"], row["pass"], row["call"]) for row in table] == [
        (k, title, call) for k in (3, 5) for title in ("forward", "forward+backward") for call in calls
    ]
    assert all(row["ideal"] == pytest.approx(row["dense"] * 8 / row["k"]) for row in table)
    by = {(row["k"], row["pass"], row["call"]): row["median_s"] for row in table}
    ours, theirs = by[5, "forward", "sam"], by[5, "forward", "eager"]
    assert result["ratios"]["eager k=5 forward"] == pytest.approx(ours / theirs)
    assert result["ratios"]["message k=5 forward"] == pytest.approx(by[5, "forward", "message"] / ours)
    assert len(result["ratios"]) == 2 * 2 * 5
    assert main([*TINY, "--active", "4", "--dtype", "bf16"]) == 0
    assert "ideal k=4 forward+backward" in capsys.readouterr().out


@pytest.mark.parametrize("name", [*TRANSFORMERS, "deepspeed"])
def test_a_peer_has_the_gradients_of_the_layer(name: str) -> None:
    """Without stand-ins the layer computes what the peers do; the gate differs in its softmax only."""
    options = argparse.Namespace(d=16, m=64, experts=8, dtype="fp32", seed=0)
    dense, layer = bench.random_layer(options, torch.Generator().manual_seed(0))
    layer.sam.spread_pd.zero_()
    # The fourth choice finds nothing.
    layer.sam.adjacency_SS.zero_()
    layer.sam.adjacency_SS[0, 2:5] = True
    layer.top_k = 6
    x_Td = torch.randn(40, 16, requires_grad=True)
    scores_TS = layer.scores(x_Td)
    routing = route(scores_TS, layer.sam.adjacency_SS, roots=layer.roots, k=6)
    assert (routing.chosen_TJ[:, 3] < 0).all()
    if name == "deepspeed":
        peer = DeepSpeedLayer(layer, routing.chosen_TJ, bench.gated_ffn)
    else:
        peer = TransformersLayer(layer, routing.chosen_TJ, name)
    dy_Td = torch.randn(40, 16)
    ours = torch.autograd.grad((layer(x_Td) * dy_Td).sum(), [x_Td, dense.down_proj.weight])
    y_Td = peer(x_Td)
    y_Td.backward(dy_Td)
    torch.testing.assert_close(y_Td, layer(x_Td), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(x_Td.grad, ours[0], atol=1e-5, rtol=1e-4)
    norms = [p.grad.norm() ** 2 for n, p in peer.named_parameters() if "down_proj" in n]
    torch.testing.assert_close(torch.stack(norms).sum().sqrt(), ours[1].norm(), atol=1e-5, rtol=1e-4)
    gate = next(p for n, p in peer.named_parameters() if n.endswith("wg"))
    assert gate.grad.abs().max() > 0


@pytest.mark.parametrize(("arguments", "words"), [
    (["--active", "1"], "--active must be from 2"),
    (["--active", "8"], "to 7"),
    (["--active", "four"], "numbers parted by commas"),
    (["--m", "60"], "num_experts=8 does not divide the 60 neurons"),
    (["--tokens", "0"], "--tokens"),
    (["--device", "nowhere"], "--device 'nowhere'"),
])  # fmt: skip
def test_bad_input_ends_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--active", "3", *arguments]) == 2
    assert words in capsys.readouterr().err
