"""Whether a layer computes what the FFN it was made from does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam_ds.errors import InputError
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.surgery import FFN


@torch.no_grad()
def check_layers(model: nn.Module, ffns: Sequence[FFN], layers: Sequence[SamFFN], ids_BS: Tensor) -> None:
    """Run the model, in eval mode, and compare each FFN with the layer made from it, all experts visited.

    An FFN is known by the shapes of its parts; what it does with them is its own code. Raises InputError naming the
    first that is not down(act(gate(x)) * up(x)), or that no forward pass reaches.
    """
    inputs: dict[int, tuple[Tensor, ...]] = {}
    compared = set()
    handles = []

    def keep(index: int, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args

    def compare(index: int, output: Tensor) -> None:
        ffn, layer, (x, *residual) = ffns[index], layers[index], inputs[index]
        ours = layer._dense(x.reshape(-1, x.shape[-1])).view(x.shape)
        bias = ffn.biases()[2]
        theirs = output - residual[0] if residual else output
        error = (ours - theirs if bias is None else ours + bias - theirs).float().norm()
        rounding = torch.finfo(x.dtype).eps * output.float().norm()
        compared.add(index)
        # What is not finite is reported with the calibration text, which it may come from.
        if error > 0.05 * theirs.float().norm() + 4 * rounding:
            inner = f"act({ffn.up}(x))" if ffn.gate is None else f"act({ffn.gate}(x)) * {ffn.up}(x)"
            raise InputError(
                f"{ffn.path} does not compute {ffn.down}({inner}), as its parts suggest (relative error "
                f"{error / theirs.float().norm():.2g}); sam_ds/experts/surgery.py must learn what it does"
            )

    for index, ffn in enumerate(ffns):
        handles.append(ffn.entry.register_forward_pre_hook(lambda _, args, index=index: keep(index, args)))
        handles.append(ffn.exit.register_forward_hook(lambda _, args, output, index=index: compare(index, output)))
    try:
        model(input_ids=ids_BS.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, ffn in enumerate(ffns):
        if index not in compared:
            raise InputError(f"{ffn.path} has the parts of a feed-forward network, but no forward pass reaches it")
