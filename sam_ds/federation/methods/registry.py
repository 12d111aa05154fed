"""The methods by name; one file each."""

from __future__ import annotations

from sam_ds.federation.methods import fedavg, fedit, sam
from sam_ds.federation.methods.base import Method

METHODS: dict[str, Method] = {"sam": sam.METHOD, "fedavg": fedavg.METHOD, "fedit": fedit.METHOD}
