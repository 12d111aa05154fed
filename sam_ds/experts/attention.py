"""Low-rank updates beside the experts: of the attention projections, shared by all clients.

Every linear map of the decoder layers that is no FFN's gets delta W = scale * A B. A is frozen and drawn from the run's
seed, B starts at zero and trains, so that an average of B is the average of the updates (FFA-LoRA, 2403.12313), as of
the experts' slices. A map keeps its own weight under its own name and becomes one of a subclass that adds the update.

Legend: i inputs, o outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sam_ds.errors import InputError
from sam_ds.experts.surgery import FFN, LinearMap, map_names, map_shape


class LoraMap(nn.Module):
    """The low-rank update of one linear map as a whole."""

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = alpha / rank
        self.a_iR = nn.Parameter(torch.randn(inputs, rank, generator=generator) / inputs**0.5)
        self.b_Ro = nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., i) -> (..., o): what the update adds."""
        # It trains in fp32 beside weights in half precision.
        return self.scale * (x @ self.a_iR.to(x.dtype)) @ self.b_Ro.to(x.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """(i, o) what to add to the weight."""
        return self.scale * self.a_iR @ self.b_Ro


if TYPE_CHECKING:
    # A map with an update is one through its own class, which comes after this.
    _Base = nn.Module
else:
    _Base = object


class Updated(_Base):
    """A linear map that adds an update: the first base of a subclass of the map's own class."""

    lora: LoraMap

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return y + self.lora(x)


@cache
def _updated(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (Updated, cls), {"__module__": cls.__module__})


def add_update(linear: nn.Module, lora: LoraMap) -> None:
    """Let the map, in place, add this update."""
    linear.__class__ = _updated(type(linear))  # type: ignore[arg-type]  # mypy takes a class's hash for its instances'
    linear.lora = lora


def drop_update(linear: Updated) -> None:
    """Undo `add_update`."""
    linear.__class__ = type(linear).__mro__[2]
    del linear.lora


def updated_maps(model: nn.Module) -> dict[str, Updated]:
    """The maps with an update, by their paths, in order of depth."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Updated)}


def attention_maps(model: nn.Module, ffns: Sequence[FFN]) -> dict[str, LinearMap]:
    """Every linear map in the decoder layers of `model`, converted or not, that is no FFN's: path -> map, in order of
    depth. Raises InputError where there is none."""
    own = {id(ffn.linear(name)) for ffn in ffns for name in map_names(ffn)}
    sites = tuple(f"{ffn.site}." for ffn in ffns)
    stacks = (f"{path}." for path, module in model.named_modules() if isinstance(module, nn.ModuleList))
    layers = next((path for path in stacks if all(ffn.path.startswith(path) for ffn in ffns)), None)
    found = {
        path: module for path, module in model.named_modules()
        if layers is not None and path.startswith(layers) and not path.startswith(sites) and id(module) not in own
        and isinstance(module, LinearMap)
    }  # fmt: skip
    if not found:
        raise InputError(f"train.attention_rank: {type(model).__name__} has no linear maps in its decoder layers but "
                         "those of its feed-forward networks; give 0")  # fmt: skip
    return found


def attention_update(linear: nn.Module, *, rank: int, alpha: float, seed: int) -> LoraMap:
    """A fresh update for this map, where the map is."""
    lora = LoraMap(*map_shape(linear), rank=rank, alpha=alpha, seed=seed)
    return lora.to(linear.get_parameter("weight").device)
