"""Which tensors of a converted model train and travel, and where each lives.

A *field* is one parameter of a layer that is owned by experts slice by slice; its unit (layer, expert, tensor) is
the neuron-first slice (n, ...) of one expert, whatever the parameter's own orientation; of a parameter that fuses gate
and up, (n, 2, ...). A shared parameter is a unit as a whole. What trains is one of:

    full      the experts' own weights and gate rows; the assembler; `dense`: all other parameters too
    lora      the expert-owned low-rank rows and gate rows; the assembler; `dense`: the norms too; `attention_rank`:
              one low-rank factor of each attention projection, as a whole
    (with `full` and `lora`, beside the gate rows, the gains of the messages that an expert is sent)
    lora-both both low-rank factors as a whole (FedIT)
    all       every parameter of the dense model (FedAvg)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sam_ds.errors import InputError
from sam_ds.experts.attention import add_update, attention_maps, attention_update, drop_update, updated_maps
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.model import SamMixin
from sam_ds.wire.payload import ExpertUnit, SharedUnit

TRAINS = ("full", "lora", "lora-both", "all")
ASSEMBLER = "assembler."


@dataclass(frozen=True, kw_only=True)
class Field:
    """One parameter that experts own by slices: along dimension `dim`, `width` entries an expert."""

    layer: int
    num_experts: int
    tensor: str
    parameter: str
    """Name of the parameter in the model."""
    dim: int
    width: int
    blocks: int = 1
    """2 where gate and up are fused: all experts' gate entries come before all experts' up entries."""

    def read(self, full: Tensor, slot: int) -> Tensor:
        """The slice of one slot, neuron first: a view."""
        if self.blocks == 1:
            return full.narrow(self.dim, slot * self.width, self.width).movedim(self.dim, 0)
        parts = full.unflatten(self.dim, (self.blocks, -1))
        return parts.narrow(self.dim + 1, slot * self.width, self.width).movedim(self.dim + 1, 0)

    def write(self, full: Tensor, slot: int, value: Tensor) -> None:
        """Put a slice where `read` takes it from."""
        self.read(full, slot).copy_(value)


def expert_weights(model: PreTrainedModel) -> list[Field]:
    """The fields of the experts' own weights and biases, all layers: what a slot of a client's model holds."""
    fields = []
    for index, (path, layer) in enumerate(_layers(model)):
        up, gate, down = layer.ffn_names
        fused = gate == up
        # An inline FFN's weights are not in the layer but beside it.
        owner = path if layer.ffn.inline is None else path.rpartition(".")[0]
        for tensor, name in (("gate_up" if fused else "up", up), ("gate", None if fused else gate), ("down", down)):
            if name is None:
                continue
            linear = layer.ffn.linear(name)
            transposed = isinstance(linear, Conv1D)
            of = partial(Field, layer=index, num_experts=layer.num_experts, width=layer.neurons,
                         blocks=2 if fused and tensor != "down" else 1)  # fmt: skip
            dim = int(transposed) if tensor != "down" else int(not transposed)
            fields.append(of(tensor=tensor, parameter=f"{owner}.{name}.weight", dim=dim))
            if tensor != "down" and linear.bias is not None:
                fields.append(of(tensor=f"{tensor}_bias", parameter=f"{owner}.{name}.bias", dim=0))
    return fields


def trained_fields(model: PreTrainedModel, trains: str) -> list[Field]:
    """The fields that train under `full` and `lora`; none under the other two, where everything is shared."""
    if trains in ("all", "lora-both"):
        return []
    gates = [
        Field(layer=index, num_experts=layer.num_experts, tensor="wg", parameter=f"{path}.sam.wg", dim=0, width=1)
        for index, (path, layer) in enumerate(_layers(model))
    ]
    for index, (path, layer) in enumerate(_layers(model)):
        if layer.sam.gain_SE is not None:
            gates.append(Field(layer=index, num_experts=layer.num_experts, tensor="gain",
                               parameter=f"{path}.sam.gain_SE", dim=0, width=1))  # fmt: skip
    if trains == "full":
        return expert_weights(model) + gates
    rows = []
    for index, (path, layer) in enumerate(_layers(model)):
        assert layer.lora is not None
        rows += [
            Field(layer=index, num_experts=layer.num_experts, tensor=name, parameter=f"{path}.lora.{name}", dim=0,
                  width=layer.neurons)
            for name, value in layer.lora.named_parameters()
            if name.endswith("_rows") and value is not None
        ]
    return rows + gates


def shared_parameters(model: PreTrainedModel, trains: str, *, dense: bool = False) -> dict[str, str]:
    """Unit name -> parameter name of what trains and belongs to no expert."""
    names = [name for name, _ in model.named_parameters()]
    plain = [name for name in names if ".sam." not in name and ".lora." not in name and "sam_assembler." not in name]
    if trains == "all":
        return {name: name for name in plain}
    if trains == "lora-both":
        return {name: name for name in names if ".lora." in name}
    shared = {name.replace("sam_assembler.", ASSEMBLER): name for name in names if name.startswith("sam_assembler.")}
    if trains == "lora":
        shared |= {name: name for name in names if name.endswith(".lora.b_Ro")}
    if dense:
        experts = {field.parameter for field in expert_weights(model)}
        small = {name for name, p in model.named_parameters() if p.dim() == 1}
        shared |= {name: name for name in plain if name not in experts and (trains == "full" or name in small)}
    return shared


def prepare(
    model: PreTrainedModel, trains: str, *, rank: int, alpha: float, seed: int, dense: bool = False,
    attention_rank: int = 0,
) -> None:  # fmt: skip
    """Add the low-rank factors that `trains` needs, of the attention too where it is given a rank, and let gradients
    flow to what trains, nowhere else."""
    assert isinstance(model, SamMixin)
    if trains not in TRAINS:
        raise InputError(f"trains must be one of {', '.join(TRAINS)}, got {trains!r}")
    if any(layer.backend == "deepspeed" for layer in model.sam_layers):
        raise InputError("the experts are in DeepSpeed's MoE layers: say what trains before to_deepspeed_moe, which "
                         "keeps it, or call to_views(model) first")  # fmt: skip
    if not trains.startswith("lora") and any(layer.backend == "nf4" for layer in model.sam_layers):
        raise InputError(f"weights in 4 bits do not train, but trains = {trains!r}; give trains = 'lora'")
    if trains.startswith("lora"):
        for index, layer in enumerate(model.sam_layers):
            layer.lora = LoraSlices(
                hidden=layer.ffn.hidden, neurons=layer.slots * layer.neurons, gated=layer.ffn.gate is not None,
                rank=rank, alpha=alpha, seed=lora_seed(seed, index), both=trains == "lora-both",
            ).to(layer.sam.wg.device)  # fmt: skip
        for updated in updated_maps(model).values():
            drop_update(updated)
    if trains.startswith("lora") and attention_rank:
        maps = attention_maps(model, [layer.ffn for layer in model.sam_layers]).values()
        for index, linear in enumerate(maps, len(model.sam_layers)):
            own = attention_update(linear, rank=attention_rank, alpha=alpha, seed=lora_seed(seed, index))
            add_update(linear, own)
    train = {field.parameter for field in trained_fields(model, trains)}
    train |= set(shared_parameters(model, trains, dense=dense).values())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in train)


def lora_seed(seed: int, index: int) -> int:
    """What the low-rank factors of a layer are drawn from; of the maps of the attention, counted on after the layers.
    """
    return seed * 1_000_003 + index


@torch.no_grad()
def read_units(
    fields: Iterable[Field], shared: Mapping[str, str], parameters: Mapping[str, Tensor], held: Sequence[Sequence[int]]
) -> dict[ExpertUnit | SharedUnit, Tensor]:
    """Copies of all units, on the CPU in fp32; `held[l]` are the experts in the slots of layer l."""
    units: dict[ExpertUnit | SharedUnit, Tensor] = {
        SharedUnit(name): parameters[parameter].detach().float().cpu().clone() for name, parameter in shared.items()
    }
    for field in fields:
        full = parameters[field.parameter].detach().float().cpu()
        for slot, expert in enumerate(held[field.layer]):
            units[ExpertUnit(field.layer, expert, field.tensor)] = field.read(full, slot).clone()
    return units


@torch.no_grad()
def write_units(
    units: Mapping[ExpertUnit | SharedUnit, Tensor],
    fields: Iterable[Field],
    shared: Mapping[str, str],
    parameters: Mapping[str, Tensor],
    held: Sequence[Sequence[int]],
) -> None:
    """The inverse of `read_units`: every unit into its place, in place."""
    for name, parameter in shared.items():
        parameters[parameter].copy_(units[SharedUnit(name)])
    for field in fields:
        for slot, expert in enumerate(held[field.layer]):
            value = units[ExpertUnit(field.layer, expert, field.tensor)]
            field.write(parameters[field.parameter], slot, value.to(parameters[field.parameter].dtype))


def _layers(model: nn.Module) -> list[tuple[str, SamFFN]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, SamFFN)]
