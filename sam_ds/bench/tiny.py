"""A corpus, a model and settings so small that a federated round takes a fraction of a second; all of it is the real
thing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sam_ds.config import RunConfig, load_config
from sam_ds.data.base_model import train_tokenizer
from sam_ds.federation.run import prepare

DOMAINS = ("gardens", "numbers", "ships")
WORDS = {
    "gardens": "rose soil leaf root water bloom seed hedge path moss fern",
    "numbers": "one two three add seven equals minus half twice count zero",
    "ships": "sail mast harbour anchor tide deck crew north wind keel rope",
}
SETTINGS = (
    "sam.num_experts=8", "sam.top_k=4", "sam.roots=2", "sam.standin_rank=4", "sam.calibration_tokens=512",
    "federation.rounds=2", "federation.clients=6", "federation.clients_per_round=3", "federation.edges=14",
    "federation.edit_every=2", "federation.min_offered=20", "federation.edit_tolerance=0.05",
    "train.steps=2", "train.batch=4", "train.sequence=16", "train.warmup_steps=1", "train.lora_rank=4",
    "evaluation.window=32", "evaluation.stride=16", "evaluation.max_tokens=128", "evaluation.test_tokens=128",
    "tiers.small.experts=4", "tiers.medium.experts=6", "tiers.large.experts=8", "runtime.threads=1",
)  # fmt: skip
"""Three tiers, two clients of each domain; a round takes a fraction of a second."""


def write_corpus(folder: Path, domains: Iterable[str] = DOMAINS) -> Path:
    """Three small domains of different words, as jsonl."""
    for index, domain in enumerate(domains):
        rng = np.random.default_rng(index)
        words = WORDS[domain].split()
        home = folder / domain
        home.mkdir(parents=True)
        for split, documents in (("train", 24), ("valid", 4), ("test", 4)):
            texts = [" ".join(rng.choice(words, size=24)) for _ in range(documents)]
            (home / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def write_model(folder: Path, corpus: Path, *, neurons: int = 64) -> Path:
    """A random Llama of 2 layers and its tokenizer."""
    files = sorted(corpus.glob("*/train.jsonl"))
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.model_max_length = 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=neurons, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
                initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What is on disk: a corpus, a dense model, and a run folder whose `base/` is the converted model."""

    corpus: Path
    model: Path
    base: Path

    def config(self, out: Path, *overrides: str) -> RunConfig:
        """The tiny run with some keys changed."""
        return load_config(None, [*SETTINGS, f"model={self.model}", f"data={self.corpus}", f"out={out}", *overrides])


def write_tiny(root: Path) -> Tiny:
    """Corpus, model and conversion in this folder."""
    corpus = write_corpus(root / "corpus")
    model = write_model(root / "model", corpus)
    config = load_config(None, [*SETTINGS, f"model={model}", f"data={corpus}", f"out={root / 'run'}"])
    return Tiny(corpus=corpus, model=model, base=prepare(config))
