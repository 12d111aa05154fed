from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sam_ds.errors import InputError
from sam_ds.graph.assembler import Assembler, AssemblerConfig, client_condition
from sam_ds.graph.dag import check_graph, full_graph, top_edges
from sam_ds.graph.route import gate_values, route, straight_through

L, E = 3, 8


def fresh(seed: int = 0, **sizes: Any) -> Assembler:
    config = AssemblerConfig(**{"layers": L, "num_experts": E, **sizes})
    shape = (config.layers, config.num_experts, config.num_experts)
    return Assembler(config, torch.randn(shape, generator=torch.Generator().manual_seed(9)), seed)


def condition(seed: int, budget_share: float = 0.5) -> torch.Tensor:
    return client_condition(torch.randn(L, E, generator=torch.Generator().manual_seed(seed)), budget_share)


def test_a_fresh_assembler_stays_near_the_prior_and_masks_the_rest() -> None:
    model = fresh()
    logits_LEE = model(condition(1))
    above_EE = torch.from_numpy(full_graph(E))
    learned = (logits_LEE - model.prior_LEE)[:, above_EE]
    assert 0 < learned.abs().max() < 0.2
    assert (logits_LEE[:, ~above_EE] == float("-inf")).all()
    assert not torch.equal(logits_LEE, model(condition(2)))
    mask_EE = top_edges(logits_LEE[0].detach().double().numpy(), full_graph(E), budget=12, roots=1)
    check_graph(mask_EE, 1)


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    a, b, c = fresh(0), fresh(0), fresh(1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.tails, c.tails)


def test_parameters_grow_with_e_not_with_its_square() -> None:
    sizes = [sum(p.numel() for p in fresh(num_experts=e).parameters()) for e in (64, 128, 192)]
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1]


def test_the_state_holds_parameters_only_and_no_name_that_deepspeed_takes_for_an_expert_weight() -> None:
    model = fresh()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}
    assert not [name for name in model.state_dict() if "expert" in name]


def test_gains_are_0_at_the_start_and_have_a_gradient_of_their_own() -> None:
    model, quiet = fresh(messages=True), fresh()
    assert not hasattr(quiet, "gain_heads")
    assert torch.equal(model(condition(1)), quiet(condition(1)))
    assert not model.gains(condition(1)).any()
    above_LEE = torch.ones(L, E, E).triu(1)
    (model.gains(condition(1)) * above_LEE).sum().backward()
    assert model.gain_heads.grad.abs().max() > 0


def test_gains_are_of_the_condition_and_strictly_upper() -> None:
    model = fresh(messages=True)
    with torch.no_grad():
        model.gain_heads.normal_(generator=torch.Generator().manual_seed(3))
        mine, yours = model.gains(condition(1)), model.gains(condition(2))
    assert not mine.tril().any()
    assert not torch.equal(mine, yours)
    logits = model(condition(1))
    with torch.no_grad():
        model.gain_tails.zero_()
    assert torch.equal(model(condition(1)), logits) and not model.gains(condition(1)).any()


def test_condition_is_standardised_by_layer() -> None:
    mean_scores_LE = torch.randn(L, E) * 7 + 3
    mean_scores_LE[1] = 4.0
    built = client_condition(mean_scores_LE, 0.25)
    assert built.shape == (L, E + 1)
    assert (built[:, E] == 0.25).all()
    assert (built[1, :E] == 0).all()
    np.testing.assert_allclose(built[[0, 2], :E].mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(built[[0, 2], :E].std(1, correction=0), 1, rtol=1e-5)


def test_credited_edges_train_the_assembler_towards_clients_that_differ() -> None:
    """Two clients whose loss wants other edges: the shared network learns to tell them apart."""
    model = fresh(layers=1, num_experts=6)
    adjacency_SS = torch.from_numpy(full_graph(6))
    scores_TS = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    clients = [(client_condition(torch.eye(6)[[e]], 0.5), e) for e in (2, 4)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def logit_gap() -> list[float]:
        with torch.no_grad():
            return [float(model(built)[0, 0, e] - model.prior_LEE[0, 0, e]) for built, e in clients]

    before = logit_gap()
    for _ in range(30):
        optimizer.zero_grad()
        for built, wanted in clients:
            routing = route(scores_TS, adjacency_SS, roots=1, k=3)
            weights_TJ = straight_through(gate_values(scores_TS, routing, model(built)[0]))
            gain_TJ = torch.where(routing.chosen_TJ == wanted, 1.0, -1.0)
            (-(weights_TJ * gain_TJ).mean()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert all(after > start + 0.05 for after, start in zip(logit_gap(), before, strict=True))


def test_bad_sizes_are_named() -> None:
    with pytest.raises(InputError, match="rank must be at least 1, got 0"):
        AssemblerConfig(layers=1, num_experts=4, rank=0)
    config = AssemblerConfig(layers=1, num_experts=4)
    with pytest.raises(InputError, match="prior must have shape"):
        Assembler(config, torch.zeros(2, 4, 4), 0)
    with pytest.raises(InputError, match="prior must be finite"):
        Assembler(config, torch.full((1, 4, 4), float("-inf")), 0)
    with pytest.raises(InputError, match="budget_share"):
        client_condition(torch.zeros(1, 4), 0.0)
