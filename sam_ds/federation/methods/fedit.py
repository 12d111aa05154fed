"""FedIT: FedAvg over LoRA adapters; both factors are trained and averaged on their own.

Zhang, Vahidian, Kuo, Li, Zhang, Yu, Zhou, Wang, Chen, "Towards Building the Federated GPT: Federated Instruction
Tuning", ICASSP 2024, arXiv 2305.05644. The mean of products is not the product of the means, so the update is biased.

Deviations: the adapters are on the feed-forward projections, the modules and rank that `sam` uses, and on the attention
projections, where the paper has them, if `train.attention_rank` says so; local steps and optimizer are the run's.
"""

from __future__ import annotations

from sam_ds.config import TierSection
from sam_ds.federation.methods.base import Method, adapt_nothing, plan_dense, weighted_mean


def _train(tier: TierSection) -> str:
    return "lora-both"


METHOD = Method(plan=plan_dense, train=_train, aggregate=weighted_mean, adapt=adapt_nothing, sparse=False)
