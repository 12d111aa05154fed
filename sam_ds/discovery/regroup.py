"""Experts made for the routes they will be visited on.

Clusters of similar neurons are a start; what a token loses is the mass of the experts it does not visit. Two steps in
turn make that less: route the tokens by what a linear gate predicts of the experts' mass, then give every neuron to
the expert on whose tokens it has most mass, sizes exact (an assignment problem). With the gate fixed, the second step
cannot lose mass. Ours; MoEfication (2110.01786) and CMoE (2502.04416) keep their clusters as found.

Legend: T tokens, R neurons, E experts, n = R / E, d hidden and outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sam_ds.discovery.kmeans import balanced_assignment, permutation
from sam_ds.discovery.mass import expert_mass
from sam_ds.discovery.ridge import ridge_of


def regroup(
    labels_R: Tensor, x_Td: Tensor, hidden_TR: Tensor, down_Rd: Tensor, *, visited: float, rounds: int
) -> Tensor:
    """(R,) labels of `rounds` turns or fewer, those whose routes captured most mass, from the clusters `labels_R`.

    `hidden_TR`: what the neurons put out, less its mean, on the layer's inputs `x_Td`; `visited`: the share of the
    experts that tokens visit, on average. All experts are of one size.
    """
    experts = int(labels_R.max()) + 1
    mass_TR = hidden_TR.square() * down_Rd.square().sum(1)
    best, most = labels_R, -1.0
    for turn in range(rounds + 1):
        order_R = permutation(labels_R)
        hidden_TEn = hidden_TR[:, order_R].view(len(hidden_TR), experts, -1)
        mass_TE = expert_mass(hidden_TEn, down_Rd[order_R].view(experts, -1, down_Rd.shape[1]))
        predicted_TE = x_Td @ ridge_of(x_Td, mass_TE.sqrt(), 1e-3)
        pairs = max(1, min(predicted_TE.numel(), round(visited * predicted_TE.numel())))
        threshold = predicted_TE.flatten().kthvalue(predicted_TE.numel() - pairs + 1).values
        routes_TE = (predicted_TE >= threshold).to(mass_TR.dtype)
        captured = float((routes_TE * mass_TE).sum() / mass_TE.sum().clamp(min=1e-30))
        if captured > most:
            best, most = labels_R, captured
        if turn == rounds:
            break
        gain_ER = (routes_TE.t() @ mass_TR).double().cpu().numpy()
        moved_R = torch.from_numpy(balanced_assignment(-gain_ER)).to(labels_R)
        if torch.equal(moved_R, labels_R):
            break
        labels_R = moved_R
    return best
