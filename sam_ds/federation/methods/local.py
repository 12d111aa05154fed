"""Local training: every client trains low-rank adapters of its own, and nothing is averaged.

What a client gains by taking part is what it has more than here; of no paper. The adapters are FedIT's (2305.05644),
both factors trained. A domain is scored with the models of the clients that hold mostly its documents
(`judging.evaluate`): the figure is of clients on their own domain. The model that the run leaves behind is the one it
began with.

Deviations: a client trains in the rounds it is drawn in, as under every other method, and its optimizer begins anew.
"""

from __future__ import annotations

from dataclasses import replace

from sam_ds.config import RunConfig
from sam_ds.federation.methods import fedit
from sam_ds.federation.methods.base import refuse


def _configure(config: RunConfig) -> RunConfig:
    refuse(config, "is of an average", robust="none", server_optimizer="sgd")
    return config


METHOD = replace(fedit.METHOD, stays=lambda unit: True, configure=_configure)
