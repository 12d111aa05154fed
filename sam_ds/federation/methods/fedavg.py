"""FedAvg: every client trains and sends the whole dense model; the server takes the example-weighted mean.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", AISTATS 2017, arXiv 1602.05629, algorithm 1.

Deviations: local steps are counted in steps, not epochs, so that every method does the same work; the local
optimizer is the run's (AdamW with warm-up), not SGD; device tiers are ignored, as the method must.
"""

from __future__ import annotations

from sam_ds.config import TierSection
from sam_ds.federation.methods.base import Method, adapt_nothing, plan_dense, weighted_mean


def _train(tier: TierSection) -> str:
    return "all"


METHOD = Method(plan=plan_dense, train=_train, aggregate=weighted_mean, adapt=adapt_nothing, sparse=False)
