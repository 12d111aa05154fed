"""`sam-ds convert MODEL OUT --calibration DATA`: a plain model in, a folder of expert graphs out.

What is cheap to refuse is refused first; OUT appears complete or not at all.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sam_ds.data.corpus import load_corpus
from sam_ds.errors import InputError
from sam_ds.evaluation.experts import describe, percent
from sam_ds.evaluation.reading import token_rows, window_of
from sam_ds.experts.checkpoint import is_converted, readable
from sam_ds.experts.config import SamConfig
from sam_ds.experts.convert import check_architecture, get_sam_model
from sam_ds.experts.distill import DistillConfig, check_distillation, distill
from sam_ds.experts.layer import STANDINS
from sam_ds.experts.model import SamMixin


def run(options: argparse.Namespace) -> int:
    """Raises InputError for what `SamConfig`, `load_corpus` and `get_sam_model` refuse, a model that cannot be read
    or is converted already, a device that there is not, and an OUT that is not empty or cannot be written."""
    config = SamConfig(**{field.name: getattr(options, field.name) for field in fields(SamConfig)})
    distillation = None
    if options.distill:
        distillation = DistillConfig(steps=options.distill, lora_rank=options.distill_lora, seed=options.seed)
        check_distillation(distillation, config.standin)
    elif options.distill_lora:
        raise InputError(f"--distill-lora {options.distill_lora} is of a distillation: give --distill STEPS too")
    device = _device(options.device)
    if options.tokens < 1:
        raise InputError(f"--tokens must be at least 1, got {options.tokens}")
    _check_target(Path(options.out))
    with readable(options.model):
        check_architecture(AutoConfig.from_pretrained(options.model), config)
    if is_converted(options.model):
        raise InputError(f"{options.model} is converted already: give the plain model, or merge this one "
                         "(from_pretrained, merge_and_unload, save_pretrained) and convert that")  # fmt: skip
    corpus = load_corpus(options.calibration, public_every=0)
    with readable(options.model):
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        plain = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    texts = {name: splits.train for name, splits in corpus.domains.items()}
    window = window_of(plain)
    ids_BS = token_rows(texts, tokenizer, window=window, tokens=options.tokens)
    with _complete(Path(options.out)) as folder:
        start = time.perf_counter()
        stored = plain.dtype
        # A CPU multiplies half precision slowly, fp16 seventy times as slowly as fp32.
        dtype = torch.float32 if device.type == "cpu" else stored
        plain = plain.to(device, dtype)  # type: ignore[arg-type]  # transformers wraps it as no method
        model = get_sam_model(plain, config, calibration=ids_BS)
        if distillation is not None:
            # Rows that it sees again it learns by heart.
            fresh = max(options.tokens, distillation.steps * distillation.rows * window)
            distill(model, token_rows(texts, tokenizer, window=window, tokens=fresh), distillation)
        seconds = time.perf_counter() - start
        _cast(model, stored)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for index, layer in enumerate(describe(model)):
        rarest, most = min(layer.usage), max(layer.usage[layer.roots :], default=1.0)
        print(f"layer {index}: {layer.summary()}, others visited by {percent(rarest)} to {percent(most)} of the tokens")
    print(f"{options.out}: {len(model.sam_layers)} layers, {ids_BS.numel()} tokens, {seconds:.1f} s")
    return 0


@torch.no_grad()
def _cast(model: SamMixin, dtype: torch.dtype) -> None:
    """To the precision of the plain model: its parameters, and stand-ins; gates and thresholds stay in fp32."""
    for name, parameter in model.named_parameters():
        if ".sam." not in name:
            parameter.data = parameter.data.to(dtype)
    for layer in model.sam_layers:
        for name in STANDINS:
            setattr(layer.sam, name, getattr(layer.sam, name).to(dtype))


def _device(name: str) -> torch.device:
    """Raises InputError for a device that this machine has not."""
    found = torch.accelerator.current_accelerator(check_available=True)
    known = ["cpu"]
    if found is not None:
        known += [found.type, *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in known:
        raise InputError(f"--device {name!r} is not on this machine, which has {', '.join(known)}")
    return torch.device(name)


def _check_target(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder: nothing is overwritten, choose another")


@contextmanager
def _complete(out: Path) -> Iterator[Path]:
    """A folder to write to beside `out`, which takes its place in one step if nothing is raised inside."""
    out = out.expanduser().resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "model"
            yield folder
            os.replace(folder, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error}") from error
