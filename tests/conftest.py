"""What every test shares: fixed seeds, one thread, the CPU where there is no CUDA, and tiny random models."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
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


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def sharp(request: pytest.FixtureRequest, tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> Any:
    """A model whose FFN weights are ten times the usual: neurons that are on and off, as in a trained one."""
    model = tiny_llama() if request.param == "llama" else tiny_gpt2()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name and parameter.dim() == 2:
                parameter.mul_(10)
            if name.endswith(".c_fc.bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny corpus, dense model and converted model on disk: `in_process.Tiny`."""
    from in_process import write_tiny

    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process group of one gloo rank, as a worker group."""
    import torch.distributed as dist

    from sam_ds.clients.task import WorkerGroup

    os.environ.setdefault("LOCAL_RANK", "0")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield WorkerGroup([0], dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def new_worker(tiny: Any, one_rank: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`new_worker(*overrides)` -> the `Worker` of the tiny run with these keys, on the tiny conversion or another; made
    once for the same keys."""
    from sam_ds.clients.worker import Worker
    from sam_ds.federation.methods.registry import configured
    from sam_ds.federation.setup import clients_of, corpus_of

    made: dict[tuple[Any, ...], Any] = {}

    def make(*overrides: str, base: Path | None = None) -> Any:
        if (base, *overrides) not in made:
            config = configured(tiny.config(tmp_path_factory.mktemp("unused"), *overrides))
            clients = clients_of(config, corpus_of(config))
            made[base, *overrides] = Worker(config, base or tiny.base, clients, [one_rank])
        return made[base, *overrides]

    yield make
    for worker in made.values():
        worker.close()


@pytest.fixture
def federate(tiny: Any, new_worker: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`federate(*overrides, worker=(), start=True, **grid)` -> the tiny `Federation` with these keys, which has run;
    `worker`: the keys that its clients know."""
    from in_process import Federation

    count = iter(range(100))

    def run(*overrides: str, worker: tuple[str, ...] = (), start: bool = True, **grid: Any) -> Any:
        config = tiny.config(tmp_path / str(next(count)), *overrides)
        federation = Federation.of(config, tiny.base, new_worker(*worker), **grid)
        return federation.start() if start else federation

    return run
