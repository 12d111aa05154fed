"""What every test shares: fixed seeds, one thread, the CPU where there is no CUDA, and tiny random models."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from typing import Any

# Both are read when numpy, torch and deepspeed are imported, so they are set before anything else is.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A busy machine makes a slow example, not a wrong one; and a suite that passed must pass again.
settings.register_profile("sam_ds", deadline=None, derandomize=True)
settings.load_profile("sam_ds")


@pytest.fixture(autouse=True)
def _seeds() -> Iterator[None]:
    """The same global state before every test, in any order and on its own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """`tiny_llama(seed=0, **overrides)` -> a fresh random `LlamaForCausalLM` in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()

    return build


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., Any]:
    """`tiny_gpt2(seed=0, **overrides)` -> a fresh random `GPT2LMHeadModel` in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def build(seed: int = 0, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": 97, "n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
            "bos_token_id": 1, "eos_token_id": 2,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(**{**settings, **overrides})).eval()

    return build
