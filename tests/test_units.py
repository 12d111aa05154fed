"""Units: what trains is read and written without loss, every weight has one owner, and updates of rows are linear."""

import copy

import pytest
import torch

from sam_ds.errors import InputError
from sam_ds.experts.config import SamConfig
from sam_ds.experts.model import add_assembler, inject_layers, wrap_ffns
from sam_ds.experts.slots import to_slots
from sam_ds.experts.surgery import find_ffns, matrix
from sam_ds.experts.units import (
    TRAINS,
    expert_weights,
    prepare,
    read_units,
    shared_parameters,
    trained_fields,
    write_units,
)
from sam_ds.wire.payload import ExpertUnit, SharedUnit

EVERY = (tuple(range(8)),) * 2


@pytest.fixture(params=["llama", "llama with biases", "gpt2"])
def model(request, tiny_llama, tiny_gpt2):
    """Converted, with an assembler; no two entries of a parameter alike."""
    biases = request.param == "llama with biases"
    model = tiny_gpt2() if request.param == "gpt2" else tiny_llama(mlp_bias=biases)
    ffns = find_ffns(model)
    config = SamConfig(num_experts=8, top_k=4, roots=2, standin_rank=4)
    inject_layers(model, config, ffns, wrap_ffns(ffns, config))
    add_assembler(model, seed=0)
    return model


def scramble(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def plan(model, trains, dense=False):
    prepare(model, trains, rank=3, alpha=6.0, seed=7, dense=dense, attention_rank=2)
    return trained_fields(model, trains), shared_parameters(model, trains, dense=dense)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("trains", TRAINS)
def test_writing_what_was_read_gives_the_same_parameters(model, trains, dense):
    fields, shared = plan(model, trains, dense)
    scramble(model)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    units = read_units(fields, shared, parameters, EVERY)
    scramble(model, seed=1)
    write_units(units, fields, shared, parameters, EVERY)
    trained = {field.parameter for field in fields} | set(shared.values())
    for name, value in parameters.items():
        assert torch.equal(value, before[name]) == (name in trained), name
    again = read_units(fields, shared, parameters, EVERY)
    assert again.keys() == units.keys() and all(torch.equal(again[unit], units[unit]) for unit in units)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("trains", TRAINS)
def test_what_trains_has_one_owner_and_a_gradient(model, trains, dense):
    fields, shared = plan(model, trains, dense)
    parameters = dict(model.named_parameters())
    owners = {name: torch.zeros(value.shape) for name, value in parameters.items()}
    for name in shared.values():
        owners[name] += 1
    for field in fields:
        for slot in range(8):
            field.read(owners[field.parameter], slot).add_(1)
    for name, value in parameters.items():
        assert (owners[name] == float(value.requires_grad)).all(), name


def expected(name, trains, dense):
    """Whether a parameter trains, by its name."""
    adapter, gate, assembler = ".lora." in name, ".sam." in name, name.startswith("sam_assembler.")
    plain = not (adapter or gate or assembler)
    expert = ".mlp." in name and plain and not name.endswith(("down_proj.bias", "c_proj.bias"))
    if trains == "all":
        return plain
    if trains == "lora-both":
        return adapter
    own = expert if trains == "full" else name.endswith(("_rows", ".b_Ro"))
    rest = dense and plain and not expert and (trains == "full" or "norm" in name or "ln_" in name or "bias" in name)
    return own or gate or assembler or rest


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("trains", TRAINS)
def test_prepare_lets_gradients_flow_to_what_trains_and_nowhere_else(model, trains, dense):
    plan(model, trains, dense)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == expected(name, trains, dense), name


def test_an_unknown_choice_is_refused(model):
    with pytest.raises(InputError, match="trains must be one of full, lora, lora-both, all, got 'some'"):
        prepare(model, "some", rank=1, alpha=1.0, seed=0)


def test_units_are_neuron_first_and_what_the_layer_computes_with(model):
    scramble(model)
    units = read_units(expert_weights(model), {}, dict(model.named_parameters()), EVERY)
    for index, layer in enumerate(model.sam_layers):
        up_dm, gate_dm, down_md = layer.matrices()
        for e in range(8):
            assert torch.equal(units[ExpertUnit(index, e, "up")], layer.slots_in(up_dm)[e].t())
            assert torch.equal(units[ExpertUnit(index, e, "down")], layer.slots_out(down_md)[e])
            if gate_dm is not None:
                assert torch.equal(units[ExpertUnit(index, e, "gate")], layer.slots_in(gate_dm)[e].t())
            up = layer.get_submodule(layer.ffn_names[0])
            if up.bias is not None:
                assert torch.equal(units[ExpertUnit(index, e, "up_bias")], up.bias[8 * e : 8 * e + 8])
    assert all(value.shape[0] == 8 for value in units.values())


def test_together_the_experts_own_the_ffn_but_for_its_last_bias(model):
    """As many numbers as the FFN has, and the FFN rebuilt from them."""
    scramble(model)
    units = read_units(expert_weights(model), {}, dict(model.named_parameters()), EVERY)
    for index, layer in enumerate(model.sam_layers):
        mine = {unit: value for unit, value in units.items() if unit.layer == index}
        down = layer.get_submodule(layer.ffn_names[2])
        size = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("sam."))
        assert sum(map(torch.numel, mine.values())) == size - (0 if down.bias is None else down.bias.numel())
        for tensor, name in zip(("up", "gate", "down"), layer.ffn_names, strict=True):
            if name is None:
                continue
            rows_md = torch.cat([mine[ExpertUnit(index, e, tensor)] for e in range(8)])
            weight = matrix(layer.get_submodule(name))
            assert torch.equal(rows_md, weight if tensor == "down" else weight.t())


def test_the_units_of_a_run_have_names_that_travel(model):
    fields, shared = plan(model, "lora", dense=True)
    units = read_units(fields, shared, dict(model.named_parameters()), EVERY)
    tensors = {unit.tensor for unit in units if isinstance(unit, ExpertUnit)}
    gated = model.sam_layers[0].ffn_names[1] is not None
    assert tensors == {"up_rows", "down_rows", "wg"} | ({"gate_rows"} if gated else set())
    assert SharedUnit("assembler.mix") in units
    assert sum(unit.name.endswith(".lora.b_Ro") for unit in units if isinstance(unit, SharedUnit)) == (
        8 if "gate_rows" in tensors else 4)  # fmt: skip
    assert units[ExpertUnit(1, 7, "up_rows")].shape == (8, 3) and units[ExpertUnit(1, 7, "wg")].shape == (1, 49)


@pytest.mark.parametrize("trains", ["full", "lora"])
def test_a_client_reads_and_writes_its_own_experts_only(model, trains):
    """Held experts go through the slots of a small model and come back; the others stay out."""
    held = ((0, 1, 4), (0, 1, 7))
    client = copy.deepcopy(model)
    to_slots(client, 3)
    fields, shared = plan(model, trains)
    scramble(model)
    units = read_units(fields, shared, dict(model.named_parameters()), EVERY)
    own_fields, own_shared = plan(client, trains)
    own = dict(client.named_parameters())
    write_units(units, own_fields, own_shared, own, held)
    back = read_units(own_fields, own_shared, own, held)
    for unit, value in back.items():
        assert torch.equal(value, units[unit])
    assert {unit for unit in units if unit not in back} == {
        unit for unit in units if isinstance(unit, ExpertUnit) and unit.expert not in held[unit.layer]
    }


def test_read_units_are_copies_in_fp32(model):
    model.to(torch.bfloat16)
    parameters = dict(model.named_parameters())
    fields, shared = plan(model, "full")
    before = {name: value.detach().clone() for name, value in parameters.items()}
    for value in read_units(fields, shared, parameters, EVERY).values():
        assert value.dtype == torch.float32
        value.zero_()
    assert all(torch.equal(parameters[name], value) for name, value in before.items())


FROZEN = ("up_in", "down_out", "gate_in")


def test_the_frozen_factors_are_those_of_the_run_whatever_a_client_holds(model):
    client = copy.deepcopy(model)
    to_slots(client, 3)
    for one in (model, client):
        prepare(one, "lora", rank=3, alpha=6.0, seed=7)
    ours, theirs = dict(client.named_parameters()), dict(model.named_parameters())
    names = [name for name in theirs if name.endswith(FROZEN)]
    assert len(names) == 2 * (2 if model.sam_layers[0].ffn_names[1] is None else 3)
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    # other layers and other seeds draw others
    assert not torch.equal(model.sam_layers[0].lora.up_in, model.sam_layers[1].lora.up_in)
    prepare(client, "lora", rank=3, alpha=6.0, seed=8)
    assert not torch.equal(client.sam_layers[0].lora.up_in, model.sam_layers[0].lora.up_in)


def test_an_update_starts_at_zero_and_its_mean_is_the_mean_of_updates(model):
    plan(model, "lora")
    lora = model.sam_layers[0].lora
    assert not any(delta.any() for delta in lora.deltas().values())
    rows = [name for name, _ in lora.named_parameters() if name.endswith("_rows")]
    drawn = [{name: torch.randn_like(getattr(lora, name)) for name in rows} for _ in range(2)]

    def deltas(values):
        with torch.no_grad():
            for name, value in values.items():
                getattr(lora, name).copy_(value)
        return lora.deltas()

    first, second = map(deltas, drawn)
    mean = deltas({name: (drawn[0][name] + drawn[1][name]) / 2 for name in rows})
    up_dm, gate_dm, down_md = model.sam_layers[0].matrices()
    assert mean["up"].shape == up_dm.shape and mean["down"].shape == down_md.shape and (gate_dm is None) == (
        "gate" not in mean
    )
    for name, value in mean.items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2, atol=1e-5, rtol=1e-5)
        assert value.abs().max() > 0


def test_the_mean_of_both_factors_is_not_the_mean_of_updates(model):
    """FedIT's bias, the reason why one factor stays frozen."""
    plan(model, "lora-both")
    lora = model.sam_layers[0].lora
    drawn = [{name: torch.randn_like(value) for name, value in lora.named_parameters()} for _ in range(2)]
    results = []
    for values in (*drawn, {name: (drawn[0][name] + drawn[1][name]) / 2 for name in drawn[0]}):
        lora.load_state_dict(values)
        results.append(lora.deltas()["up"])
    assert (results[2] - (results[0] + results[1]) / 2).abs().max() > 0.1
