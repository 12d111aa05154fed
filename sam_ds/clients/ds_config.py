"""A tier's DeepSpeed configuration: a file of `ds_configs/` or the user's own, with its "auto" filled from the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sam_ds.config import RunConfig, TierSection, ds_config_path
from sam_ds.errors import InputError

_BUCKET = 200_000_000
"""Elements that ranks exchange at once."""


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
    """The tier's DeepSpeed configuration with every "auto" filled from the run and the elements that train.

    Raises InputError for a value that contradicts the run.
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
    zero = values.setdefault("zero_optimization", {})
    if zero.get("reduce_bucket_size", "auto") == "auto":
        # DeepSpeed makes its buckets whole, however little there is to put in.
        zero["reduce_bucket_size"] = min(trained, _BUCKET)
    if tier.precision != "fp32" and not zero.get("stage", 0):
        # Its fp32 copies of what trains are nowhere to be found when the next client's weights come.
        raise InputError(f"{tier.ds_config}: ZeRO stage 0 with precision = {tier.precision!r} would train every client "
                         "from the one before; give a stage from 1 to 3 (cpu_zero2.json), or precision = 'fp32'")
    return values
