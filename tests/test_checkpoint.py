"""What a converted model leaves on disk, and where it is read from: folders and the hub."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sam_ds.errors import InputError
from sam_ds.experts.checkpoint import from_pretrained, is_converted, restore_sam
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.model import TENSOR_FILE

IDS = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted(tiny_llama):
    config = SamConfig(num_experts=8, top_k=4, standin_rank=4)
    return get_sam_model(tiny_llama(), config, calibration=IDS, progress=False)


@pytest.fixture
def model(converted):
    return copy.deepcopy(converted)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS[:3]).logits


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(model, revision)` -> what to call `from_pretrained` with to read it as a repository that is in the cache."""
    # transformers asks the hub which commit a revision is, whatever local_files_only says.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(model, revision):
        repository = tmp_path / "cache" / "models--someone--experts"
        commit = f"{len(revision):040x}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
        return {"revision": revision, "cache_dir": tmp_path / "cache", "local_files_only": True}

    return put


def test_a_repository_on_the_hub(model, hub):
    where = hub(model, "main")
    loaded = from_pretrained("someone/experts", **where)
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        model.sam_layers[0].sam.wg.neg_()
    other = from_pretrained("someone/experts", **hub(model, "second"))
    assert torch.equal(logits(other), logits(model)) and not torch.equal(logits(other), logits(loaded))
    assert torch.equal(logits(from_pretrained("someone/experts", **where)), logits(loaded))


def test_a_plain_repository_on_the_hub(model, hub):
    where = hub(model.unload(), "main")
    assert type(AutoModelForCausalLM.from_pretrained("someone/experts", **where)) is type(model)
    with pytest.raises(InputError, match="^someone/experts is not a converted model: .*; give a folder or hub id"):
        from_pretrained("someone/experts", **where)


@pytest.mark.parametrize("name", ["no such folder", "./nowhere", "runs/a/b"])
def test_neither_a_folder_nor_an_id(name):
    with pytest.raises(InputError, match=f"^{name} is not a converted model: .*Repo id must"):
        from_pretrained(name)
    assert not is_converted(name)


def test_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    """Even where it would be an id: a run that has not begun has no base yet."""
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "base", type(tmp_path)("runs/base")):
        with pytest.raises(InputError, match="is not a converted model: there is no such folder"):
            from_pretrained(name)
        assert not is_converted(name)


@pytest.mark.parametrize("size", ["50GB", "20KB"])
def test_a_plain_model_saved_over_a_converted_one_is_plain(model, tmp_path, size):
    """Merged, or loaded as the plain checkpoint that the folder is too; its weights may be the very same."""
    for plain_of in (lambda: copy.deepcopy(model).merge_and_unload(),
                     lambda: AutoModelForCausalLM.from_pretrained(tmp_path)):  # fmt: skip
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert is_converted(tmp_path) and (tmp_path / "model.safetensors").is_file() == (size == "50GB")
        loaded = from_pretrained(tmp_path)
        assert torch.equal(logits(loaded), logits(model))
        loaded.save_pretrained(tmp_path, max_shard_size=size)
        assert is_converted(tmp_path)
        plain = plain_of()
        plain.save_pretrained(tmp_path, max_shard_size=size)
        assert not is_converted(tmp_path)
        with pytest.raises(InputError, match="a plain model has been saved over it"):
            from_pretrained(tmp_path)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))


def test_a_variant_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="variant='fp16'"):
        model.save_pretrained(tmp_path / "new", variant="fp16")
    with pytest.raises(InputError, match="variant='fp16'"):
        model.save_pretrained(tmp_path / "new", True, None, False, "50GB", "fp16")
    assert not (tmp_path / "new").exists()


def test_what_is_saved_may_be_given_by_place(model, tmp_path):
    """As a plain model takes it."""
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state |= {name: value for name, value in model.state_dict().items() if value.dtype == torch.bool}
    model.save_pretrained(tmp_path / "new", True, state)
    again = from_pretrained(tmp_path / "new").state_dict()
    assert not any(value.any() for value in again.values() if value.dtype != torch.bool)
    model.save_pretrained(tmp_path / "none", False)
    assert not is_converted(tmp_path / "none")


@pytest.mark.parametrize(
    ("edge", "value", "kind", "message"),
    [
        ((5, 3), True, torch.bool, "the graph holds the edge 5 -> 3"),
        ((slice(None), 6), False, torch.bool, r"experts \[6\] cannot be reached from the 1 root"),
        ((0, 1), True, torch.bfloat16, "a graph is bool, this is torch.bfloat16"),
    ],
)
def test_a_file_with_a_cyclic_or_unreachable_graph_is_refused(model, tmp_path, edge, value, kind, message):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    name = next(name for name in tensors if "layers.1." in name and name.endswith("adjacency_SS"))
    tensors[name][edge] = value
    tensors[name] = tensors[name].to(kind)
    save_file(tensors, tmp_path / TENSOR_FILE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for load in (from_pretrained, lambda folder: restore_sam(model, folder)):
        with pytest.raises(InputError, match=rf"{TENSOR_FILE}, .*layers\.1\..*: {message}"):
            load(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
