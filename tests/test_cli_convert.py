"""`sam-ds convert`: the folder it leaves, and that bad input is refused early, in one line, and leaves nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds.cli import main
from sam_ds.experts import convert as conversion
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.model import SamMixin

SMALL = ["--experts", "8", "--active", "4", "--standin-rank", "4", "--tokens", "512"]


def convert(model, out, data, *flags):
    return main(["convert", str(model), str(out), "--calibration", str(data), *flags])


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "deep" / "out"
    assert convert(tiny.model, folder, tiny.corpus, *SMALL, "--features", "output", "--seed", "3") == 0
    return folder


def test_the_folder_loads_both_ways_and_is_the_model(tiny, converted):
    ids = torch.arange(3, 35)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny.model)
    again = AutoModelForCausalLM.from_pretrained(converted)
    routed = from_pretrained(converted)
    assert routed.sam_config == SamConfig(num_experts=8, top_k=4, standin_rank=4, features="output", seed=3)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        with routed.active(8):
            torch.testing.assert_close(routed(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        assert (routed(ids).logits - plain(ids).logits).abs().max() > 1e-4
    words = "rose soil leaf"
    assert AutoTokenizer.from_pretrained(converted)(words) == AutoTokenizer.from_pretrained(tiny.model)(words)
    assert [path.name for path in converted.parent.iterdir()] == ["out"]


def test_every_layer_is_summed_up_and_an_empty_folder_is_taken(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL) == 0
    *layers, last = capsys.readouterr().out.splitlines()[-3:]
    for index, line in enumerate(layers):
        assert line.startswith(f"layer {index}: model.layers.{index}.mlp: 8 experts of 8 neurons, 1 root, ")
        assert "28 edges" in line
    assert "2 layers" in last and last.endswith(" s")
    # All three domains are read, and each gives the same share.
    assert 500 <= int(last.split(" tokens")[0].split()[-1]) <= 520


def test_a_budget_a_layer_and_another_density(tiny, tmp_path):
    flags = ("--allocation", "uniform", "--density", "0.5", "--device", "cpu")
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, *flags) == 0
    model = from_pretrained(tmp_path / "out")
    assert model.sam_config.allocation == "uniform" and [layer.top_k for layer in model.sam_layers] == [4, 4]
    assert model.graph().sum(dim=(1, 2)).tolist() == [14, 14]


def test_a_distilled_folder_is_still_the_dense_model_when_all_are_visited(tiny, tmp_path):
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--distill", "3") == 0
    ids = torch.arange(3, 35)[None]
    plain, model = AutoModelForCausalLM.from_pretrained(tiny.model), from_pretrained(tmp_path / "out")
    with torch.no_grad(), model.active(8):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_half_precision_is_converted_in_full_and_written_as_it_was(tiny, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    for file in Path(tiny.model).glob("token*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    assert convert(tmp_path / "half", tmp_path / "out", tiny.corpus, *SMALL) == 0
    model = from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for name, p in model.named_parameters() if ".sam." not in name} == {torch.float16}
    stored = load_file(tmp_path / "out" / "sam.safetensors")
    kinds = {name.rpartition(".")[2]: value.dtype for name, value in stored.items() if ".sam." in name}
    assert kinds["wg"] == kinds["threshold_K"] == torch.float32 and kinds["core_SQp"] == torch.float16
    ids = torch.arange(3, 35)[None]
    with torch.no_grad(), model.active(8):
        torch.testing.assert_close(model(ids).logits, half(ids).logits, atol=2e-2, rtol=2e-2)


def test_an_update_of_the_experts_is_distilled_and_folded_in(tiny, tmp_path):
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--distill", "3", "--distill-lora", "2") == 0
    ids = torch.arange(3, 35)[None]
    plain, model = AutoModelForCausalLM.from_pretrained(tiny.model), from_pretrained(tmp_path / "out")
    with torch.no_grad(), model.active(8):
        difference = (model(ids).logits - plain(ids).logits).abs().max()
    assert 1e-4 < difference < 1.0


def test_a_distillation_of_nothing_is_refused(tiny, tmp_path, capsys):
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--distill", "3", "--standin", "none") == 2
    assert "nothing to distill" in capsys.readouterr().err
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--distill", "-1") == 2
    assert "steps of a distillation must be at least 1, got -1" in capsys.readouterr().err
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--distill-lora", "4") == 2
    assert "--distill-lora 4 is of a distillation: give --distill STEPS too" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_folder_made_on_cuda_is_read_on_a_cpu(tiny, tmp_path):
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL, "--device", "cuda") == 0
    model = from_pretrained(tmp_path / "out")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad(), model.active(8):
        plain = AutoModelForCausalLM.from_pretrained(tiny.model)
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, atol=1e-3, rtol=1e-3)


def test_weights_keep_their_precision(tiny, tmp_path):
    half = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "half")
    assert convert(tmp_path / "half", tmp_path / "out", tiny.corpus, *SMALL) == 0
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.fixture
def copy_of(tiny, tmp_path):
    """`copy_of(change)` -> a copy of the tiny model with its weights, a dict by name, changed."""

    def make(change):
        folder = tmp_path / "models" / "copy"
        shutil.copytree(tiny.model, folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """`refused(model, data, *flags)` -> the one line that says why; OUT is not there, and nothing was fitted."""

    def never(*args, **kwargs):
        raise AssertionError("the expensive part was reached")

    monkeypatch.setattr(conversion, "calibrate_layer", never)

    def run(model, data, *flags):
        home = tmp_path / "home"
        home.mkdir()
        assert convert(model, home / "out", data, *SMALL, *flags) == 2
        assert not list(home.iterdir())
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sam-ds convert: ")]
        return line

    return run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--experts", "6"], ["num_experts=6 does not divide the 64 neurons", "2, 4, 8, 16, 32, 64"]),
        (["--active", "9"], ["top_k=9 exceeds num_experts=8"]),
        (["--roots", "5"], ["roots must be from 1 to top_k=4"]),
        (["--standin-rank", "33"], ["standin_rank=33 exceeds the model's hidden size 32"]),
        (["--features", "names"], ["features must be one of weights, activations, output"]),
        (["--allocation", "even"], ["allocation must be one of uniform, sensitivity, got 'even'"]),
        (["--density", "0"], ["density must be in (0, 1], got 0.0"]),
        (["--device", "meta"], ["--device 'meta' is not on this machine, which has cpu"]),
        (["--device", "cuda:99"], ["--device 'cuda:99' is not on this machine"]),
        (["--tokens", "150"], ["calibration has 150 tokens", "needs 160"]),
        (["--tokens", "0"], ["--tokens must be at least 1, got 0"]),
    ],
)
def test_a_setting_out_of_range(tiny, refused, flags, words):
    line = refused(tiny.model, tiny.corpus, *flags)
    assert all(word in line for word in words), line


def test_a_model_that_is_missing_damaged_or_converted(tiny, refused, converted, tmp_path):
    assert "cannot be loaded" in refused(tmp_path / "none", tiny.corpus)
    shutil.rmtree(tmp_path / "home")
    assert "is converted already" in refused(converted, tiny.corpus)
    shutil.rmtree(tmp_path / "home")
    shutil.copytree(tiny.model, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot be loaded" in refused(tmp_path / "cut", tiny.corpus)


def test_text_that_is_missing_or_too_short(tiny, refused, tmp_path):
    assert "no such folder" in refused(tiny.model, tmp_path / "none")
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "short" / "notes").mkdir(parents=True)
    for split in ("train", "test"):
        (tmp_path / "short" / "notes" / f"{split}.jsonl").write_text(json.dumps({"text": "rose soil leaf"}))
    line = refused(tiny.model, tmp_path / "short")
    assert "fitting 8 experts needs 160" in line and "calibration has" in line


def test_a_tokenizer_of_another_model(tiny, refused, copy_of):
    folder = copy_of(lambda weights: weights.update({"model.embed_tokens.weight": torch.zeros(50, 32)}))
    settings = json.loads((folder / "config.json").read_text()) | {"vocab_size": 50}
    (folder / "config.json").write_text(json.dumps(settings))
    line = refused(folder, tiny.corpus)
    assert "the model's vocabulary ends at 49" in line and "tokenizer" in line


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weights_that_are_not_finite(tiny, refused, copy_of, name):
    line = refused(copy_of(lambda weights: weights[name].view(-1)[5:6].fill_(float("nan"))), tiny.corpus)
    assert name in line and "not finite" in line


def test_activations_that_are_not_finite(tiny, refused, copy_of):
    # Finite weights whose product is not: the first layer is whole, the second is named.
    line = refused(copy_of(lambda weights: weights["model.layers.1.mlp.up_proj.weight"].fill_(3e38)), tiny.corpus)
    assert "model.layers.1.mlp" in line and "not finite" in line


def test_nothing_is_overwritten(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        assert convert(tiny.model, tmp_path / name, tiny.corpus, *SMALL) == 2
        assert "not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_leaves_nothing(tiny, tmp_path, monkeypatch, capsys):
    def fail(self, folder, **kwargs):
        folder.mkdir()
        (folder / "half.safetensors").write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(SamMixin, "save_pretrained", fail)
    assert convert(tiny.model, tmp_path / "out", tiny.corpus, *SMALL) == 2
    assert "no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
