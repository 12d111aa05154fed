"""Finding the feed-forward networks of a Hugging Face causal LM: the one place that knows module names.

An FFN is a module with an up-projection (d -> m), optionally a gate projection of the same shape, and a down
projection (m -> d), each a `torch.nn.Linear` or GPT-2's transposed `Conv1D`. Every weight is handed out in one
orientation, whatever the module stores:

    up, gate: (d, m)      down: (m, d)      m FFN neurons, d hidden size

as *views*: writing to them writes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sam_ds.errors import InputError

# (up, gate, down) as the families call them: Llama and its kin; GPT-2; Phi, OPT-like MLP modules; GPT-NeoX.
_NAMES: tuple[tuple[str, str | None, str], ...] = (
    ("up_proj", "gate_proj", "down_proj"),
    ("c_fc", None, "c_proj"),
    ("fc1", None, "fc2"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
    ("up_proj", None, "down_proj"),
)
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation_function")


@dataclass(frozen=True, kw_only=True)
class FFN:
    """One feed-forward network: where it is and which of its children do what."""

    path: str
    """Module path in the model, for example ``model.layers.0.mlp``."""
    module: nn.Module
    up: str
    gate: str | None
    down: str
    activation: Callable[[Tensor], Tensor]
    dropout: str | None

    @property
    def hidden(self) -> int:
        """d, the hidden size."""
        return matrix(self.module.get_submodule(self.up)).shape[0]

    @property
    def neurons(self) -> int:
        """m, the number of FFN neurons."""
        return matrix(self.module.get_submodule(self.up)).shape[1]


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear map as an (inputs, outputs) view: ``y = x @ matrix(linear)``."""
    if isinstance(linear, Conv1D):
        return linear.weight
    assert isinstance(linear, nn.Linear)
    return linear.weight.t()


def find_ffns(model: nn.Module) -> list[FFN]:
    """Every feed-forward network of `model`, in order of depth.

    Raises InputError where none is found (saying what was looked for), or where the model already has experts.
    """
    for name, _ in model.named_modules():
        if name.rsplit(".", 1)[-1] == "experts":
            raise InputError(f"model has {name!r}: it is already a mixture of experts; give its dense original")
    found = [ffn for path, module in model.named_modules() for ffn in _match(path, module)]
    if not found:
        wanted = ", ".join("/".join(n for n in names if n) for names in _NAMES)
        raise InputError(
            f"model {type(model).__name__} has no feed-forward network this package knows: looked for modules with "
            f"linear children named {wanted}"
        )
    return found


def _match(path: str, module: nn.Module) -> Iterator[FFN]:
    children = dict(module.named_children())
    for up, gate, down in _NAMES:
        names = [up, down] if gate is None else [up, gate, down]
        if not all(isinstance(children.get(name), nn.Linear | Conv1D) for name in names):
            continue
        shape = matrix(children[up]).shape
        if tuple(matrix(children[down]).shape) != (shape[1], shape[0]):
            continue
        if gate is not None and matrix(children[gate]).shape != shape:
            continue
        known = vars(module) | children
        activation = next((known[name] for name in _ACTIVATIONS if callable(known.get(name))), None)
        if activation is None:
            raise InputError(f"{path} has no activation under any of the names {', '.join(_ACTIVATIONS)}")
        yield FFN(
            path=path, module=module, up=up, gate=gate, down=down, activation=activation,
            dropout="dropout" if isinstance(children.get("dropout"), nn.Dropout) else None,
        )  # fmt: skip
        return


@torch.no_grad()
def permute_neurons(ffn: FFN, order_m: Tensor) -> None:
    """Put the FFN's neurons in the given order, in place. The function it computes stays the same to rounding."""
    assert torch.equal(order_m.sort().values, torch.arange(ffn.neurons, device=order_m.device)), (
        "a neuron would be dropped or doubled"
    )
    for name in (ffn.up, ffn.gate):
        if name is None:
            continue
        linear = ffn.module.get_submodule(name)
        matrix(linear).copy_(matrix(linear)[:, order_m].clone())
        if linear.bias is not None:
            linear.bias.copy_(linear.bias[order_m].clone())
    down = matrix(ffn.module.get_submodule(ffn.down))
    down.copy_(down[order_m].clone())


@torch.no_grad()
def shrink(ffn: FFN, neurons: int) -> None:
    """Replace the FFN's linear maps, in place, by empty ones of `neurons` neurons: the slots of a client's model."""
    for name in (ffn.up, ffn.gate, ffn.down):
        if name is None:
            continue
        old = ffn.module.get_submodule(name)
        inputs, outputs = matrix(old).shape
        inputs, outputs = (neurons, outputs) if name == ffn.down else (inputs, neurons)
        if isinstance(old, Conv1D):
            new: nn.Module = Conv1D(outputs, inputs).to(old.weight.dtype)
        else:
            new = nn.Linear(inputs, outputs, bias=old.bias is not None, dtype=old.weight.dtype)
        if name == ffn.down and old.bias is not None:
            new.bias.copy_(old.bias)
        setattr(ffn.module, name, new)
