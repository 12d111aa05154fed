"""The public text as rows of tokens: what the server may read.

Every domain gives the same share, to a row: the first rows to calibrate with and to describe the domain, the last to
validate on.

Legend: B rows, S tokens a row (`evaluation.window`).
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sam_ds.clients.task import REGISTRATION_TOKENS
from sam_ds.config import RunConfig
from sam_ds.data.batches import pack
from sam_ds.data.splits import Corpus

_VALIDATION_ROWS = 8


class PublicText:
    """Rows are made when they are first asked for, with an InputError where there is too little text."""

    def __init__(self, config: RunConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._corpus, self._tokenizer = config, corpus, tokenizer

    @cached_property
    def calibration(self) -> Tensor:
        """(B, S) what the base model is converted with, and stand-ins are fitted on."""
        return self._mixed(-(-self._config.sam.calibration_tokens // self._config.evaluation.window))

    @cached_property
    def validation(self) -> Tensor:
        """(B, S) of all domains, one batch."""
        return self._mixed(_VALIDATION_ROWS, last=True)

    @cached_property
    def of_domains(self) -> dict[str, Tensor]:
        """(B, S) of every domain, as many tokens as a client registers with."""
        return self._by_domain(max(1, REGISTRATION_TOKENS // self._config.evaluation.window))

    @cached_property
    def validation_of_domains(self) -> dict[str, Tensor]:
        """(B, S) of every domain, a batch each."""
        return self._by_domain(max(1, _VALIDATION_ROWS // len(self._corpus.domains)), last=True)

    def _mixed(self, rows: int, *, last: bool = False) -> Tensor:
        """So many rows, and at least one of every domain; the first ones give the rows that do not divide."""
        domains = len(self._corpus.domains)
        share, more = divmod(max(rows, domains), domains)
        parts = self._by_domain(share + bool(more), last=last).values()
        return torch.cat([part[: share + (index < more)] for index, part in enumerate(parts)])

    def _by_domain(self, rows: int, *, last: bool = False) -> dict[str, Tensor]:
        """At most so many rows of each domain's public documents, or of its valid split where it has none."""
        window, found = self._config.evaluation.window, {}
        for name, splits in self._corpus.domains.items():
            texts = splits.public or splits.valid
            packed = pack(texts[::-1] if last else texts, self._tokenizer, window, limit_tokens=rows * window)
            found[name] = torch.from_numpy(packed)
        return found
