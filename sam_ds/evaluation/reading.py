"""What several commands read: texts, and rows of tokens from them.

B rows, S tokens a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sam_ds.data.corpus import READERS, load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.domains import document_ids


def texts_of(data: str) -> dict[str, tuple[str, ...]]:
    """The documents of a file, or the train documents of each domain of what `load_corpus` takes.

    Raises InputError as that does, and for a file of another kind.
    """
    file = Path(data).expanduser()
    if not file.is_file():
        return {name: splits.train for name, splits in load_corpus(data, public_every=0).domains.items()}
    if file.suffix not in READERS:
        raise InputError(f"{data} is no text that can be read: give a file of {', '.join(READERS)}, or a folder")
    return {data: tuple(text for text in READERS[file.suffix](file) if text.strip())}


def token_rows(
    texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, window: int, tokens: int
) -> Tensor:
    """(B, S) int64: about `tokens` tokens, the same share of every domain, in rows of at most `window`.

    Domains of less text than their share give what they have. Raises InputError where there is no text at all.
    """
    share = -(-tokens // len(texts))
    ids = [document for domain in texts.values() for document in document_ids(tokenizer, domain, share)]
    read = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
    if len(read) == 0:
        raise InputError(f"there is no text in {', '.join(texts)}: add some")
    # Rows of one length that leave out fewest: less than a token a row.
    rows = -(-len(read) // window)
    return read[: len(read) // rows * rows].view(rows, -1)


def typical_rows(
    texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, *, window: int, tokens: int
) -> Tensor:
    """As `token_rows`, but every 32nd row of as many times the text, or what there is: the first tokens of a book are
    not like the book."""
    rows_BS = token_rows(texts, tokenizer, window=window, tokens=32 * tokens)
    wanted = -(-tokens // rows_BS.shape[1])
    return rows_BS[:: max(1, len(rows_BS) // wanted)][:wanted]


def window_of(model: PreTrainedModel) -> int:
    """Tokens a row for reading text with `model`: 256, or its context where that is shorter."""
    return min(256, getattr(model.config, "max_position_embeddings", None) or 256)
