"""Models on disk and on the hub: converted ones, and any, whose loaders fail in many ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import CONFIG_NAME, cached_file

from sam_ds.errors import InputError
from sam_ds.experts.config import CONFIG_FILE, SamConfig
from sam_ds.experts.model import (
    TENSOR_FILE,
    VERSION,
    SamMixin,
    add_assembler,
    assembler_prior,
    inject_layers,
    is_marked,
    wrap_ffns,
)
from sam_ds.experts.surgery import find_ffns
from sam_ds.graph.dag import check_graph

_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies", "subfolder")


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


def from_pretrained(name: str | Path, **kwargs: Any) -> SamMixin:
    """Load what a converted model's `save_pretrained` wrote: a folder, or the id of its repository on the hub.

    `kwargs` go to AutoModelForCausalLM; `revision`, `token` and their like say which repository, for all its files.
    Raises InputError where one of the two SAM files is missing or does not fit, holds a graph with a cycle or an expert
    that cannot be reached, or a plain model has been saved since.
    """
    config_file, tensor_file = _sam_files(name, {key: kwargs[key] for key in _HUB if key in kwargs})
    config = _read_config(config_file)
    plain = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    ffns = find_ffns(plain)
    model = inject_layers(plain, config, ffns, wrap_ffns(ffns, config))
    _fill(model, tensor_file)
    return model


def restore_sam(model: SamMixin, folder: str | Path) -> None:
    """Put what SAM adds to the converted model in this folder into one converted alike; the weights are left alone.

    Raises InputError as `from_pretrained` does, and where the two were not converted with the same configuration.
    """
    config_file, tensor_file = _sam_files(Path(folder), {})
    config = _read_config(config_file)
    if config != model.sam_config:
        raise InputError(f"{folder} was converted with {config}, the model with {model.sam_config}: load the model "
                         f"with from_pretrained({str(folder)!r}) instead")  # fmt: skip
    _fill(model, tensor_file)


def _read_config(config_file: Path) -> SamConfig:
    record = json.loads(config_file.read_text())
    if record["version"] != VERSION:
        raise InputError(f"{config_file} has version {record['version']}, this package reads {VERSION}")
    return SamConfig.from_dict(record["sam"])


def _fill(model: SamMixin, tensor_file: Path) -> None:
    with safe_open(tensor_file, "pt") as tensors:
        own = {name: tensors.get_tensor(name) for name in tensors.keys()}
    for name, mask_SS in own.items():
        if name.endswith(".adjacency_SS"):
            if mask_SS.dtype != torch.bool:
                raise InputError(f"{tensor_file}, {name}: a graph is bool, this is {mask_SS.dtype}")
            try:
                check_graph(mask_SS.numpy(), model.sam_config.roots)
            except InputError as error:
                raise InputError(f"{tensor_file}, {name}: {error}") from error
    lost_LK = own.pop("lost_LK", None)
    model.sam_affinity_LEE = own.pop("affinity_LEE")
    if any(name.startswith("sam_assembler.") for name in own) and model.sam_assembler is None:
        add_assembler(model, seed=model.sam_config.seed)
    elif model.sam_assembler is not None:
        model.sam_assembler.prior_LEE.copy_(assembler_prior(model.sam_affinity_LEE))
    found = model.load_state_dict(own, strict=False)
    missing = [name for name in found.missing_keys if ".sam." in name or name.startswith("sam_assembler.")]
    if found.unexpected_keys or missing:
        raise InputError(f"{tensor_file} does not fit its {CONFIG_FILE}: beyond it it has {found.unexpected_keys[:5]}, "
                         f"it lacks {missing[:5]}")  # fmt: skip
    model.allot(lost_LK)


def is_converted(name: str | Path) -> bool:
    """Whether a folder, or a repository on the hub, holds a converted model."""
    try:
        _sam_files(name, {})
    except InputError:
        return False
    return True


def fingerprint(folder: Path) -> str:
    """SHA-256 of what was fitted when the model in this folder was converted, and so of the experts' order, without
    reading the weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("model"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _sam_files(name: str | Path, hub: dict[str, Any]) -> tuple[Path, Path]:
    """The two files that a converted model has beside a plain one's, downloaded where they are not here.

    Raises InputError where they cannot be found, or lie there still beside a plain model.
    """
    try:
        # A name that is no folder is an id on the hub, but a path never is.
        if isinstance(name, Path) and not name.is_dir():
            raise OSError("there is no such folder")
        config_file, tensor_file = (cached_file(name, file, **hub) for file in (CONFIG_FILE, TENSOR_FILE))
        plain_file = cached_file(name, CONFIG_NAME, **hub)
    except OSError as error:
        raise InputError(f"{name} is not a converted model: {str(error).splitlines()[0]}; give a folder or hub id that "
                         "save_pretrained of a converted model wrote, or convert the plain model with "
                         "get_sam_model") from error  # fmt: skip
    if plain_file is None or not is_marked(Path(plain_file)):
        raise InputError(f"{name} is not a converted model any more: a plain model has been saved over it; load it "
                         f"with AutoModelForCausalLM and delete {CONFIG_FILE} and {TENSOR_FILE}, which are of the "
                         "model before")  # fmt: skip
    assert config_file is not None and tensor_file is not None, "what is missing raises OSError"
    return Path(config_file), Path(tensor_file)
