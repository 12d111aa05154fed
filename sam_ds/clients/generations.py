"""Generations of low-rank updates: every so many rounds they are merged and their frozen factors drawn anew.

A factor that never trains bounds what rows of rank R can say; with a new one the next rows say something else (ReLoRA,
Lialin et al., 2307.05695, there within one training run). Which generation a round is of, server and clients know from
the round's number. The weights that a generation's updates were merged into are a file beside the run's base model, on
storage that all see. On a client they are rounded to its precision, and quantized anew in 4 bits: there the function
changes a little.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sam_ds.config import RunConfig
from sam_ds.errors import InputError
from sam_ds.experts.attention import Updated, attention_update
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.units import lora_seed


def generation(config: RunConfig, round_: int) -> int:
    """How many redraws come before this round."""
    every = config.train.redraw_every
    return (round_ - 1) // every if every else 0


def factor_seed(config: RunConfig, generation: int) -> int:
    """What a generation's frozen factors are drawn from; of a CPU generator's seed only 32 bits count."""
    return config.seed + 104_729 * generation


def check_generation(config: RunConfig, base: Path, finished: int, seed: int | None) -> None:
    """Raises InputError where a run that has finished so many rounds, and draws its next factors from `seed`, cannot go
    on with this configuration: other redraws or another seed, or the generation's weights are gone or damaged."""
    due = generation(config, finished + 1)
    if seed is not None and seed != factor_seed(config, due):
        raise InputError(f"train.redraw_every = {config.train.redraw_every} and seed = {config.seed} are not those of "
                         f"the run's {finished} rounds; resume with its own")
    if due:
        file = weights_folder(base, due) / "model.safetensors"
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"the weights of round {finished + 1} on, {file}, cannot be read ({error}); delete the "
                             "checkpoints since the redraw before it to resume from an older one") from error


def weights_folder(base: Path, generation: int) -> Path:
    """Where the weights of a generation are; of the first, the base model itself."""
    return base.parent / "redrawn" / f"{generation:05d}" if generation else base


def drop_before(base: Path, generation: int) -> None:
    """Delete the weights of all generations before this one; the base model stays."""
    for folder in (base.parent / "redrawn").glob("[0-9]" * 5):
        if int(folder.name) < generation:
            shutil.rmtree(folder)


def frozen_factors(
    layers: Mapping[str, SamFFN], maps: Mapping[str, Updated], config: RunConfig, generation: int
) -> Iterator[tuple[str, Tensor]]:
    """The factors that the clients of a generation share, by the parameter's name; layers and maps by their paths, in
    order of depth."""
    settings, seed = config.train, factor_seed(config, generation)
    for index, (path, layer) in enumerate(layers.items()):
        slices = LoraSlices(
            hidden=layer.ffn.hidden, neurons=0, gated=layer.ffn.gate is not None, rank=settings.lora_rank,
            alpha=settings.lora_alpha, seed=lora_seed(seed, index),
        )  # fmt: skip
        for name, value in slices.named_parameters():
            if not name.endswith("_rows"):
                yield f"{path}.lora.{name}", value.detach()
    for index, (path, linear) in enumerate(maps.items(), len(layers)):
        rank, alpha = settings.attention_rank, settings.lora_alpha
        update = attention_update(linear, rank=rank, alpha=alpha, seed=lora_seed(seed, index))
        yield f"{path}.lora.a_iR", update.a_iR.detach()
