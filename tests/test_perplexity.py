"""Every token is counted once, with the context it should have; and what an FFN costs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import full_context_nll, strided_nll

import sam_ds.evaluation
from sam_ds.errors import InputError
from sam_ds.evaluation.costs import dense_flops, ffn_flops, forward_flops, training_flops
from sam_ds.evaluation.domains import DomainScore, document_ids, headline, perplexity_by_domain
from sam_ds.evaluation.nll import token_nll, windows
from sam_ds.experts.config import SamConfig


def _documents(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 97, (length,), generator=generator) for length in lengths]


@given(length=st.integers(2, 80), window=st.integers(2, 20), data=st.data())
def test_windows_score_every_token_once_with_context(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    spans = windows(length, window, stride)
    scored = [token for begin, end, first in spans for token in range(first, end)]
    assert scored == list(range(1, length))
    assert all(0 <= begin < first < end <= begin + window for begin, end, first in spans)
    # every window but the first keeps at least window - stride tokens of context
    assert all(first - begin >= max(1, window - stride) for begin, _, first in spans[1:])


@torch.no_grad()
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_one_window_is_the_full_context(family: str, batch: int, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(family)()
    documents = _documents([17, 2, 40, 9])
    nll, tokens = token_nll(model, documents, window=40, stride=20, batch=batch)
    assert tokens == 16 + 1 + 39 + 8
    assert nll == pytest.approx(sum(full_context_nll(model, ids) for ids in documents), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (8, 1), (16, 5), (2, 2)])
def test_strided_windows_are_the_slow_reference(tiny_llama: Any, window: int, stride: int) -> None:
    model = tiny_llama()
    documents = _documents([33, 8, 9, 21])
    nll, tokens = token_nll(model, documents, window=window, stride=stride, batch=4)
    assert tokens == 32 + 7 + 8 + 20
    expected = sum(strided_nll(model, ids, window, stride) for ids in documents)
    assert nll == pytest.approx(expected, rel=1e-5)


def test_more_context_is_not_the_same_number(tiny_llama: Any) -> None:
    """The comparison above can fail: windows of another size give another value."""
    model, documents = tiny_llama(), _documents([40])
    values = {token_nll(model, documents, window=w, stride=w // 2, batch=2)[0] for w in (4, 8, 40)}
    assert len(values) == 3


def test_short_documents_predict_nothing_and_the_mode_is_restored(tiny_llama: Any) -> None:
    model = tiny_llama().train()
    assert token_nll(model, _documents([0, 1]), window=8, stride=4, batch=2) == (0.0, 0)
    nll, tokens = token_nll(model, _documents([1, 5, 0]), window=8, stride=4, batch=2)
    assert tokens == 4 and nll > 0 and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("window", "stride", "batch", "message"), [
    (1, 1, 1, "window >= 2"), (8, 9, 1, "stride = 9"), (8, 0, 1, "stride = 0"), (8, 4, 0, "batch = 0"),
    (65, 4, 1, "at most 64"),
])  # fmt: skip
def test_bad_windows_are_refused(tiny_llama: Any, window: int, stride: int, batch: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        token_nll(tiny_llama(), _documents([9]), window=window, stride=stride, batch=batch)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes, cut to 97 ids, so that one ASCII letter is one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = [letter for letter in letters if letter.isascii()][:94] + ["Ġ"]
    model = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(kept)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=model)


def test_a_limit_of_tokens_cuts_the_last_document(tokenizer: Any) -> None:
    texts = ["a" * 10, "b" * 10, "c" * 10]
    assert [len(ids) for ids in document_ids(tokenizer, texts)] == [10, 10, 10]
    assert [len(ids) for ids in document_ids(tokenizer, texts, 14)] == [10, 4]
    assert [len(ids) for ids in document_ids(tokenizer, texts * 50, 1000)] == [10] * 100


def test_domains_are_scored_apart_and_meet_in_the_headline(tiny_llama: Any, tokenizer: Any) -> None:
    model = tiny_llama()
    texts = {"one": ["hello there", "general"], "two": ["some other words that are longer"]}
    scores = perplexity_by_domain(model, tokenizer, texts, window=16, stride=8, batch=4, max_tokens=None)
    assert {name: score.tokens for name, score in scores.items()} == {"one": 10 + 6, "two": 31}
    nll, tokens = token_nll(model, document_ids(tokenizer, texts["one"]), window=16, stride=8, batch=1)
    assert scores["one"].perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    expected = math.sqrt(scores["one"].perplexity * scores["two"].perplexity)
    assert headline(scores, ["one", "two"]) == pytest.approx(expected)
    cut = perplexity_by_domain(model, tokenizer, texts, window=16, stride=8, batch=4, max_tokens=5)
    assert {score.tokens for score in cut.values()} == {4}


def test_domains_without_text_are_refused(tiny_llama: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="'empty'"):
        perplexity_by_domain(
            tiny_llama(), tokenizer, {"empty": ["a"]}, window=8, stride=4, batch=1, max_tokens=None
        )
    with pytest.raises(InputError, match="at least one domain"):
        headline({}, [])


def test_a_diverged_model_still_has_a_perplexity() -> None:
    assert DomainScore(nll_sum=1e6, tokens=10).perplexity == math.inf
    assert math.isnan(DomainScore(nll_sum=math.nan, tokens=10).perplexity)


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module as a user loads it, offline, with evaluate's caches in a scratch folder."""
    import evaluate

    monkeypatch.setattr("evaluate.config.HF_EVALUATE_OFFLINE", True)
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    path = Path(os.fspath(sam_ds.evaluation.__path__[0])) / "perplexity"
    yield evaluate.load(str(path), cache_dir=str(tmp_path / "cache"))


def test_the_metric_loads_offline_and_weighs_by_tokens(
    metric: Any, tiny_llama: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny_llama()
    texts = ["hello there", "x", "some other words"]
    result = metric.compute(
        predictions=texts, model=model, tokenizer=tokenizer, max_length=8, stride=4, batch_size=2
    )
    nll, tokens = token_nll(model, document_ids(tokenizer, texts), window=8, stride=4, batch=1)
    assert result["tokens"] == tokens == 10 + 15
    assert result["nll"] == pytest.approx(nll / tokens, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(nll / math.log(2) / (10 + 15), rel=1e-6)

    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    from_folder = metric.compute(predictions=texts, model=str(tmp_path / "model"), max_length=8, stride=4)
    assert from_folder["nll"] == pytest.approx(result["nll"], rel=1e-5)

    with pytest.raises(InputError, match="needs tokenizer="):
        metric.compute(predictions=texts, model=model)
    with pytest.raises(InputError, match="two tokens or more"):
        metric.compute(predictions=["x"], model=model, tokenizer=tokenizer, max_length=8, stride=4)


def flops(active: float, *, gated: bool = True, held: int | None = None, **changes: Any) -> float:
    """Of a layer with d 10, m 64, E 8, two roots (16 neurons) and stand-ins of rank 3."""
    settings = {"num_experts": 8, "top_k": 4, "roots": 2, "standin_rank": 3, "router": "mean_key", "standin": "none"}
    return ffn_flops(SamConfig(**settings | changes), hidden=10, neurons=64, gated=gated, active=active, held=held)


def test_ffn_flops_by_hand() -> None:
    """A gated dense layer is 2 * 3 * 10 * 64 = 3840."""
    assert flops(8, standin="linear") == dense_flops(hidden=10, neurons=64, gated=True) == 3840
    assert flops(8, gated=False) == 2560
    assert flops(2) == 960 + 160
    # V x, the cores of all experts, the output basis; the means have no V, and an output direction for
    # each expert that is not a root.
    assert flops(2, standin="mean") == 960 + 160 + 2 * (8 * 6 + 6 * 10)
    assert flops(2, standin="linear") == 960 + 160 + 2 * (3 * 10 + 8 * 4 * 9 + 9 * 10)
    assert flops(2.5) == 1200 + 160


def test_flops_of_a_client_that_holds_some_experts_by_hand() -> None:
    """Who visits all it holds asks no gate; one core stands in for all that it does not hold."""
    assert flops(3, held=3) == 1440
    assert flops(3, held=3, standin="linear") == 1440 + 2 * (3 * 10 + 4 * 9 + 9 * 10)
    assert flops(2, held=3, standin="linear") == flops(2, standin="linear")
    assert flops(8, held=8, standin="linear") == 3840
    with pytest.raises(InputError, match="active must be between 0 and 3, the experts that are held, got 4"):
        flops(4, held=3)
    with pytest.raises(InputError, match="held must be between 0 and num_experts = 8, got 9"):
        flops(4, held=9)


def test_message_flops_by_hand() -> None:
    """A message is 10 multiply-adds; 4 visited have 6 pairs, but the two roots exchange nothing."""
    assert flops(4, semantics="message") - flops(4) == 2 * 10 * 5
    assert flops(8, semantics="message", density=0.5) - flops(8) == 2 * 10 * 27 / 2
    assert flops(2, semantics="message") == flops(2)


def test_router_flops_by_hand() -> None:
    def router(name: str, *, gated: bool = True) -> float:
        return flops(2, router=name, router_rank=5, gated=gated) - flops(2, gated=gated) + 2 * 8 * 10

    assert router("mean_key") == 2 * 8 * 10
    assert router("linear") == 2 * 8 * 11
    assert router("roots") == 2 * 8 * (10 + 16 + 1)
    assert router("low_rank") == 2 * (10 * 5 + 8 * 6)
    assert router("mlp") == 2 * (10 * 5 + 8 * 6)
    assert router("representative") == 2 * (10 * 16 + 8 * 8)
    assert router("representative", gated=False) == 2 * (10 * 8 + 8 * 8)


def test_model_flops_by_hand() -> None:
    assert forward_flops(other_parameters=100, ffn=50.0) == 250
    assert training_flops(other_parameters=100, ffn=50.0, frozen=False) == 750
    assert training_flops(other_parameters=100, ffn=50.0, frozen=True) == 500


def test_bad_costs_are_refused() -> None:
    with pytest.raises(InputError, match="between 0 and 8, the experts that are held, got 9"):
        flops(9)
