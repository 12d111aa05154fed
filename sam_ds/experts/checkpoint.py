"""Models on disk and on the hub: converted ones, and any, whose loaders fail in many ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from sam_ds.errors import InputError
from sam_ds.experts.config import CONFIG_FILE, SamConfig
from sam_ds.experts.model import TENSOR_FILE, VERSION, add_assembler, inject_layers, wrap_ffns
from sam_ds.experts.surgery import find_ffns


@contextmanager
def readable(model: str) -> Iterator[None]:
    """Whatever transformers raises inside for a folder or hub id that is no model becomes one line of InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"model {model!r} cannot be loaded: {line}") from error


def from_pretrained(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a folder that a converted model's `save_pretrained` wrote; `kwargs` go to AutoModelForCausalLM.

    Raises InputError where the folder, or one of the two SAM files in it, is missing or does not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file() or not (folder / TENSOR_FILE).is_file():
        raise InputError(f"{folder} is not a converted model: it has no {CONFIG_FILE} with {TENSOR_FILE}; "
                         "convert the plain model with get_sam_model first")  # fmt: skip
    record = json.loads((folder / CONFIG_FILE).read_text())
    if record["version"] != VERSION:
        raise InputError(f"{folder / CONFIG_FILE} has version {record['version']}, this package reads {VERSION}")
    config = SamConfig.from_dict(record["sam"])
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    ffns = find_ffns(model)
    with safe_open(folder / TENSOR_FILE, "pt") as tensors:
        own = {name: tensors.get_tensor(name) for name in tensors.keys()}
    inject_layers(model, config, ffns, wrap_ffns(ffns, config), own.pop("lost_LK", None))
    model.sam_affinity_LEE = own.pop("affinity_LEE")
    if any(name.startswith("sam_assembler.") for name in own):
        add_assembler(model, seed=config.seed)
    found = model.load_state_dict(own, strict=False)
    missing = [name for name in found.missing_keys if ".sam." in name or name.startswith("sam_assembler.")]
    if found.unexpected_keys or missing:
        raise InputError(f"{folder / TENSOR_FILE} does not fit {folder / CONFIG_FILE}: beyond it it has "
                         f"{found.unexpected_keys[:5]}, it lacks {missing[:5]}")  # fmt: skip
    return model


def is_converted(folder: str | Path) -> bool:
    """Whether the folder holds a converted model."""
    return (Path(folder) / CONFIG_FILE).is_file()
