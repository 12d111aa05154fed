"""Frozen low-rank factors that know the text: what trains beside them can say more with as many values.

A factor that reads, A of delta W x = B A x, spans the directions in which the inputs of its matrix vary most (EVA,
Paischer et al., 2410.07170); one that writes, those in which the loss feels the layer's output most, the eigenvectors
of E[g g'] with g its gradient (in the spirit of LoRA-GA, Wang et al., 2407.05000). There a factor is where training
begins; here it stays, and what is averaged stays linear in what trains. Columns have length 1, as those drawn at random
have on average.

Legend: T tokens, d hidden, i inputs of a linear map, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sam_ds.experts.attention import updated_maps
from sam_ds.experts.model import SamMixin

FACTORS_FILE = "factors.safetensors"
_BATCH = 4
"""Sequences a backward pass."""


def fit_factors(model: PreTrainedModel, batches: Sequence[Tensor]) -> dict[str, Tensor]:
    """The frozen factors of a converted model that `prepare` gave low-rank updates, by the parameter's name, from token
    ids (B, S) of text; all experts visited. Where the rank exceeds the directions there are, the rest is as drawn."""
    assert isinstance(model, SamMixin)
    parameters = dict(model.named_parameters())
    layers = {path: layer for path, layer in model.named_modules() if any(layer is own for own in model.sam_layers)}
    readers: dict[str, nn.Module] = layers | updated_maps(model)
    outputs: dict[str, Tensor] = {}
    seconds: dict[str, Tensor] = {}

    def add(key: str, x: Tensor) -> None:
        x_Td = x.detach().flatten(0, -2).float()
        moment_dd = x_Td.t() @ x_Td
        seconds[key] = seconds[key] + moment_dd if key in seconds else moment_dd

    def keep(path: str, output: Tensor) -> Tensor:
        outputs[path] = output if output.requires_grad else output.detach().requires_grad_()
        return outputs[path]

    hooks: list[Any] = [
        module.register_forward_pre_hook(lambda _, args, path=path: add(f"in {path}", args[0]))
        for path, module in readers.items()
    ]
    hooks += [
        layer.register_forward_hook(lambda _, __, output, path=path: keep(path, output))
        for path, layer in layers.items()
    ]
    training = model.training
    model.eval()
    try:
        with torch.enable_grad(), model.active(model.sam_config.num_experts):
            for rows_BS in (rows_BS for ids_BS in batches for rows_BS in ids_BS.split(_BATCH)):
                ids_BS = rows_BS.to(next(model.parameters()).device)
                loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
                paths = list(outputs)
                for path, gradient in zip(paths, torch.autograd.grad(loss, [outputs[p] for p in paths]), strict=True):
                    add(f"out {path}", gradient)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()

    found = {}
    for path in readers:
        reads, writes = _directions(seconds[f"in {path}"]), None
        if path in layers:
            writes = _directions(seconds[f"out {path}"])
        for name in ("up_in", "gate_in", "down_out", "a_iR"):
            drawn = parameters.get(f"{path}.lora.{name}")
            if drawn is None:
                continue
            factor = drawn.detach().clone()
            if name == "down_out":
                assert writes is not None
                factor[: len(writes)] = writes.t()[: len(factor)].to(factor)
            else:
                factor[:, : len(reads)] = reads[:, : factor.shape[1]].to(factor)
            found[f"{path}.lora.{name}"] = factor
    return found


def _directions(second_dd: Tensor) -> Tensor:
    """(d, d) the eigenvectors as columns, that of the largest second moment first."""
    return torch.linalg.eigh(second_dd.double()).eigenvectors.flip(1)


def save_factors(factors: Mapping[str, Tensor], folder: Path) -> None:
    """Put them beside the converted model."""
    save_file({name: value.contiguous().cpu() for name, value in factors.items()}, folder / FACTORS_FILE)


def load_factors(folder: Path) -> dict[str, Tensor]:
    """Those beside the converted model; nothing where they are drawn."""
    file = folder / FACTORS_FILE
    return load_file(file) if file.is_file() else {}
