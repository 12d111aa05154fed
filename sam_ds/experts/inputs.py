"""What each layer of a model is given on the calibration text, in order of depth.

Every layer is fitted on the prefix already converted, so the text cannot run through the model once for all of them.
Run anew for each, the prefixes of L layers are L^2 / 2 layers; here a pass for a layer goes on where the last one
stopped: the decoder layers before that hand their input on untouched, and the one it stopped in is given what it was
given then. The model's own code calls them, with the masks and positions it has for each. Two runs of each layer.

Legend: B sequences, S tokens a sequence, T tokens, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sam_ds.errors import InputError

DISCOVERY_TOKENS = 8192
"""Enough to tell which neurons work together; the fits use all."""
_BATCH = 16
"""Sequences a forward pass of the model."""


class _Reached(Exception):
    """The layer's input is known; the rest of the model need not run."""


def check_text(model: PreTrainedModel, batches: Sequence[Tensor], *, what: str = "calibration text") -> None:
    """Raise InputError for no text at all and for token ids that the model has not."""
    if not any(ids_BS.numel() for ids_BS in batches):
        raise InputError(f"the {what} is empty: give rows of token ids")
    for ids_BS in batches:
        if ids_BS.dim() != 2:
            raise InputError(f"{what} has ids of shape {tuple(ids_BS.shape)}; give rows, (sequences, tokens)")
    lowest = min(int(ids_BS.min()) for ids_BS in batches if ids_BS.numel())
    if lowest < 0:
        raise InputError(f"{what} has token id {lowest}; give input ids, not labels with a padding mark")
    largest = max(int(ids_BS.max()) for ids_BS in batches if ids_BS.numel())
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    if largest >= vocabulary:
        raise InputError(f"{what} has token id {largest}, the model's vocabulary ends at {vocabulary - 1}: "
                         "is it the model's own tokenizer?")  # fmt: skip


def evenly(batches: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Sequences of about so many tokens in all, taken evenly: text is often ordered by where it comes from."""
    step = max(1, sum(ids_BS.numel() for ids_BS in batches) // tokens)
    kept = []
    skip = 0
    for ids_BS in batches:
        kept.append(ids_BS[skip::step])
        # Counted on from batch to batch: a batch may be a single row.
        skip = (skip - len(ids_BS)) % step
    return [ids_BS for ids_BS in kept if ids_BS.numel()]


def layer_inputs(model: nn.Module, modules: Sequence[nn.Module], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """(T, d) fp32 inputs of each of `modules`, which are given in order of depth; the model must be in eval mode.

    What a module computes may be changed between its own inputs and the next one's, which are of the changed model;
    nothing before it may.
    """
    blocks, places = _blocks(model, modules)
    rows = [rows_BS for ids_BS in batches if ids_BS.numel() for rows_BS in ids_BS.split(_BATCH)]
    kept: list[Tensor] = []
    """What the block that the last pass stopped in was given, row batch by row batch."""
    sizes: dict[int, int] = {}
    """How many values a block returns, if it returns a tuple."""
    resumed: int | None = None
    for module, place in zip(modules, places, strict=True):
        x_Td, kept = _pass(model, module, rows, blocks, place, kept, resumed, sizes)
        resumed = place
        yield x_Td


def _blocks(model: nn.Module, modules: Sequence[nn.Module]) -> tuple[list[nn.Module], list[int | None]]:
    """The decoder layers, and the index of the one that each of `modules` is in: all in one list, or none is known."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            place_of = {id(inner): index for index, block in enumerate(stack) for inner in block.modules()}
            if all(id(module) in place_of for module in modules):
                return list(stack), [place_of[id(module)] for module in modules]
    return [], [None] * len(modules)


@torch.no_grad()
def _pass(
    model: nn.Module, module: nn.Module, rows: Sequence[Tensor], blocks: Sequence[nn.Module], place: int | None,
    kept: Sequence[Tensor], resumed: int | None, sizes: dict[int, int],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The inputs of `module` over all rows, and those of its block, from where `kept` was given to block `resumed`."""
    seen: list[Tensor] = []
    given: list[Tensor] = []

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = len(seen)
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == resumed:
            hidden = kept[batch]
            args, kwargs = ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
        if index == place:
            given.append(hidden)
        return args, kwargs

    def leave(index: int, output: Any) -> None:
        if isinstance(output, tuple):
            sizes[index] = len(output)

    def catch(args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach().reshape(-1, args[0].shape[-1]).float())
        raise _Reached

    handles = [module.register_forward_pre_hook(lambda _, args: catch(args))]
    skipped = blocks[: resumed or 0]
    before = [vars(block).get("forward") for block in skipped]
    try:
        for index, block in enumerate(blocks):
            if index in (resumed, place):
                handles.append(
                    # Before the module's own, where block and module are one.
                    block.register_forward_pre_hook(
                        lambda _, args, kwargs, index=index: enter(index, args, kwargs), with_kwargs=True, prepend=True
                    )
                )
            handles.append(block.register_forward_hook(lambda _, __, output, index=index: leave(index, output)))
        for index, block in enumerate(skipped):
            block.forward = _hand_on(sizes.get(index))
        for rows_BS in rows:
            try:
                model(input_ids=rows_BS.to(next(model.parameters()).device), use_cache=False)
            except _Reached:
                pass
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward
    assert len(seen) == len(rows), "no forward pass reaches the layer"
    return torch.cat(seen), given


def _hand_on(size: int | None) -> Any:
    """A block's forward that returns what it is given, in the form that the block returns its output in."""

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if size is None else (hidden_states, *[None] * (size - 1))

    return forward
