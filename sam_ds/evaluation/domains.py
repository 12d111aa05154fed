"""Perplexity of each domain and the headline: exp of the mean over domains of the token-weighted NLL.

A mean over domains, not over tokens: the largest domain must not speak for the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sam_ds.errors import InputError
from sam_ds.evaluation.nll import token_nll

_DOCUMENTS = 64  # tokenized at a time: a limit of tokens must not cost the whole corpus


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Sum of the negative log-likelihoods in nats over `tokens` predicted tokens."""

    nll_sum: float
    tokens: int

    @property
    def nll(self) -> float:
        """Nats a token."""
        return self.nll_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats a token); inf where a float cannot hold it."""
        return exp(self.nll)


def exp(nats: float) -> float:
    """e^nats, inf instead of an overflow: a model that has diverged still gets its line in the table."""
    return math.exp(nats) if nats < 700.0 else math.inf if nats == nats else math.nan


def document_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None
) -> list[Tensor]:
    """One (length,) int64 tensor a document, with the special tokens that the tokenizer itself adds.

    max_tokens: read documents until there are this many tokens, and cut the last one.
    """
    ids: list[Tensor] = []
    left = math.inf if max_tokens is None else max_tokens
    for start in range(0, len(texts), _DOCUMENTS):
        # verbose: a document longer than the model's context is no mistake here, it is read in windows.
        encoded = tokenizer(list(texts[start : start + _DOCUMENTS]), verbose=False)["input_ids"]
        for document in encoded:
            if left <= 0:
                return ids
            ids.append(torch.tensor(document[: int(min(left, len(document)))], dtype=torch.int64))
            left -= len(document)
    return ids


def perplexity_by_domain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus_texts: Mapping[str, Sequence[str]],
    *,
    window: int,
    stride: int,
    batch: int,
    max_tokens: int | None,
) -> dict[str, DomainScore]:
    """The score of every domain, of at most `max_tokens` tokens each.

    Raises InputError for a domain without text.
    """
    scores = {}
    for domain, texts in corpus_texts.items():
        ids = document_ids(tokenizer, texts, max_tokens)
        nll_sum, tokens = token_nll(model, ids, window=window, stride=stride, batch=batch)
        if tokens == 0:
            raise InputError(
                f"domain {domain!r} has no document of two tokens or more to evaluate: give it text "
                f"or leave it out"
            )
        scores[domain] = DomainScore(nll_sum=nll_sum, tokens=tokens)
    return scores


def headline(scores: Mapping[str, DomainScore], domains: Iterable[str]) -> float:
    """exp(mean over these domains of the nats a token). Raises InputError without a domain."""
    losses = [scores[domain].nll for domain in domains]
    if not losses:
        raise InputError("a headline perplexity needs at least one domain")
    return exp(math.fsum(losses) / len(losses))
