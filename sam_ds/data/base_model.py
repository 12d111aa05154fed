"""The embedded base model: a small Llama, pretrained where it is used: a first run needs no download.

It has read the public documents of a corpus and no others. It is made once per (corpus, recipe, seed, torch)
and kept under `$SAM_DS_CACHE` or `~/.cache/sam_ds`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from sam_ds.data.batches import batch_indices, pack
from sam_ds.data.splits import Corpus
from sam_ds.errors import InputError

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
_FINISHED = "recipe.json"  # written last
_FILES = (_FINISHED, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseRecipe:
    """Shape and training of the base model: 2.2 M parameters, 0.16 M tokens as it stands.

    Short on purpose: there must be something left for a federation of a few minutes to learn.
    """

    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    intermediate_size: int = 512  # m
    context: int = 512  # tokens
    steps: int = 40
    batch: int = 32  # rows
    sequence: int = 128  # tokens a row
    lr: float = 4e-3
    warmup_steps: int = 10
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm

    def __post_init__(self) -> None:
        if self.intermediate_size % 64:
            raise InputError(f"intermediate_size must be a multiple of 64 (slices of experts), "
                             f"got {self.intermediate_size}")
        if self.sequence > self.context:
            raise InputError(f"sequence must be at most context = {self.context}, got {self.sequence}")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` pieces: 256 bytes, three special tokens, merges. It loses nothing.

    Raises `InputError` for a vocabulary without room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise InputError(f"vocab_size must be at least {len(alphabet) + 3} (bytes and special tokens), "
                         f"got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=sorted(alphabet),
        show_progress=False))
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD,
        clean_up_tokenization_spaces=False)
    return made


def embedded_base_model(corpus: Corpus, *, seed: int = 0, recipe: BaseRecipe | None = None) -> Path:
    """The folder of the base model of `corpus`, trained if need be; `Auto*.from_pretrained` loads it.

    The first call takes up to a minute on two cores; later ones return at once. Several processes may
    call it: whoever finishes first leaves the folder, and a folder is never seen half-written. Raises
    `InputError` for a corpus without (enough) public text and for a cache that cannot be written.
    """
    recipe = recipe or BaseRecipe()
    if not corpus.public:
        raise InputError(f"model = 'embedded' is trained on public documents, and the corpus "
                         f"{corpus.name!r} has none: set federation.public_every, or name a model")
    made_from = {"corpus": corpus.fingerprint, "recipe": asdict(recipe), "seed": seed,
                 "torch": str(torch.__version__)}
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("SAM_DS_CACHE") or Path.home() / ".cache" / "sam_ds").expanduser()
    folder = cache / f"base-{key}"
    if _finished(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".base-", dir=cache) as scratch:
            written = Path(scratch) / "model"
            tokenizer = train_tokenizer(corpus.public, recipe.vocab_size)
            tokenizer.model_max_length = recipe.context
            _pretrain(corpus.public, tokenizer, recipe, seed).save_pretrained(written)
            tokenizer.save_pretrained(written)
            (written / _FINISHED).write_text(json.dumps(made_from, indent=2) + "\n", encoding="utf-8")
            _put(written, folder)
    except OSError as error:
        raise InputError(f"the cache {str(cache)!r} cannot be written ({error}): set SAM_DS_CACHE to a "
                         f"folder that can") from error
    return folder


def _finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _put(written: Path, folder: Path) -> None:
    """Move a complete folder into its place, unless another process has just done so."""
    for file in written.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    if folder.exists() and not _finished(folder):
        shutil.rmtree(folder)
    try:
        os.replace(written, folder)
    except OSError:  # a folder that is not empty is not replaced
        if not _finished(folder):
            raise


def base_config(recipe: BaseRecipe) -> LlamaConfig:
    """The architecture, before there is a tokenizer."""
    return LlamaConfig(
        vocab_size=recipe.vocab_size, hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers, num_attention_heads=recipe.num_heads,
        max_position_embeddings=recipe.context, tie_word_embeddings=True)


def _pretrain(texts: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe,
              seed: int) -> LlamaForCausalLM:
    """AdamW, linear warm-up, cosine to zero; the seed decides the weights and the order of the rows."""
    config = base_config(recipe)
    config.update({"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id,
                   "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id})
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.train()
    rows_BS = torch.from_numpy(pack(texts, tokenizer, recipe.sequence))
    order = batch_indices(len(rows_BS), recipe.batch, recipe.steps, [seed])
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95),
                                  weight_decay=recipe.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
    bar = tqdm(order, desc=f"base model, {model.num_parameters() / 1e6:.1f} M parameters", unit="step")
    for step, indices in enumerate(bar):
        batch_BS = rows_BS[torch.from_numpy(indices)]
        loss = model(input_ids=batch_BS, labels=batch_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == recipe.steps - 1:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model
