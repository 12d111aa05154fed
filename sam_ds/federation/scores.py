"""What the experts of a client are drawn by: scores, from which `participation.py` makes probabilities.

    desirability_{i,l,e} = w_1 fitness_{i,l,e} - w_2 load_{l,e}

"Efficient Training of Large-Scale AI Models Through Federated Mixture-of-Experts: A System-Level Approach", arXiv
2507.05685, section III-B. fitness is a running mean of the client's feedback, the share of its routed tokens that
visited the expert, over the rounds in which it held that expert; it starts at the visit rates of its registration. A
client that may visit all it holds makes no choice, and gives no feedback. load is a
running mean of the share of a round's clients that held the expert: of the places that their tiers' budgets give (the
capacity profile), those it got over the most it can get. Both lie in [0, 1].

Deviations: the paper gives each client its top experts, here the desirability decides how probable each is, so that
every expert stays possible (its baseline without load is `greedy`); its fitness fades without feedback, ours stays.

Legend: N clients, L layers, E experts a layer, S experts held in a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from sam_ds.federation.participation import ClientPlan


def heard(
    fitness_S: NDArray[np.float64], offered_SS: NDArray[np.int64], together_SS: NDArray[np.int64], decay: float
) -> NDArray[np.float64]:
    """(S,) the fitness of the experts that a client held, with its counters of a round in it (`graph.route.Counters`).

    As it was where no token was routed, as the client could visit all it held. Counts are the client's word: a share
    is at most 1.
    """
    tokens = int(offered_SS.max())  # that were routed: a root offers its heads to every one of them
    if tokens == 0:
        return fitness_S
    shares_S: NDArray[np.float64] = np.minimum(together_SS[0] / tokens, 1.0)
    shares_S[0] = 1.0  # a root
    return running_mean(fitness_S, shares_S, decay)


def load_shares(clients: Sequence[ClientPlan], num_experts: int) -> NDArray[np.float64]:
    """(L, E) the share of a round's clients, one or more, that held each expert."""
    layers = len(clients[0].experts)
    held_LE = np.zeros((layers, num_experts))
    for client in clients:
        for layer, experts in enumerate(client.experts):
            held_LE[layer, list(experts)] += 1
    return held_LE / len(clients)


def running_mean(before: NDArray[np.float64], now: NDArray[np.float64], decay: float) -> NDArray[np.float64]:
    """Exponential: what is k rounds old counts decay^k of what is new."""
    return decay * before + (1 - decay) * now


def desirability(
    fitness_NLE: NDArray[np.float64], load_LE: NDArray[np.float64], *, roots: int, fitness_weight: float,
    load_weight: float,
) -> NDArray[np.float64]:  # fmt: skip
    """(N, L, E) as above, but of each layer raised until no expert beside the roots is below 0; roots have 0."""
    scores_NLE = fitness_weight * fitness_NLE - load_weight * load_LE
    scores_NLE -= np.minimum(scores_NLE[..., roots:].min(axis=-1, keepdims=True, initial=np.inf), 0.0)
    scores_NLE[..., :roots] = 0.0
    return scores_NLE


def greedy(fitness_NLE: NDArray[np.float64], budget_N: Sequence[int], roots: int) -> NDArray[np.float64]:
    """(N, L, E) inf, that is h = 1, for as many experts of the highest fitness as fit beside the roots into a client's
    budget, 0 for the others; ties go to the lower index. With floor 0 nothing is drawn, and what a client never holds
    is no part of what the aggregate estimates."""
    order_NLE = np.argsort(-fitness_NLE[..., roots:], axis=-1, kind="stable") + roots
    scores_NLE = np.zeros_like(fitness_NLE)
    for scores_LE, order_LE, budget in zip(scores_NLE, order_NLE, budget_N, strict=True):
        np.put_along_axis(scores_LE, order_LE[:, : budget - roots], np.inf, axis=-1)
    return scores_NLE


def anchored(rates_NLE: NDArray[np.float64], roots: int) -> NDArray[np.bool_]:
    """(N, L, E) whether a client is the expert's anchor: in each layer one to one, as many pairs as there are experts
    beside the roots or clients, with the largest sum of visit rates.

    DDOME (FedJETs), arXiv 2306.08586; there anchors also take part more often and have a loss of their own.
    """
    anchored_NLE = np.zeros(rates_NLE.shape, dtype=bool)
    for layer in range(rates_NLE.shape[1]):
        clients, experts = linear_sum_assignment(rates_NLE[:, layer, roots:], maximize=True)
        anchored_NLE[clients, layer, experts + roots] = True
    return anchored_NLE
