"""The products of a routed FFN, by the loop and by the grouped kernel, against one pair after the other."""

import pytest
import torch
from reference import products_into, products_out_of

from sam_ds.experts import grouped
from sam_ds.experts.grouped import into, out_of, pairs_of

T, S, d, n, roots = 13, 6, 8, 4, 2
r = roots * n


@pytest.fixture(params=["loop", "kernel"])
def kernel(request, monkeypatch):
    monkeypatch.setattr(grouped, "_worth_grouping", lambda *_: request.param == "kernel")
    return request.param


def visits(seed=0):
    """(T, S) from none to all beyond the roots, which are left out; the last slot has no token."""
    generator = torch.Generator().manual_seed(seed)
    visited_TS = torch.rand(T, S, generator=generator) < torch.linspace(0, 1, T)[:, None]
    visited_TS[:, :roots] = visited_TS[:, -1] = False
    return visited_TS


def pairs(visited_TS):
    everybodys_TS = visited_TS.clone()
    everybodys_TS[:, :roots] = True
    return pairs_of(everybodys_TS, roots=roots, neurons=n)


def weights(count, transposed):
    """(d, m) views of parameters stored as `Linear` does, or as `Conv1D` does."""
    parameters = [torch.nn.Parameter(torch.randn((S * n, d) if transposed else (d, S * n))) for _ in range(count)]
    return parameters, [parameter.t() if transposed else parameter for parameter in parameters]


def equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("known", [False, True])
def test_into_is_one_product_a_pair_in_values_and_gradients(kernel, known, count, transposed):
    visited_TS = visits()
    parameters, weights_dm = weights(count, transposed)
    x_Td = torch.randn(T, d, requires_grad=True)
    products_Tr = [(x_Td @ weight_dm[:, :r]).detach() for weight_dm in weights_dm] if known else ()
    ours = [part for both in into(x_Td, weights_dm, pairs(visited_TS), products_Tr) for part in both]
    theirs = [part for weight_dm in weights_dm for part in products_into(x_Td, weight_dm, visited_TS, r, n)]
    equal(ours, theirs)
    grads = [torch.randn_like(part) for part in ours]
    inputs = [x_Td, *parameters]
    equal(torch.autograd.grad(ours, inputs, grads), torch.autograd.grad(theirs, inputs, grads))


@pytest.mark.parametrize("transposed", [False, True])
def test_out_of_is_one_sum_a_pair_in_values_and_gradients(kernel, transposed):
    visited_TS = visits()
    (parameter,), (weight_dm,) = weights(1, transposed)
    hidden = [torch.randn(T, r, requires_grad=True), torch.randn(int(visits().sum()), n, requires_grad=True)]
    ours = out_of(*hidden, weight_dm.t(), pairs(visited_TS))
    theirs = products_out_of(*hidden, weight_dm.t(), visited_TS, n)
    equal([ours], [theirs])
    inputs, dy_Td = [*hidden, parameter], torch.randn(T, d)
    equal(torch.autograd.grad(ours, inputs, dy_Td), torch.autograd.grad(theirs, inputs, dy_Td))


def test_where_nobody_chooses_only_the_roots_are_left():
    visited_TS = torch.zeros(T, S, dtype=torch.bool)
    (parameter,), (weight_dm,) = weights(1, True)
    x_Td = torch.randn(T, d, requires_grad=True)
    ((hidden_Tr, hidden_Pn),) = into(x_Td, [weight_dm], pairs(visited_TS))
    assert hidden_Pn.shape == (0, n)
    y_Td = out_of(hidden_Tr, hidden_Pn, weight_dm.t(), pairs(visited_TS))
    torch.testing.assert_close(y_Td, x_Td @ weight_dm[:, :r] @ weight_dm[:, :r].t())
    y_Td.sum().backward()
    assert parameter.grad[:r].abs().min() > 0 and not parameter.grad[r:].any()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_gradient_of_a_weight_has_its_layout(transposed):
    """Else it would be copied on its way into the parameter."""
    _, (weight_dm,) = weights(1, transposed)
    weight_dm = weight_dm.detach().requires_grad_()
    chosen = pairs(visits())
    ((hidden_Tr, hidden_Pn),) = into(torch.randn(T, d), [weight_dm], chosen)
    out_of(hidden_Tr, hidden_Pn, weight_dm.t(), chosen).sum().backward()
    assert weight_dm.grad.stride() == weight_dm.stride()


def test_what_is_frozen_gets_no_gradient():
    (up, down), (up_dm, down_dm) = weights(2, True)
    chosen = pairs(visits())

    def y_Td(x_Td):
        ((hidden_Tr, hidden_Pn),) = into(x_Td, [up_dm.detach()], chosen)
        return out_of(hidden_Tr, hidden_Pn, down_dm.detach().t(), chosen)

    x_Td = torch.randn(T, d, requires_grad=True)
    (dx_Td,) = torch.autograd.grad(y_Td(x_Td).sum(), x_Td)
    assert torch.isfinite(dx_Td).all() and dx_Td.any()
    assert not y_Td(x_Td.detach()).requires_grad


@pytest.mark.parametrize("around_backward", [False, True])
def test_autocast_decides_the_precision(kernel, around_backward):
    (parameter,), (weight_dm,) = weights(1, True)
    x_Td, chosen = torch.randn(T, d, requires_grad=True), pairs(visits())

    def run():
        ((hidden_Tr, hidden_Pn),) = into(x_Td, [weight_dm], chosen)
        return out_of(hidden_Tr, hidden_Pn, weight_dm.t(), chosen)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_Td = run()
    assert y_Td.dtype == torch.bfloat16
    torch.testing.assert_close(y_Td.float(), run(), atol=0.5, rtol=0.05)
    # A loss computed outside, its gradient inside, is a mistake that the dense layer forgives.
    loss = y_Td.float().sum() + run().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_backward):
        loss.backward()
    assert x_Td.grad.dtype == parameter.grad.dtype == torch.float32 and torch.isfinite(x_Td.grad).all()
