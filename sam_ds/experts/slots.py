"""A client's model: the converted model with room for only some experts a layer, and what fills the room.

The experts that a client does not hold are neither read from disk nor in memory nor computed; the sum of their
stand-ins represents them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from sam_ds.experts.layer import SamFFN
from sam_ds.experts.model import SamMixin
from sam_ds.experts.surgery import hand_back, resize
from sam_ds.experts.units import Field


def to_slots(model: PreTrainedModel, slots: int) -> None:
    """Give every layer, in place, room for `slots` experts, of which a token visits as many as before or all; by
    threshold, those that score as much as before. Contents are undefined until `hold_experts` and the weights' loading:
    what the experts were is neither copied nor, where it is still in the file, read."""
    assert isinstance(model, SamMixin)
    for layer, original in zip(model.sam_layers, model._sam_original.values(), strict=True):
        resize(layer.ffn, slots * layer.neurons)
        parts = layer.sam
        parts.wg = torch.nn.Parameter(parts.wg[:slots].detach().clone())
        if parts.gain_SE is not None:
            parts.gain_SE = torch.nn.Parameter(parts.gain_SE[:slots].detach().clone())
        parts.register_buffer("core_SQp", parts.core_SQp[:slots].clone())
        parts.register_buffer("adjacency_SS", parts.adjacency_SS[:slots, :slots].clone())
        hand_back(original, layer.ffn)
        layer.slots = slots
        layer.held = torch.arange(slots)
        layer.top_k = min(layer.top_k, slots)


class StandInStore:
    """The gate rows and stand-ins of all experts of a converted model: small, read once, sliced per client."""

    def __init__(self, model: PreTrainedModel) -> None:
        assert isinstance(model, SamMixin)
        self.wg = [layer.sam.wg.detach().clone() for layer in model.sam_layers]
        self.core = [layer.sam.core_SQp.clone() for layer in model.sam_layers]


@torch.no_grad()
def hold_experts(layers: Sequence[SamFFN], cores: Sequence[Tensor], held: Sequence[Sequence[int]]) -> None:
    """Declare which experts the slots hold, ascending ids with the roots first, and fill in their stand-ins; `cores`
    (E, Q, p) of each layer are all experts'."""
    for index, (layer, experts) in enumerate(zip(layers, held, strict=True)):
        assert len(experts) == layer.slots and list(experts[: layer.roots]) == list(range(layer.roots))
        layer.held = torch.tensor(list(experts))
        layer.sam.core_SQp.copy_(cores[index][layer.held])
        layer.sam.core_all_Qp.copy_(cores[index].sum(0))


class Checkpoint:
    """The weights of a saved model, read by slices: only the rows asked for leave the disk."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = json.loads(index.read_text())["weight_map"]
        else:
            with safe_open(self.folder / "model.safetensors", "pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._files

    def read(self, parameter: str) -> Tensor:
        """A parameter as a whole."""
        with safe_open(self.folder / self._files[parameter], "pt") as file:
            return file.get_tensor(parameter)

    def read_experts(self, field: Field, experts: Sequence[int], target: Tensor) -> None:
        """Copy the field's slices of `experts` into the slots of `target`, which has as many, in order."""
        with safe_open(self.folder / self._files[field.parameter], "pt") as file:
            stored = file.get_slice(field.parameter)
            for slot, expert in enumerate(experts):
                for block in range(field.blocks):
                    start = (block * field.num_experts + expert) * field.width
                    rows = slice(start, start + field.width)
                    part = stored[rows] if field.dim == 0 else stored[:, rows]
                    place = (block * len(experts) + slot) * field.width
                    target.narrow(field.dim, place, field.width).copy_(part)
