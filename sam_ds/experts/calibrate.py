"""From a dense causal LM to a graph of experts, with calibration text and no training.

Per layer: the neurons that matter most on every token become the roots, balanced clusters of the others the further
experts, permuted into contiguous blocks, most used first; then, in order of depth and each on the prefix already
converted: a router that predicts what is lost if an expert is not visited, the initial graph from co-activation, and
the stand-ins.

Legend: T tokens, E experts, m neurons, n = m / E, d hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sam_ds.discovery.features import activation_features, order_by_usage, output_features, weight_features
from sam_ds.discovery.kmeans import balanced_kmeans, permutation
from sam_ds.discovery.mass import expert_mass
from sam_ds.discovery.regroup import regroup
from sam_ds.errors import InputError
from sam_ds.experts.inputs import DISCOVERY_TOKENS
from sam_ds.experts.layer import SamFFN
from sam_ds.experts.router import fit_router
from sam_ds.experts.standins import StandIns, fit_standins
from sam_ds.experts.surgery import FFN
from sam_ds.graph.dag import initial_graph
from sam_ds.graph.widest import thresholds, widths

_CHUNK = 1024
"""Tokens a pass of a fit."""


@torch.no_grad()
def discover(
    ffn: FFN, x_Td: Tensor, *, num_experts: int, roots: int, features: str, regroups: int, top_k: int, seed: int,
    saliency_m: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Find the experts among the FFN's neurons; returns the order (m,) that puts them in place, most used first.

    The roots, which every token visits, are the neurons of the highest `saliency_m`, by default those whose output
    varies most (CMoE's shared experts, 2502.04416, there by rate): what a constant cannot stand in for. `regroups` and
    `top_k` are for `discovery.regroup`.
    """
    up_dm, gate_dm, down_md = ffn.weights()
    hidden_Tm = hidden_of(ffn, x_Td)
    weight_m = down_md.float().square().sum(1)
    energy_m = hidden_Tm.square().mean(0) * weight_m
    if saliency_m is None:
        saliency_m = hidden_Tm.var(0) * weight_m
    order_m = saliency_m.argsort(descending=True, stable=True)
    own = roots * (ffn.neurons // num_experts)
    root_m, rest_m = order_m[:own], order_m[own:]
    rest_m = rest_m.sort().values
    if len(rest_m) == 0:
        return root_m
    if features == "random":
        generator = torch.Generator().manual_seed(seed)
        labels_m = (torch.randperm(len(rest_m), generator=generator) % (num_experts - roots)).to(rest_m.device)
    else:
        if features == "weights":
            points = weight_features((up_dm if gate_dm is None else gate_dm).t().float())
        elif features == "activations":
            points = activation_features(hidden_Tm, top=max(1, ffn.neurons // 100))
        else:
            points = output_features(down_md.t().float(), hidden_Tm.norm(dim=0) / hidden_Tm.shape[0] ** 0.5)
        labels_m = balanced_kmeans(points[rest_m], num_experts - roots, seed=seed).labels_m
    if regroups > 0:
        hidden_Tm = hidden_Tm[:, rest_m]
        labels_m = regroup(
            labels_m, x_Td, hidden_Tm - hidden_Tm.mean(0), down_md[rest_m].float(),
            visited=(top_k - roots) / (num_experts - roots), rounds=regroups,
        )  # fmt: skip
    usage_E = energy_m.new_zeros(num_experts - roots).index_add_(0, labels_m, energy_m[rest_m])
    return torch.cat([root_m, rest_m[permutation(order_by_usage(labels_m, usage_E))]])


def hidden_of(ffn: FFN, x_Td: Tensor) -> Tensor:
    """(T, m) what the FFN's neurons put out, fp32. Raises InputError where that is not finite."""
    up_dm, gate_dm, _ = ffn.weights()
    up_b, gate_b, _ = ffn.biases()
    x_Td = x_Td.to(up_dm.dtype)
    up_Tm = F.linear(x_Td, up_dm.t(), up_b)
    if gate_dm is None:
        hidden_Tm = ffn.activation(up_Tm).float()
    else:
        hidden_Tm = (ffn.activation(F.linear(x_Td, gate_dm.t(), gate_b)) * up_Tm).float()
    check_finite(ffn.path, hidden_Tm)
    return hidden_Tm


def check_finite(path: str, values: Tensor) -> None:
    """Raise InputError where what the FFN at `path` computes on the calibration text is not finite."""
    if not torch.isfinite(values).all():
        raise InputError(f"{path}: activations on the calibration text are not finite; check the checkpoint")


@torch.no_grad()
def calibrate_layer(
    layer: SamFFN, x_Td: Tensor, *, standin: str, density: float, seed: int, graph: str = "coactivation"
) -> Tensor:
    """Fit gate, graph and stand-ins of a permuted layer on its inputs; returns the affinity (E, E) of its experts.

    The graph has the edges of the highest affinity, or, the control, random ones.
    What the gate predicts is ||f_e(x) - mu_e||, the output lost if e is not visited.
    """
    num_experts, roots = layer.slots, layer.roots
    ffn, sam = layer.ffn, layer.sam
    x_Td = _shuffled(x_Td, seed)
    down_End = layer.slots_out(layer.matrices()[2]).float()
    center_m = _center(layer, x_Td) if standin != "none" else torch.zeros_like(down_End[..., 0]).flatten()
    lost, root = [], []
    for x_chunk in x_Td.split(_CHUNK):
        hidden_Tm = hidden_of(ffn, x_chunk)
        root.append(hidden_Tm[:, : roots * layer.neurons].clone())
        lost.append(expert_mass((hidden_Tm - center_m).unflatten(1, (num_experts, -1)), down_End).sqrt())
    root_Tr, some_Tm = torch.cat(root), hidden_of(ffn, x_Td[:DISCOVERY_TOKENS])
    sam.wg.copy_(fit_router(sam.phi, ffn, x_Td, root_Tr, torch.cat(lost), hidden_Tm=some_Tm, seed=seed))

    # The graph is drawn from the routes over all edges, then the layer's own routes are those over the graph.
    scores_TE = layer.scores(x_Td)
    sam.adjacency_SS.fill_(True).triu_(1)
    set_thresholds(layer, scores_TE)
    affinity_EE = coactivation(layer.reached(scores_TE, layer.top_k).float()).cpu()
    ranked_EE = affinity_EE.double().numpy()
    if graph == "random":
        ranked_EE = np.random.default_rng(seed).random(ranked_EE.shape)
    graph_EE = initial_graph(ranked_EE, density=density, roots=roots)
    sam.adjacency_SS.copy_(torch.from_numpy(graph_EE))
    set_thresholds(layer, scores_TE)
    if standin != "none":
        fitted = _fit(layer, x_Td, scores_TE, center_m, seed=seed)
        sam.basis_dq.copy_(fitted.basis_dq)
        sam.spread_pd.copy_(fitted.spread_pd)
        sam.core_SQp.copy_(fitted.core_EQp)
        sam.core_all_Qp.copy_(fitted.core_EQp.sum(0))
    return affinity_EE


@torch.no_grad()
def refit_layer(layer: SamFFN, x_Td: Tensor, *, seed: int) -> Tensor:
    """(E, Q, p) the core that fits the stand-ins of a layer to experts that have changed, low-rank updates among them,
    and to the routes of now; both bases stay."""
    x_Td = _shuffled(x_Td, seed)
    bases = (layer.sam.basis_dq.float(), layer.sam.spread_pd.float())
    return _fit(layer, x_Td, layer.scores(x_Td), _center(layer, x_Td), seed=seed, bases=bases).core_EQp


def _shuffled(x_Td: Tensor, seed: int) -> Tensor:
    """Every chunk of tokens a fair sample, for the text is often ordered by where it comes from."""
    return x_Td[torch.randperm(len(x_Td), generator=torch.Generator().manual_seed(seed)).to(x_Td.device)]


def _hidden(layer: SamFFN, x_Td: Tensor) -> Tensor:
    """`hidden_of`, low-rank updates included."""
    hidden_Tm = layer.hidden(x_Td.to(layer.matrices()[0].dtype)).float()
    check_finite(layer.ffn.path, hidden_Tm)
    return hidden_Tm


def _center(layer: SamFFN, x_Td: Tensor) -> Tensor:
    """(m,) the neurons' means."""
    return torch.stack([_hidden(layer, x_chunk).sum(0) / len(x_Td) for x_chunk in x_Td.split(_CHUNK)]).sum(0)


def _fit(
    layer: SamFFN, x_Td: Tensor, scores_TE: Tensor, center_m: Tensor, *, seed: int,
    bases: tuple[Tensor, Tensor] | None = None,
) -> StandIns:  # fmt: skip
    """The stand-ins of what the layer's routes, and others, leave out."""
    num_experts, roots = layer.slots, layer.roots
    down_md = layer.matrices()[2]
    if layer.lora is not None:
        down_md = down_md + layer.lora.deltas()["down"]
    down_End = layer.slots_out(down_md).float()

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # One set of stand-ins serves every budget: half of the fit sees the layer's own routes, a quarter those of
        # other lengths, a quarter random subsets, which is what clients that hold only some experts do.
        generator = torch.Generator().manual_seed(seed)
        lengths = [max(min(roots + 1, num_experts), num_experts // 4), max(roots, num_experts // 2)]
        scores = scores_TE.split(_CHUNK)
        for index, x_chunk in enumerate(x_Td.split(_CHUNK)):
            k = layer.top_k if index % 4 in (0, 2) else lengths[index // 4 % 2]
            if index % 4 == 3:
                drawn = torch.randperm(num_experts - roots, generator=generator)[: k - roots]
                visited_TE = torch.zeros(x_chunk.shape[0], num_experts, dtype=torch.bool, device=x_chunk.device)
                visited_TE[:, drawn.to(x_chunk.device) + roots] = True
                visited_TE[:, :roots] = True
            else:
                visited_TE = layer.reached(scores[index], k)
            # The masked dense layer: what the unvisited experts would have added, means aside.
            hidden_Tm = (_hidden(layer, x_chunk) - center_m).unflatten(1, (num_experts, -1))
            missed_Tm = (hidden_Tm * ~visited_TE[:, :, None]).flatten(1)
            yield x_chunk, missed_Tm @ down_End.flatten(0, 1), ~visited_TE

    mean_Ed = torch.einsum("en,end->ed", center_m.view(num_experts, -1), down_End)
    mean_Ed[:roots] = 0.0
    rank, outputs = layer.sam.basis_dq.shape[1], layer.sam.spread_pd.shape[0]
    return fit_standins(chunks, mean_Ed=mean_Ed, roots=roots, rank=rank, outputs=outputs, bases=bases)


def set_thresholds(layer: SamFFN, scores_TE: Tensor) -> None:
    """Find the scores at which tokens of these (T, E) visit 0..E experts on average; nothing for a fixed number."""
    if layer.by_threshold:
        width_TE = widths(scores_TE, layer.sam.adjacency_SS, roots=layer.roots)
        layer.sam.threshold_K.copy_(thresholds(width_TE, roots=layer.roots))


def coactivation(visited_TE: Tensor) -> Tensor:
    """(E, E) lift of a pair over chance: P(both) / (P(p) P(e)); 1 where the experts are independent."""
    rate_E = visited_TE.mean(0).clamp(min=1e-6)
    return (visited_TE.t() @ visited_TE / visited_TE.shape[0]) / (rate_E[:, None] * rate_E[None, :])
