"""Perplexity as a metric of `evaluate`, loaded by the path of this folder: `evaluate.load(path)`.

The stock metric loads the model again at every call, has no stride, and averages exp(loss) over texts of any
length; this one takes the model that is there and weights by tokens. No network is used.
"""

# evaluate reads the imports of this file with a regular expression, which does not know `import a, b`.
from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer

from sam_ds.errors import InputError
from sam_ds.evaluation.domains import document_ids, exp
from sam_ds.evaluation.nll import token_nll

_INPUTS = """
Args:
    predictions: texts, one a document.
    model: a causal LM of transformers, or the folder or hub id of one.
    tokenizer: its tokenizer; may be left out where `model` is a folder or an id.
    stride, max_length: in tokens; a long document is read in windows of `max_length`, each of which scores
        `stride` new tokens.
    batch_size: windows a forward pass.
Returns:
    perplexity = exp(nll), nll in nats a token, tokens predicted, bits_per_byte of the text they stand for.
"""


class Perplexity(evaluate.Metric):  # type: ignore[misc]  # evaluate has no annotations
    """exp of the mean negative log-likelihood of all tokens but the first of each text."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Token-weighted perplexity of texts under a causal language model.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: Any,
        tokenizer: Any = None,
        stride: int = 256,
        max_length: int = 512,
        batch_size: int = 8,
    ) -> dict[str, float]:
        if isinstance(model, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
            model = AutoModelForCausalLM.from_pretrained(model)
        if tokenizer is None:
            raise InputError("perplexity of a live model needs tokenizer=")
        ids = document_ids(tokenizer, predictions)
        nll_sum, tokens = token_nll(model, ids, window=max_length, stride=stride, batch=batch_size)
        if tokens == 0:
            raise InputError(f"none of the {len(predictions)} texts has two tokens or more")
        # The first token is not predicted, so its bytes do not count; a begin-of-text token has none.
        size = sum(
            len(text.encode()) - len(tokenizer.decode(tokens_[:1], skip_special_tokens=True).encode())
            for text, tokens_ in zip(predictions, ids, strict=True)
            if len(tokens_) >= 2
        )
        return {
            "perplexity": exp(nll_sum / tokens),
            "nll": nll_sum / tokens,
            "tokens": tokens,
            "bits_per_byte": nll_sum / math.log(2) / size if size else math.inf,
        }
