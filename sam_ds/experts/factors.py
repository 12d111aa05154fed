"""Frozen low-rank factors that know the text: what trains beside them can say more with as many values.

A factor that reads, A of delta W x = B A x, spans the directions in which the inputs of its matrix vary most (EVA,
Paischer et al., 2410.07170); one that writes, those in which the loss feels the layer's output most, the eigenvectors
of E[g g'] with g its gradient (in the spirit of LoRA-GA, Wang et al., 2407.05000). There a factor is where training
begins; here it stays, and what is averaged stays linear in what trains. Columns have length 1, as those drawn at random
have on average.

Legend: T tokens, d hidden, i inputs of a linear map, R rank.
"""

from __future__ import annotations

import os
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
FROZEN = (".lora.up_in", ".lora.gate_in", ".lora.down_out", ".lora.a_iR")
"""How the names of frozen factors end."""
_BATCH = 4
"""Sequences a backward pass."""
_ITERATIONS = 12


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
                loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss * len(rows_BS)
                paths = list(outputs)
                for path, gradient in zip(paths, torch.autograd.grad(loss, [outputs[p] for p in paths]), strict=True):
                    add(f"out {path}", gradient)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()

    found = {}
    for path in readers:
        for end in FROZEN:
            drawn = parameters.get(path + end)
            if drawn is not None:
                side = "out" if end == ".lora.down_out" else "in"
                factor = drawn.detach().clone()
                columns_dR = factor.t() if side == "out" else factor
                rank = min(columns_dR.shape)
                columns_dR[:, :rank] = directions(seconds[f"{side} {path}"], rank).to(factor)
                found[path + end] = factor
    return found


def directions(second_dd: Tensor, rank: int) -> Tensor:
    """(d, R) orthonormal: the eigenvectors of the largest eigenvalues, that of the largest first.

    By subspace iteration: of a large matrix, few are asked for.
    """
    second_dd = second_dd.double()
    more = min(len(second_dd), rank + 8)
    start = torch.randn(len(second_dd), more, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis_dM = start.to(second_dd.device)
    for _ in range(_ITERATIONS):
        basis_dM = torch.linalg.qr(second_dd @ basis_dM).Q
    inner = torch.linalg.eigh(basis_dM.t() @ second_dd @ basis_dM).eigenvectors
    return (basis_dM @ inner.flip(1))[:, :rank]


def save_factors(factors: Mapping[str, Tensor], folder: Path) -> None:
    """Put them beside the converted model; there whole or not at all."""
    scratch = folder / f".{FACTORS_FILE}.{os.getpid()}"
    save_file({name: value.contiguous().cpu() for name, value in factors.items()}, scratch)
    os.replace(scratch, folder / FACTORS_FILE)


def load_factors(folder: Path) -> dict[str, Tensor]:
    """Those beside the converted model; nothing where they are drawn."""
    file = folder / FACTORS_FILE
    return load_file(file) if file.is_file() else {}
