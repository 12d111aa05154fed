"""Negative log-likelihood of documents, every token counted once.

A document longer than the window is read in windows that overlap, and a window scores only the tokens that no
window before it has scored. The usual strided recipe averages the windows' mean losses and weighs each by a
token too many; here the sum is kept, and a document of N tokens has N - 1 predictions.

Legend: B windows, S tokens of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from sam_ds.errors import InputError


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) for a document: ids[begin:end] is read, the tokens from `first` on are scored.

    The first window scores all but its first token, each of the others `stride` more; `stride = window` still
    leaves one token of overlap, for a token without context cannot be predicted.
    """
    step = min(stride, window - 1)
    spans = [(0, min(window, length), 1)]
    while (end := spans[-1][1]) < length:
        begin = spans[-1][0] + step
        spans.append((begin, min(begin + window, length), end))
    return spans


@torch.no_grad()
def token_nll(
    model: PreTrainedModel, ids: Sequence[Tensor], *, window: int, stride: int, batch: int
) -> tuple[float, int]:
    """Sum of the negative log-likelihoods in nats, and the number of tokens predicted.

    `ids`: one (length,) int64 tensor a document; documents of fewer than 2 tokens predict nothing. The model
    is read in eval mode and left in the mode it came in. Raises InputError for a window that is no window, or
    that is longer than the positions the model knows.
    """
    if window < 2 or not 1 <= stride <= window or batch < 1:
        raise InputError(
            f"perplexity needs window >= 2, 1 <= stride <= window and batch >= 1, got window = {window}, "
            f"stride = {stride}, batch = {batch}"
        )
    positions = getattr(model.config, "max_position_embeddings", None)  # not every architecture has a limit
    if positions is not None and window > positions:
        raise InputError(
            f"the evaluation window of {window} tokens is longer than the model's {positions} positions: "
            f"use a window of at most {positions}"
        )
    spans = [
        (document, *span)
        for document, tokens in enumerate(ids)
        if len(tokens) >= 2
        for span in windows(len(tokens), window, stride)
    ]
    # Longest first: little padding, and what does not fit into memory fails at once.
    spans.sort(key=lambda span: span[1] - span[2])
    device = next(model.parameters()).device
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(spans), batch):
            chosen = spans[start : start + batch]
            longest = max(end - begin for _, begin, end, _ in chosen)
            ids_BS = torch.zeros(len(chosen), longest, dtype=torch.int64)
            mask_BS = torch.zeros_like(ids_BS)
            for row, (document, begin, end, _) in enumerate(chosen):
                ids_BS[row, : end - begin] = ids[document][begin:end]
                mask_BS[row, : end - begin] = 1
            ids_BS, mask_BS = ids_BS.to(device), mask_BS.to(device)
            logits_BSV = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
            for row, (_, begin, end, first) in enumerate(chosen):
                # One row in fp32 at a time: the vocabulary is the largest dimension there is.
                scored = slice(first - begin - 1, end - begin - 1)
                losses = F.cross_entropy(
                    logits_BSV[row, scored].float(),
                    ids_BS[row, first - begin : end - begin],
                    reduction="none",
                )
                total += losses.sum(dtype=torch.float64)
                count += end - first
    finally:
        model.train(was_training)
    return float(total), count
