"""Finding the feed-forward networks of a Hugging Face causal LM: the one place that knows module names.

An FFN is an up-projection (d -> m), optionally a gate projection of the same shape, an activation, and a down
projection (m -> d), each map a `torch.nn.Linear` or GPT-2's transposed `Conv1D`. It is found by these shapes:

    a module of its own   Llama's, GPT-2's, ... `mlp`; Bloom's takes the residual and returns the sum
    fused                 Phi-3's `gate_up_proj` is gate and up in one map: its first and its last m outputs
    inline                OPT has no such module: up, activation and down stand in the decoder layer itself

Every weight is handed out in one orientation, whatever the module stores:

    up, gate: (d, m)      down: (m, d)      m FFN neurons, d hidden size

as *views*: writing to them writes the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sam_ds.errors import InputError

_ACTIVATIONS = ("act_fn", "act", "activation_fn", "activation_function", "gelu_impl")
_MOE = ("experts", "router")
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LinearMap = nn.Linear | Conv1D
"""A map that experts are slices of, or that gets a low-rank update."""


@dataclass(frozen=True, kw_only=True)
class FFN:
    """One feed-forward network: where it is and which children of its module do what."""

    path: str
    """Of `module` in the model, for example ``model.layers.0.mlp``."""
    module: nn.Module
    """The module whose children `up`, `gate` and `down` are."""
    up: str
    gate: str | None
    """None: not gated. The same as `up`: fused."""
    down: str
    activation: Callable[[Tensor], Tensor]
    dropout: nn.Module | None = None
    """What the module drops out of its output."""
    inline: str | None = None
    """Where `module` is a decoder layer with more in it than the FFN: the name it calls the activation by."""

    def linear(self, name: str) -> LinearMap:
        """The child that is called so: one of `up`, `gate` and `down`."""
        child: LinearMap = getattr(self.module, name)
        return child

    @property
    def site(self) -> str:
        """Path of what a replacement of the FFN takes the place of: the module, or an inline FFN's activation."""
        return self.path if self.inline is None else f"{self.path}.{self.inline}"

    @property
    def entry(self) -> nn.Module:
        """The module that is called with the FFN's input."""
        return self.module if self.inline is None else self.linear(self.up)

    @property
    def exit(self) -> nn.Module:
        """The module that returns the FFN's output."""
        return self.module if self.inline is None else self.linear(self.down)

    @property
    def hidden(self) -> int:
        """d, the hidden size."""
        return map_shape(self.linear(self.down))[1]

    @property
    def neurons(self) -> int:
        """m, the number of FFN neurons."""
        return map_shape(self.linear(self.down))[0]

    @property
    def sharded(self) -> bool:
        """Whether ZeRO-3 has cut the weights into shards: there is nothing to see of them until it gathers them."""
        return any(hasattr(parameter, "ds_shape") for parameter in self.module.parameters())

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Views up (d, m), gate (d, m) or None, down (m, d)."""
        up_dm, down_md = (matrix(self.linear(name)) for name in (self.up, self.down))
        if self.gate is None:
            return up_dm, None, down_md
        if self.gate == self.up:
            m = self.neurons
            return up_dm[:, m:], up_dm[:, :m], down_md
        return up_dm, matrix(self.linear(self.gate)), down_md

    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Views up (m,), gate (m,), down (d,); None where there is none."""
        up, down = (self.linear(name).bias for name in (self.up, self.down))
        if self.gate is None:
            return up, None, down
        if self.gate == self.up:
            m = self.neurons
            return (None, None, down) if up is None else (up[m:], up[:m], down)
        return up, self.linear(self.gate).bias, down


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear map as an (inputs, outputs) view: ``y = x @ matrix(linear)``.

    Raises InputError where something has been put around it since the layer was found: an adapter.
    """
    if isinstance(linear, Conv1D):
        return linear.weight
    if not isinstance(linear, nn.Linear):
        raise InputError(f"a feed-forward map is now a {type(linear).__module__}.{type(linear).__name__}: experts are "
                         "slices of its weights and would pass an adapter by; put adapters on the attention only "
                         "(target_modules)")  # fmt: skip
    return linear.weight.t()


def find_ffns(model: nn.Module) -> list[FFN]:
    """Every feed-forward network of `model`, in order of depth.

    Raises InputError where none is found (saying what was looked for), where the model already has experts, and where
    weights cannot be put in another order: quantized, computed from others, or used in two places.
    """
    for name, _ in model.named_modules():
        if name.rsplit(".", 1)[-1] in _MOE:
            raise InputError(f"model has {name!r}: it is already a mixture of experts; give its dense original")
    # A module that stands in two places comes twice.
    modules = model.named_modules(remove_duplicate=False)
    found = [ffn for path, module in modules if (ffn := _match(path, module)) is not None]
    if not found:
        raise InputError(
            f"model {type(model).__name__} has no feed-forward network this package knows: looked for modules with "
            "two or three linear children, d -> m and m -> d (such as up_proj/gate_proj/down_proj, "
            f"gate_up_proj/down_proj, fc1/fc2, c_fc/c_proj), and an activation (such as {'/'.join(_ACTIVATIONS)})"
        )
    owners: dict[int, str] = {}
    for ffn in found:
        for name in map_names(ffn):
            linear = ffn.linear(name)
            _check_weight(f"{ffn.path}.{name}", linear)
            other = owners.setdefault(id(linear.weight), f"{ffn.path}.{name}")
            if other != f"{ffn.path}.{name}":
                raise InputError(f"{ffn.path}.{name} has the same weight as {other}: its neurons cannot be put in an "
                                 "order of its own; give a model whose layers share nothing")  # fmt: skip
    return found


def _match(path: str, module: nn.Module) -> FFN | None:
    children = dict(module.named_children())
    linears = {name: map_shape(child) for name, child in children.items() if isinstance(child, LinearMap)}
    roles, activation = _roles(linears), _activation(module)
    adapted = next((name for name, child in children.items() if hasattr(child, "base_layer")), None)
    if adapted is not None and activation in _ACTIVATIONS:
        raise InputError(f"{path}.{adapted} carries an adapter ({type(children[adapted]).__module__}): merge it into "
                         "the weights first (merge_and_unload of PEFT)")  # fmt: skip
    if roles is None or activation is None:
        return None
    up, gate, down = roles
    # A module with attention in it is a decoder layer.
    others = [child for name, child in children.items() if name not in linears and name != activation]
    inline = any(isinstance(inner, LinearMap) for child in others for inner in child.modules())
    bare = _elementwise(activation, children.get(activation))
    if inline and (gate is not None or not bare):
        return None
    rate = getattr(module, "activation_dropout", 0.0)
    if inline and rate:
        raise InputError(f"{path} drops out {rate} of its activations, which experts cannot; "
                         "set activation_dropout=0.0 in the model's configuration")  # fmt: skip
    return FFN(
        path=path, module=module, up=up, gate=gate, down=down, activation=getattr(module, activation),
        dropout=None if inline else _dropout(module), inline=activation if inline else None,
    )  # fmt: skip


def map_shape(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs), not read from the weight: that of a quantized map is packed, that of ZeRO-3 away."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    assert isinstance(linear, Conv1D)
    return getattr(linear.weight, "ds_shape", linear.weight.shape)[0], linear.nf


def _roles(shapes: dict[str, tuple[int, int]]) -> tuple[str, str | None, str] | None:
    """(up, gate, down) of a module's linear maps by their shapes; where d = m, by the order they are made in."""
    names = list(shapes)
    if len(names) == 2:
        (d, m), down = shapes[names[0]], shapes[names[1]]
        if down == (m, d):
            return names[0], None, names[1]
        return (names[0], names[0], names[1]) if (2 * down[0], down[1]) == (m, d) else None
    if len(names) == 3:
        downs = [n for n in names if all(shapes[other] == shapes[n][::-1] for other in names if other != n)]
        if downs:
            inner = [n for n in names if n != downs[-1]]
            gate = next((n for n in inner if "gate" in n), inner[0])
            return next(n for n in inner if n != gate), gate, downs[-1]
    return None


def _activation(module: nn.Module) -> str | None:
    """By a known name, or the only child that could be one: without parameters, buffers or children; or a function."""
    known = vars(module) | dict(module.named_children())
    for name in _ACTIVATIONS:
        if callable(known.get(name)):
            return name
    plain = [name for name, value in known.items() if _elementwise(name, value)]
    return plain[0] if len(plain) == 1 else None


def _elementwise(name: str, value: object) -> bool:
    if isinstance(value, nn.Module):
        own = [*value.parameters(), *value.buffers(), *value.children()]
        return not own and not isinstance(value, nn.Identity | nn.modules.dropout._DropoutNd)
    return isinstance(value, FunctionType | BuiltinFunctionType) and name != "forward"


def _dropout(module: nn.Module) -> nn.Module | None:
    """What an FFN module drops out of its output: a child, or a rate that it applies itself."""
    child = next((c for c in module.children() if isinstance(c, nn.Dropout)), None)
    if child is not None:
        return child
    # Falcon's MLP carries `hidden_dropout` too, but its layer applies it; where the MLP adds the residual, it does.
    name = "hidden_dropout" if "residual" in inspect.signature(module.forward).parameters else "residual_dropout"
    rate = getattr(module, name, None)
    return nn.Dropout(rate) if isinstance(rate, float | int) else None


def _check_weight(path: str, linear: LinearMap) -> None:
    weight = linear._parameters.get("weight")
    inputs, outputs = map_shape(linear)
    if type(weight) is nn.Parameter and weight.dtype in _FLOATS and (
        hasattr(weight, "ds_shape") or matrix(linear).shape == (inputs, outputs)
    ):
        return
    kind = "computed from other parameters" if weight is None else (
        f"a {type(weight).__name__} of {weight.dtype}, shape {tuple(weight.shape)}"
    )  # fmt: skip
    raise InputError(
        f"{path}.weight is {kind}: only plain floating-point weights can be put in another order; load the model in "
        "full or half precision, convert it, and quantize the folder it saves"
    )


def map_names(ffn: FFN) -> list[str]:
    """The children that are the FFN's linear maps, each once."""
    return list(dict.fromkeys(name for name in (ffn.up, ffn.gate, ffn.down) if name is not None))


@torch.no_grad()
def permute_neurons(ffn: FFN, order_m: Tensor) -> None:
    """Put the FFN's neurons in the given order, in place. The function it computes stays the same to rounding."""
    assert torch.equal(order_m.sort().values, torch.arange(ffn.neurons, device=order_m.device)), (
        "a neuron would be dropped or doubled"
    )
    up_dm, gate_dm, down_md = ffn.weights()
    for inner_dm in (up_dm, gate_dm):
        if inner_dm is not None:
            inner_dm.copy_(inner_dm[:, order_m])
    for bias_m in ffn.biases()[:2]:
        if bias_m is not None:
            bias_m.copy_(bias_m[order_m])
    down_md.copy_(down_md[order_m])


@torch.no_grad()
def resize(ffn: FFN, neurons: int) -> None:
    """Replace the FFN's linear maps, in place, by empty ones of `neurons` neurons."""
    before = ffn.neurons
    for name in map_names(ffn):
        old = ffn.linear(name)
        inputs, outputs = matrix(old).shape
        inputs, outputs = (neurons, outputs) if name == ffn.down else (inputs, outputs // before * neurons)
        with torch.device("meta"):
            conv = isinstance(old, Conv1D)
            new: LinearMap = Conv1D(outputs, inputs) if conv else nn.Linear(inputs, outputs, bias=old.bias is not None)
        new = new.to(old.weight.dtype).to_empty(device=old.weight.device)
        if name == ffn.down and old.bias is not None:
            new.bias.copy_(old.bias)
        if "forward" in vars(old):
            vars(new)["forward"] = vars(old)["forward"]
        for own, parameter in old.named_parameters():
            new.get_parameter(own).requires_grad_(parameter.requires_grad)
        setattr(ffn.module, name, new)


def install(model: nn.Module, ffn: FFN, layer: nn.Module) -> nn.Module:
    """Put `layer` in the FFN's place; returns what was there, for `uninstall`.

    Inline, the layer stands where the activation stood, and what comes before and after it passes its input on.
    """
    original = model.get_submodule(ffn.site)
    if ffn.inline is not None:
        for name in (ffn.up, ffn.down):
            vars(ffn.linear(name))["forward"] = _pass_on
    _set(model, ffn.site, layer)
    return original


def uninstall(model: nn.Module, site: str, original: nn.Module, ffn: FFN) -> None:
    """Undo `install`; `ffn` is the layer's own view of itself, whose weights may have been replaced since."""
    if ffn.inline is not None:
        for name in (ffn.up, ffn.down):
            del ffn.linear(name).forward
    hand_back(original, ffn)
    _set(model, site, original)


def hand_back(original: nn.Module, ffn: FFN) -> None:
    """Give the linear maps, as they are now, to the module whose place an FFN's layer took: its old ones go."""
    if ffn.inline is None:
        for name, _ in original.named_children():
            setattr(original, name, ffn.linear(name))


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _pass_on(x: Tensor) -> Tensor:
    return x
