"""`sam-ds inspect`: its figures against a plain computation over one token at a time, and its drawing."""

import json
from xml.etree import ElementTree

import pytest
import torch

from sam_ds.cli import main
from sam_ds.evaluation.experts import describe
from sam_ds.experts.calibrate import hidden_of
from sam_ds.experts.checkpoint import from_pretrained


def inspect(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_sizes_graph_and_calibration_usage(tiny, capsys):
    result = inspect(capsys, tiny.base)
    model = from_pretrained(tiny.base)
    assert result["tokens"] == 0 and len(result["layers"]) == 2
    for index, layer in enumerate(result["layers"]):
        assert layer["path"] == f"model.layers.{index}.mlp"
        assert (layer["experts"], layer["neurons"], layer["roots"]) == (8, 8, 2)
        assert layer["active"] == model.sam_layers[index].top_k
        assert [tuple(edge) for edge in layer["edges"]] == [tuple(e) for e in model.graph()[index].nonzero().tolist()]
        # Over the full graph a token always finds as many as it may visit.
        assert sum(layer["usage"]) == pytest.approx(layer["active"], abs=1e-3) and layer["usage"][:2] == [1, 1]
        assert layer["mass"] is None and layer["used"] is None


def test_usage_and_mass_are_those_of_the_routes(tiny, capsys):
    result = inspect(capsys, tiny.base, "--data", tiny.corpus, "--tokens", "200")
    assert 196 <= result["tokens"] <= 201
    model = from_pretrained(tiny.base).eval()
    ids_BS = torch.randint(3, 90, (5, 40), generator=torch.Generator().manual_seed(0))
    found = describe(model, ids_BS)
    inputs = {}
    for index, layer in enumerate(model.sam_layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(input_ids=ids_BS)
        for index, layer in enumerate(model.sam_layers):
            visited, mass, every = torch.zeros(8), 0.0, 0.0
            hidden_TEn = hidden_of(layer.ffn, inputs[index]).unflatten(1, (8, 8)).double()
            out_TEd = torch.stack([hidden_TEn[:, e] @ layer.slots_out(layer.matrices()[2])[e].double()
                                   for e in range(8)], dim=1)  # fmt: skip
            out_TEd -= out_TEd.mean(0)
            for token, scores_E in enumerate(layer.scores(inputs[index])):
                route = [0, 1]
                while len(route) < layer.top_k:
                    open_ = [e for e in range(8) if e not in route and layer.sam.adjacency_SS[route, e].any()]
                    if not open_:
                        break
                    route.append(max(open_, key=lambda e: float(scores_E[e])))
                visited[route] += 1
                mass += float(out_TEd[token, route].square().sum())
                every += float(out_TEd[token].square().sum())
            assert found[index].usage == pytest.approx((visited / 200).tolist())
            assert found[index].mass == pytest.approx(mass / every, rel=1e-5)
            assert sum(found[index].used) == round(float(visited.sum())) - 2 * 200


def test_all_experts_hold_all_the_mass(tiny):
    model = from_pretrained(tiny.base)
    with model.active(8):
        found = describe(model, torch.arange(3, 67)[None])
    assert [layer.mass for layer in found] == pytest.approx([1.0, 1.0])


def test_the_drawing_stands_alone_and_shows_every_layer(tiny, tmp_path, capsys):
    data = ["--data", str(tiny.corpus)]
    assert main(["inspect", str(tiny.base), *data, "--svg", str(tmp_path / "graphs.svg")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("layer ") and "mass captured" in line for line in lines) == 2
    tree = ElementTree.parse(tmp_path / "graphs.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert tree.tag == f"{name}svg" and tree.find(f"{name}style") is not None
    drawings = tree.findall(f"{name}svg")
    assert [len(drawing.findall(f"{name}path")) for drawing in drawings] == [14, 14]
    assert [len(drawing.findall(f"{name}circle")) for drawing in drawings] == [8, 8]
    titles = [text.text for text in tree.findall(f"{name}text")]
    assert titles[0].startswith("layer 0: 14 edges, mass captured")


def test_bad_input_ends_with_2_and_says_what(tiny, tmp_path, capsys):
    for arguments, words in (
        ([tiny.model], "is not a converted model"),
        ([tiny.base, "--data", tmp_path / "none"], "no such folder"),
        ([tiny.base, "--tokens", "0"], "--tokens must be at least 1"),
        ([tiny.base, "--svg", tmp_path / "none" / "graphs.svg"], "there is no folder"),
        ([tiny.base, "--svg", tmp_path], "cannot be written"),
    ):
        assert main(["inspect", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
