"""Regrouping: sizes stay exact, nothing captured is lost, planted groups that weights do not show are found."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_ds.discovery.mass import expert_mass
from sam_ds.discovery.regroup import regroup
from sam_ds.discovery.ridge import ridge_of


def captured(labels_R, x_Td, hidden_TR, down_Rd, visited):
    """Share of the mass that the experts with the highest predicted mass have, one expert and token at a time."""
    experts = int(labels_R.max()) + 1
    mass_TE = torch.stack(
        [(hidden_TR[:, labels_R == e] @ down_Rd[labels_R == e]).square().sum(1) for e in range(experts)], dim=1
    )
    predicted_TE = x_Td @ ridge_of(x_Td, mass_TE.sqrt(), 1e-3)
    pairs = round(visited * predicted_TE.numel())
    chosen = predicted_TE.flatten().argsort(descending=True)[:pairs]
    return float(mass_TE.flatten()[chosen].sum() / mass_TE.sum())


def planted(seed, tokens=400, experts=4, size=6, d=8):
    """Neurons of a group are active on the same tokens, which one input says; weights and order say nothing."""
    generator = torch.Generator().manual_seed(seed)
    topic_T = torch.randint(experts, (tokens,), generator=generator)
    x_Td = torch.cat([torch.eye(experts)[topic_T], torch.randn(tokens, d - experts, generator=generator)], 1)
    group_R = torch.arange(experts).repeat_interleave(size)[torch.randperm(experts * size, generator=generator)]
    active_TR = (group_R[None] == topic_T[:, None]).float()
    hidden_TR = active_TR * torch.randn(tokens, len(group_R), generator=generator)
    return group_R, x_Td, hidden_TR, torch.randn(len(group_R), d, generator=generator)


@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.8))
@settings(max_examples=25, deadline=None)
def test_more_mass_is_captured_at_the_same_sizes(seed, visited):
    _, x_Td, hidden_TR, down_Rd = planted(seed)
    start_R = torch.arange(4).repeat_interleave(6)
    found_R = regroup(start_R, x_Td, hidden_TR, down_Rd, visited=visited, rounds=4)
    assert found_R.bincount().tolist() == [6] * 4
    before, after = (captured(labels_R, x_Td, hidden_TR, down_Rd, visited) for labels_R in (start_R, found_R))
    assert after >= before - 1e-4


@pytest.mark.parametrize("seed", range(3))
def test_groups_that_only_the_tokens_show_are_found(seed):
    group_R, *layer = planted(seed)
    found_R = regroup(torch.arange(4).repeat_interleave(6), *layer, visited=0.25, rounds=10)
    together = np.equal.outer(group_R.numpy(), group_R.numpy())
    assert (np.equal.outer(found_R.numpy(), found_R.numpy()) == together).mean() > 0.9


def test_no_round_changes_nothing():
    _, *layer = planted(0)
    start_R = torch.arange(4).repeat_interleave(6)
    assert torch.equal(regroup(start_R, *layer, visited=0.5, rounds=0), start_R)


def test_the_mass_is_the_squared_norm_in_the_metric():
    generator = torch.Generator().manual_seed(0)
    hidden_TEn, down_End = torch.randn(7, 3, 4, generator=generator), torch.randn(3, 4, 5, generator=generator)
    root_dd = torch.randn(5, 5, generator=generator)
    out_TEd = torch.einsum("ten,end->ted", hidden_TEn, down_End)
    torch.testing.assert_close(expert_mass(hidden_TEn, down_End), out_TEd.square().sum(2))
    expected_TE = (out_TEd @ root_dd).square().sum(2)
    torch.testing.assert_close(expert_mass(hidden_TEn, down_End, root_dd @ root_dd.t()), expected_TE)
