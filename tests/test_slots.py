"""A client's model with room for some experts is the full model that may visit only those."""

import copy

import pytest
import torch
from reference import expert_output, standin_output

from sam_ds.errors import InputError
from sam_ds.experts import slots as slots_module
from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import get_sam_model
from sam_ds.experts.slots import Checkpoint, StandInStore, hold_experts, to_slots
from sam_ds.experts.units import expert_weights, prepare, read_units, shared_parameters, trained_fields, write_units
from sam_ds.graph.dag import contract

HELD = ((0, 1, 3, 4, 7), (0, 1, 2, 5, 6))
EVERY = (tuple(range(8)),) * 2


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request, tiny_llama, tiny_gpt2, tmp_path_factory):
    """A converted model on disk, biases not zero."""
    model = tiny_llama(mlp_bias=True) if request.param == "llama" else tiny_gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name and name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    calibration = torch.randint(3, 97, (40, 32), generator=torch.Generator().manual_seed(0))
    config = SamConfig(num_experts=8, top_k=4, roots=2, standin_rank=4)
    model = get_sam_model(model, config, calibration=calibration, progress=False)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def full(folder):
    return from_pretrained(folder)


def client(folder, full, held, top_k, graph_LEE, trains="full"):
    """The slot model of a client, filled as a worker fills it: what trains from units, the rest from the disk."""
    model = from_pretrained(folder)
    store = StandInStore(model)
    for layer in model.sam_layers:
        layer.top_k = top_k
    to_slots(model, len(held[0]))
    prepare(model, trains, rank=4, alpha=4.0, seed=0)
    if trains == "lora":
        prepare(full, trains, rank=4, alpha=4.0, seed=0)
        for layer in full.sam_layers:
            for name in ("up_rows", "down_rows", "gate_rows"):
                if getattr(layer.lora, name) is not None:
                    torch.nn.init.normal_(getattr(layer.lora, name), std=0.3)
    everything = dict(full.named_parameters())
    units = read_units(trained_fields(full, trains), shared_parameters(full, trains), everything, EVERY)
    own = dict(model.named_parameters())
    write_units(units, trained_fields(model, trains), shared_parameters(model, trains), own, held)
    hold_experts(model.sam_layers, store.core, held)
    model.set_graph(graph_LEE)
    trained = {field.parameter for field in trained_fields(model, trains)}
    checkpoint = Checkpoint(folder)
    for field in expert_weights(model):
        if field.parameter not in trained:
            own[field.parameter].data.fill_(float("nan"))
            checkpoint.read_experts(field, held[field.layer], own[field.parameter].data)
    return model


def restrict(full, held, top_k, graph_LEE):
    """The full model with the experts outside `held` cut off: no edge leads to them, paths through them contracted."""
    for layer, experts, mask_EE in zip(full.sam_layers, held, graph_LEE, strict=True):
        layer.sam.adjacency_SS.zero_()
        among = torch.tensor(experts)
        layer.sam.adjacency_SS[among[:, None], among] = torch.from_numpy(contract(mask_EE.numpy(), experts))
        layer.top_k = top_k
    return full


def graph(seed):
    """Random and sparse, but reachable: expert e has at least the edge from root 0 or from e - 1."""
    generator = torch.Generator().manual_seed(seed)
    mask_LEE = (torch.rand(2, 8, 8, generator=generator) < 0.25).triu(1)
    for layer in range(2):
        for e in range(2, 8):
            mask_LEE[layer, 0 if e == 2 else e - 1, e] = True
    return mask_LEE


@torch.no_grad()
@pytest.mark.parametrize("trains", ["full", "lora"])
@pytest.mark.parametrize("top_k", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slot_model_is_the_full_model_restricted_to_what_is_held(folder, full, top_k, seed, trains):
    ids = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(seed))
    ours = client(folder, full, HELD, top_k, graph(seed), trains)
    theirs = restrict(full, HELD, top_k, graph(seed))
    assert not torch.equal(theirs.graph(), graph(seed))
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("top_k", [5, 8])
def test_with_the_budget_of_all_held_the_others_are_their_standins(folder, full, top_k):
    model = client(folder, full, HELD, top_k, graph(0))
    x_Td = torch.randn(11, 32)
    for layer, whole, held in zip(model.sam_layers, full.sam_layers, HELD, strict=True):
        expected_Td = sum(
            expert_output(whole, e, x_Td) if e in held else standin_output(whole.sam, e, x_Td) for e in range(8)
        )
        expected_Td = expected_Td + whole.get_submodule(whole.ffn_names[2]).bias
        torch.testing.assert_close(layer(x_Td), expected_Td, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_engine_serves_one_client_after_the_other(folder, full):
    ids = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))
    fresh = client(folder, full, HELD, 4, graph(1))
    used = client(folder, full, ((0, 1, 2, 3, 4), (0, 1, 5, 6, 7)), 4, graph(0))
    store = StandInStore(full)
    own = dict(used.named_parameters())
    units = read_units(trained_fields(full, "full"), {}, dict(full.named_parameters()), EVERY)
    write_units(units, trained_fields(used, "full"), {}, own, HELD)
    hold_experts(used.sam_layers, store.core, HELD)
    used.set_graph(graph(1))
    assert torch.equal(used(input_ids=ids).logits, fresh(input_ids=ids).logits)


@torch.no_grad()
def test_all_slots_are_the_whole_model(folder, full):
    ids = torch.randint(3, 97, (3, 17), generator=torch.Generator().manual_seed(0))
    model = client(folder, full, EVERY, 4, full.graph())
    for layer in full.sam_layers:
        layer.top_k = 4
    assert torch.equal(model(input_ids=ids).logits, full(input_ids=ids).logits)


def test_a_slot_model_is_smaller_and_holds_no_second_copy(folder, full):
    model = from_pretrained(folder)
    to_slots(model, 5)
    for layer, whole in zip(model.sam_layers, full.sam_layers, strict=True):
        for ours, theirs in zip(layer.matrices(), whole.matrices(), strict=True):
            assert ours is None and theirs is None or ours.numel() * 8 == theirs.numel() * 5
        assert layer.sam.wg.shape == (5, 49) and layer.sam.adjacency_SS.shape == (5, 5)
    held = {id(parameter) for parameter in model.parameters()}
    assert all(id(parameter) in held for module in model._sam_original.values() for parameter in module.parameters())


def test_a_graph_is_checked_against_all_experts(folder, full):
    model = client(folder, full, HELD, 4, graph(0))
    with pytest.raises(InputError, match=r"must have shape \(2, 8, 8\)"):
        model.set_graph(torch.ones(2, 5, 5, dtype=torch.bool).triu(1))


class Recorder:
    """`safe_open`, noting which slices are asked for."""

    def __init__(self, opened, asked):
        self._opened, self._asked = opened, asked

    def __enter__(self):
        self._file = self._opened.__enter__()
        return self

    def __exit__(self, *exception):
        return self._opened.__exit__(*exception)

    def get_slice(self, name):
        stored, asked = self._file.get_slice(name), self._asked

        class Slice:
            def __getitem__(self, index):
                asked.append((name, index))
                return stored[index]

        return Slice()

    def keys(self):
        return self._file.keys()


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_rows_of_held_experts_are_read(folder, full, tmp_path, monkeypatch, sharded):
    if sharded:
        # from_pretrained(folder) again: the shards hold the same weights
        copy.deepcopy(full).save_pretrained(tmp_path, max_shard_size="20KB")
        assert (tmp_path / "model.safetensors.index.json").is_file()
    asked = []
    opener = slots_module.safe_open
    monkeypatch.setattr(slots_module, "safe_open", lambda *args: Recorder(opener(*args), asked))
    checkpoint = Checkpoint(tmp_path if sharded else folder)
    everything = dict(full.named_parameters())
    for field in expert_weights(full):
        whole = everything[field.parameter].detach()
        shape = list(whole.shape)
        shape[field.dim] = 3 * field.width
        target = torch.full(shape, float("nan"))
        asked.clear()
        checkpoint.read_experts(field, (0, 1, 6), target)
        assert len(asked) == 3
        for slot, expert in enumerate((0, 1, 6)):
            name, index = asked[slot]
            rows = index if field.dim == 0 else index[1]
            assert name == field.parameter and (rows.start, rows.stop) == (expert * 8, expert * 8 + 8)
            assert torch.equal(field.read(target, slot), field.read(whole, expert))
