"""The methods by name; one file each."""

from __future__ import annotations

from sam_ds.config import RunConfig
from sam_ds.federation.methods import central, fedavg, fedit, local, sam, static_mask
from sam_ds.federation.methods.base import Method

METHODS: dict[str, Method] = {
    "sam": sam.METHOD, "fedavg": fedavg.METHOD, "fedit": fedit.METHOD, "static_mask": static_mask.METHOD,
    "local": local.METHOD, "central": central.METHOD,
}  # fmt: skip


def configured(config: RunConfig) -> RunConfig:
    """The run as its method needs it. Raises InputError where that contradicts what is set."""
    return METHODS[config.method].configure(config)
