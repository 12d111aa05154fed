"""A tier's DeepSpeed configuration: a file of `ds_configs/` or the user's own, with its "auto" filled from the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam_ds.config import RunConfig, TierSection, ds_config_path
from sam_ds.errors import InputError

_SIZES = {
    "reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000, "sub_group_size": 1_000_000_000,
}  # fmt: skip
"""Elements of zero_optimization that decide memory, and DeepSpeed's defaults."""
_OFFLOADS = ("offload_optimizer", "offload_param")


def read_ds_config(name: str) -> dict[str, Any]:
    """The JSON of a tier, as it is in its file. Raises InputError where it is not JSON."""
    path = Path(ds_config_path(name))
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"DeepSpeed configuration {name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"DeepSpeed configuration {name}: must be a JSON object")
    return value


def ds_config(tier: TierSection, config: RunConfig, trained: int) -> dict[str, Any]:
    """The tier's DeepSpeed configuration: "auto" filled from the run, or with DeepSpeed's default where that is a size,
    and no bucket larger than the elements that train, for DeepSpeed makes them whole.

    Raises InputError for a value that contradicts the run, or that DeepSpeed does not know.
    """
    filled = {
        "train_micro_batch_size_per_gpu": config.train.batch // config.ranks_of(tier),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.clip,
        "bf16.enabled": tier.precision != "fp32",
    }
    values = read_ds_config(tier.ds_config)
    for key, value in filled.items():
        *outer, last = key.split(".")
        section = values
        for name in outer:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise InputError(f"{tier.ds_config}: {name} = {section!r} must be an object; leave it out, or write "
                                 f"{{{last!r}: \"auto\"}}")  # fmt: skip
        given = section.get(last, "auto")
        if given not in ("auto", value):
            raise InputError(f"{tier.ds_config}: {key} = {given} contradicts the run's {value}; write \"auto\"")
        section[last] = value
    values.pop("train_batch_size", None)
    zero = values["zero_optimization"] = _zero(tier.ds_config, values.get("zero_optimization", {}))
    zero["reduce_bucket_size"] = min(trained, zero["reduce_bucket_size"])
    if tier.precision != "fp32" and not zero["stage"]:
        # Its fp32 copies of what trains are nowhere to be found when the next client's weights come.
        raise InputError(f"{tier.ds_config}: ZeRO stage 0 with precision = {tier.precision!r} would train every client "
                         "from the one before; give a stage from 1 to 3 (cpu_zero2.json), or precision = 'fp32'")
    return values


def _zero(file: str, section: Any) -> dict[str, Any]:
    """`zero_optimization` with what decides memory filled in and checked."""
    if not isinstance(section, dict):
        raise InputError(f"{file}: zero_optimization = {section!r} must be an object, such as {{'stage': 2}}")
    zero: dict[str, Any] = {"stage": 0} | section
    if type(zero["stage"]) is not int or not 0 <= zero["stage"] <= 3:
        raise InputError(f"{file}: zero_optimization.stage = {zero['stage']!r} must be 0, 1, 2 or 3")
    for name, default in _SIZES.items():
        size = zero.get(name, "auto")
        if size != "auto" and (type(size) not in (int, float) or size < 1):
            raise InputError(f"{file}: zero_optimization.{name} = {size!r} must be a number of elements, or \"auto\"")
        zero[name] = default if size == "auto" else int(size)
    for name in _OFFLOADS:
        if not isinstance(zero.get(name) or {}, dict):
            raise InputError(f"{file}: zero_optimization.{name} = {zero[name]!r} must be an object, such as "
                             "{'device': 'cpu'}")
    return zero


def offloads(zero: dict[str, Any], what: str) -> bool:
    """Whether the `optimizer` or the weights (`param`) are not on the device."""
    return (zero.get(f"offload_{what}") or {}).get("device", "none") not in (None, "none")
