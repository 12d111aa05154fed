"""Routing by a threshold: the widest paths give the same visits as the walk, and the thresholds their number."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import graphs, walk

from sam_ds.graph.widest import thresholds, widths

seeds = st.integers(0, 2**32 - 1)


@given(graphs(), seeds, st.sampled_from([None, 3]))
@settings(max_examples=150, deadline=None)
def test_an_expert_is_visited_up_to_its_width(graph, seed, distinct):
    adjacency_SS, roots = graph
    rng = np.random.default_rng(seed)
    shape = (5, len(adjacency_SS))
    scores_TS = (rng.normal(size=shape) if distinct is None else rng.integers(0, distinct, shape)).astype(np.float32)
    width_TS = widths(torch.from_numpy(scores_TS), torch.from_numpy(adjacency_SS), roots=roots).numpy()
    for threshold in {float(value) for value in scores_TS.flat} | {-1e9, 1e9}:
        for scores_S, width_S in zip(scores_TS, width_TS, strict=True):
            visited = walk(scores_S, adjacency_SS, roots, len(scores_S), threshold).visited
            assert set(np.flatnonzero(width_S >= threshold)) == set(visited)


@given(graphs(), seeds)
@settings(max_examples=100, deadline=None)
def test_a_threshold_gives_the_mean_number_of_visits_it_is_for(graph, seed):
    adjacency_SS, roots = graph
    slots = len(adjacency_SS)
    scores_TS = torch.from_numpy(np.random.default_rng(seed).normal(size=(40, slots)))
    width_TS = widths(scores_TS, torch.from_numpy(adjacency_SS), roots=roots)
    table_K = thresholds(width_TS, roots=roots)
    assert table_K.shape == (slots + 1,) and (table_K[: roots + 1] == float("inf")).all()
    for budget in range(roots, slots + 1):
        visits = (width_TS >= table_K[budget]).sum().item()
        # An expert shares its width with the one that leads to it: a threshold lets in both or neither.
        least = int((width_TS > table_K[budget]).sum())
        assert least < 40 * budget <= visits or visits == 40 * budget


def test_without_an_edge_there_is_no_visit():
    scores_TS = torch.tensor([[0.0, 5.0, 3.0]])
    adjacency_SS = torch.tensor([[False, False, True], [False, False, True], [False, False, False]])
    assert widths(scores_TS, adjacency_SS, roots=1).tolist() == [[float("inf"), float("-inf"), 3.0]]
