"""Clients' models of the families, whatever a family stores its FFN as."""

import pytest
import torch
from families import build, close, convert, logits, same_state
from test_slots import HELD, client, graph, restrict

from sam_ds.experts.checkpoint import from_pretrained
from sam_ds.experts.model import add_assembler
from sam_ds.experts.slots import to_slots
from sam_ds.experts.units import TRAINS, prepare, read_units, shared_parameters, trained_fields, write_units

SLOTS = ["llama", "gpt2", "phi3", "opt"]


@torch.no_grad()
@pytest.mark.parametrize("trains", ["full", "lora"])
@pytest.mark.parametrize("model_type", SLOTS)
def test_a_slot_model_is_the_full_model_restricted_to_what_is_held(model_type, trains, tmp_path):
    convert(build(model_type)).save_pretrained(tmp_path)
    full = from_pretrained(tmp_path)
    ours = client(tmp_path, full, HELD, 3, graph(0), trains)
    assert sum(p.numel() for p in ours.parameters()) < sum(p.numel() for p in full.parameters())
    close(logits(ours), logits(restrict(full, HELD, 3, graph(0))))


@pytest.mark.parametrize("trains", TRAINS)
@pytest.mark.parametrize("model_type", SLOTS)
def test_what_trains_has_one_owner_and_is_written_where_it_was_read(model_type, trains):
    """On a client, whose slots hold three of the experts."""
    held = ((0, 1, 4), (0, 1, 7))
    model = convert(build(model_type))
    to_slots(model, 3)
    add_assembler(model, seed=0)
    prepare(model, trains, rank=3, alpha=6.0, seed=7, dense=True)
    fields, shared = trained_fields(model, trains), shared_parameters(model, trains, dense=True)
    parameters = dict(model.named_parameters())
    owners = {name: torch.zeros(value.shape) for name, value in parameters.items()}
    for name in shared.values():
        owners[name] += 1
    for each in fields:
        for slot in range(3):
            each.read(owners[each.parameter], slot).add_(1)
    for name, value in parameters.items():
        assert (owners[name] == float(value.requires_grad)).all(), name
    with torch.no_grad():
        for value in parameters.values():
            value.copy_(torch.randn(value.shape))
        before = {name: value.clone() for name, value in parameters.items()}
        units = read_units(fields, shared, parameters, held)
        for name in {each.parameter for each in fields} | set(shared.values()):
            parameters[name].zero_()
        write_units(units, fields, shared, parameters, held)
    same_state(parameters, before)
    if trains == "full" and model_type == "phi3":
        assert {u.tensor: v.shape for u, v in units.items() if getattr(u, "expert", None) == 7} == {
            "gate_up": (8, 2, 32), "down": (8, 32), "wg": (1, 32 + 2 * 8 + 1)
        }  # fmt: skip
