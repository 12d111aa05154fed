"""From documents to rows of tokens, and the order in which training sees the rows.

B rows, S tokens a row (`sequence`). Documents follow each other with one separator between them; no token is
padding, so every token counts in a loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from sam_ds.errors import InputError

_DOCUMENTS = 64  # tokenized at a time: a limit of tokens must not cost the whole corpus


def pack(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence: int, *,
         limit_tokens: int | None = None) -> np.ndarray:
    """Token ids (B, S) int64: the documents joined by the eos token (bos, if there is no eos), cut into rows.

    limit_tokens: at most this many tokens are used, from the front. What fills no row is dropped.
    Raises `InputError` for a tokenizer with neither token, and if there is not one full row.
    """
    if sequence < 1:
        raise InputError(f"sequence must be at least 1 token, got {sequence}")
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if separator is None:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r} has neither an eos nor a bos token to "
                         f"part documents with: set one (tokenizer.eos_token = ...)")
    ids: list[int] = []
    for start in range(0, len(texts), _DOCUMENTS):
        if limit_tokens is not None and len(ids) >= limit_tokens:
            break
        # verbose: a document longer than the model's context is no mistake here, it is cut into rows.
        encoded = tokenizer(list(texts[start:start + _DOCUMENTS]), add_special_tokens=False, verbose=False)
        for document in encoded["input_ids"]:
            if document:
                ids += [separator, *document] if ids else document
    ids = ids[:limit_tokens]
    rows = len(ids) // sequence
    if rows == 0:
        limit = "" if limit_tokens is None else f" (limit_tokens = {limit_tokens})"
        raise InputError(f"{len(texts)} documents give {len(ids)} tokens{limit}, one row needs sequence = "
                         f"{sequence}: give more text or a shorter sequence")
    return np.array(ids[:rows * sequence], dtype=np.int64).reshape(rows, sequence)


def batch_indices(rows: int, batch: int, steps: int, seed: Sequence[int]) -> np.ndarray:
    """Row numbers (steps, batch) int64: permutations of all rows, one after the other, cut into batches.

    A row is seen again only when all have been seen. The same integers give the same numbers.
    """
    assert rows >= 1 and batch >= 1 and steps >= 0, (rows, batch, steps)
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // rows)
    order = [rng.permutation(rows) for _ in range(epochs)]
    return np.concatenate([np.empty(0, dtype=np.int64), *order])[:steps * batch].reshape(steps, batch)
