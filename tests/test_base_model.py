import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds.data import base_model
from sam_ds.data.base_model import BaseRecipe, embedded_base_model, train_tokenizer
from sam_ds.data.splits import Splits, build_corpus
from sam_ds.errors import InputError

TINY = BaseRecipe(vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64, context=64,
                  steps=12, batch=4, sequence=32, lr=1e-2, warmup_steps=2)
TEXTS = tuple(f"the {word} of the graph is number {i}"
              for i in range(12) for word in ("edge", "root", "gate"))
CORPUS = build_corpus("toy", {"a": Splits(public=TEXTS, train=("x",), valid=(), test=("y",))})
TOKENIZER = train_tokenizer(TEXTS, 300)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAM_DS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@settings(max_examples=50)
@given(st.text(max_size=60))
@example("  two  spaces , and a comma\t\r\n\x00 ß 漢字 \U0001f600 don 't")
@example("a <|end|> that was written out")
def test_tokenizer_loses_nothing(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_tokenizer_has_its_special_tokens_and_its_size():
    assert len(TOKENIZER) == 300
    assert len({TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id}) == 3
    assert len(TOKENIZER("the graph")["input_ids"]) < len("the graph")
    with pytest.raises(InputError, match="at least 259"):
        train_tokenizer(TEXTS, 258)


def test_base_model_loads_with_auto_classes_and_has_learnt(cache):
    folder = embedded_base_model(CORPUS, recipe=TINY)
    assert folder.parent == cache and folder.name.startswith("base-")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the root")["input_ids"] == TOKENIZER("the root")["input_ids"]
    assert tokenizer.model_max_length == 64 and model.config.eos_token_id == tokenizer.eos_token_id
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 4.0  # an untrained model: log(300) = 5.7
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["steps"] == 12


def test_second_call_trains_nothing(cache, monkeypatch):
    folder = embedded_base_model(CORPUS, recipe=TINY)
    monkeypatch.setattr(base_model, "_pretrain", None)
    assert embedded_base_model(CORPUS, recipe=TINY) == folder
    assert list(cache.iterdir()) == [folder]


def test_base_model_is_a_function_of_corpus_recipe_and_seed(cache, monkeypatch, tmp_path):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    folder = embedded_base_model(CORPUS, recipe=TINY)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is the caller's"
    other = embedded_base_model(CORPUS, recipe=TINY, seed=1)
    smaller = build_corpus("toy", {"a": Splits(public=TEXTS[1:], train=("x",), valid=(), test=("y",))})
    assert len({folder, other, embedded_base_model(smaller, recipe=TINY)}) == 3

    monkeypatch.setenv("SAM_DS_CACHE", str(tmp_path / "elsewhere"))
    torch.manual_seed(2)
    again = embedded_base_model(CORPUS, recipe=TINY)
    assert again.name == folder.name
    for name in ("model.safetensors", "tokenizer.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    weights, others = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    assert any(not torch.equal(weights[name], others[name]) for name in weights)


def test_a_half_written_folder_is_made_again(cache):
    folder = embedded_base_model(CORPUS, recipe=TINY)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    assert embedded_base_model(CORPUS, recipe=TINY) == folder
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_training_that_is_cut_off_leaves_nothing(cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model, "_pretrain", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded_base_model(CORPUS, recipe=TINY)
    assert list(cache.iterdir()) == []


def test_a_folder_finished_meanwhile_by_another_process_is_kept(cache, monkeypatch):
    folder = embedded_base_model(CORPUS, recipe=TINY)
    (folder / "by_another").touch()
    asked = iter([False, True, True])  # not there at the start, there at the end
    monkeypatch.setattr(base_model, "_finished", lambda _: next(asked))
    assert embedded_base_model(CORPUS, recipe=TINY) == folder
    assert (folder / "by_another").exists() and list(cache.iterdir()) == [folder]


def test_bad_input_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SAM_DS_CACHE", str(tmp_path / "file" / "inside"))
    with pytest.raises(InputError, match="set SAM_DS_CACHE"):
        embedded_base_model(CORPUS, recipe=TINY)
    private = build_corpus("private", {"a": Splits(public=(), train=("x",), valid=(), test=("y",))})
    with pytest.raises(InputError, match="'private' has none"):
        embedded_base_model(private, recipe=TINY)
    with pytest.raises(InputError, match="multiple of 64"):
        BaseRecipe(intermediate_size=500)
    with pytest.raises(InputError, match="at most context"):
        BaseRecipe(sequence=1024)
