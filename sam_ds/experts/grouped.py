"""The two products of a routed FFN: into the neurons of the experts that each token visits, and out of them.

Every token visits the roots, whose neurons come first: all tokens times one block of the weights. The others are
(token, expert) pairs, sorted by expert:

    into     hidden = x W[:, :r] of the roots;    x_t W_e of every pair (t, e)
    out of   y = hidden W[:r] of the roots, and y_t grows by hidden W_e for every pair (t, e)

On a GPU `grouped_mm` takes all pairs at once. On the CPU (P, d) arrays cost a quarter of the products and more, in
fresh pages (`examples/benchmarks/layer.md`), so a loop takes one expert's rows at a time and adds what it gets in
place, backward as well; the gradient of a weight is written once, in the layout of the weight.

Legend: T tokens, P pairs, S slots, J most pairs of a token, d hidden size, or a rank in its place, n neurons an expert,
m = S n, r neurons of all the roots; t and p tokens and pairs of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Which tokens go to which expert beside the roots; made by `pairs_of`."""

    token_P: Tensor
    slot_P: Tensor
    ends_S: Tensor
    """int32: slot s has the pairs [ends[s-1], ends[s]); a root has none."""
    visited_TS: Tensor
    """bool, roots not in it."""
    roots: int
    neurons: int

    def of_tokens(self) -> Tensor:
        """(T, J) the pairs of each token, P where it has fewer than the most that one has."""
        pair_ST = torch.full_like(self.visited_TS.t(), len(self.token_P), dtype=torch.int64)
        pair_ST[self.slot_P, self.token_P] = torch.arange(len(self.token_P), device=self.token_P.device)
        most = int(self.visited_TS.sum(1).max()) if len(self.token_P) else 0
        return pair_ST.t().sort(dim=1).values[:, :most]

    def experts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Of every expert that has pairs: these, its neurons, its tokens. Waits for the device once."""
        start = 0
        for slot, end in enumerate(self.ends_S.tolist()):
            if end > start:
                yield slice(start, end), slice(slot * self.neurons, (slot + 1) * self.neurons), self.token_P[start:end]
            start = end


def pairs_of(visited_TS: Tensor, *, roots: int, neurons: int) -> Pairs:
    """From which experts each token visits (bool); the first `roots` slots are everybody's and make no pairs."""
    beside_TS = visited_TS.clone()
    beside_TS[:, :roots] = False
    slot_P, token_P = beside_TS.t().nonzero(as_tuple=True)
    ends_S = beside_TS.sum(0).cumsum(0).int()
    return Pairs(token_P=token_P, slot_P=slot_P, ends_S=ends_S, visited_TS=beside_TS, roots=roots, neurons=neurons)


def into(
    x_Td: Tensor, weights_dm: Sequence[Tensor], pairs: Pairs, products_Tr: Sequence[Tensor] = ()
) -> list[tuple[Tensor, Tensor]]:
    """For each weight (T, r) of the roots and (P, n) of the pairs, in the weights' precision.

    `products_Tr`: the former, where known already; they get their gradient here all the same.
    """
    x_Td, *weights_dm = _same_precision(x_Td, *weights_dm)
    r = pairs.roots * pairs.neurons
    if not _worth_grouping(weights_dm[0][:, : pairs.neurons], len(pairs.token_P), len(pairs.ends_S)):
        out = _Into.apply(pairs, [known_Tr.to(x_Td.dtype) for known_Tr in products_Tr], x_Td, *weights_dm)
        return list(zip(out[::2], out[1::2], strict=True))
    x_Pd = x_Td.index_select(0, pairs.token_P)
    experts_Sdn = [weight_dm.unflatten(1, (-1, pairs.neurons)).transpose(0, 1) for weight_dm in weights_dm]
    if torch.is_grad_enabled() or not products_Tr:
        products_Tr = [x_Td @ weight_dm[:, :r] for weight_dm in weights_dm]
    return [
        (known_Tr, grouped_mm(x_Pd, weight_Sdn, offs=pairs.ends_S))
        for known_Tr, weight_Sdn in zip(products_Tr, experts_Sdn, strict=True)
    ]


def out_of(hidden_Tr: Tensor, hidden_Pn: Tensor, weight_md: Tensor, pairs: Pairs) -> Tensor:
    """(T, d) the sums over the visited, in the weight's precision."""
    hidden_Tr, hidden_Pn, weight_md = _same_precision(hidden_Tr, hidden_Pn, weight_md)
    if not _worth_grouping(weight_md[: pairs.neurons], len(pairs.token_P), len(pairs.ends_S)):
        return _OutOf.apply(pairs, hidden_Tr, hidden_Pn, weight_md)
    out_Pd = grouped_mm(hidden_Pn, weight_md.unflatten(0, (-1, pairs.neurons)), offs=pairs.ends_S)
    # Not `index_add`, which on a GPU adds in another order every time.
    pair_TJ = pairs.of_tokens()
    padded_Pd = torch.cat([out_Pd, out_Pd.new_zeros(1, out_Pd.shape[1])])
    out_TJd = padded_Pd.index_select(0, pair_TJ.flatten()).unflatten(0, pair_TJ.shape)
    return hidden_Tr @ weight_md[: hidden_Tr.shape[1]] + out_TJd.sum(1)


def of_each(rows: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Rows that every expert has for itself, (p, i), times its weight (i, o): (p, o) of each."""
    both = [_same_precision(own, weight) for own, weight in zip(rows, weights, strict=True)]
    sizes = [len(own) for own, _ in both]
    if not both or not _worth_grouping(both[0][1], sum(sizes), len(sizes)):
        return [own @ weight for own, weight in both]
    ends = torch.tensor(sizes, device=both[0][0].device).cumsum(0).int()
    out_Po = grouped_mm(torch.cat([own for own, _ in both]), torch.stack([weight for _, weight in both]), offs=ends)
    return list(out_Po.split(sizes))


def _same_precision(*values: Tensor) -> list[Tensor]:
    """In that of the last, a weight; under autocast, which does not know the products here, in autocast's."""
    device = values[0].device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else values[-1].dtype
    return [value.to(dtype) for value in values]


def _worth_grouping(weight_io: Tensor, rows: int, experts: int) -> bool:
    """On a GPU, where rows are of 16 bytes, as the kernel wants them, and more than a handful; an expert's weight."""
    aligned = all(size * weight_io.element_size() % 16 == 0 for size in weight_io.shape)
    return weight_io.is_cuda and aligned and rows >= 4 * experts


def _without_autocast(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """What comes in, a tensor last, has the precision it is to be multiplied in."""

    @wraps(step)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        last: Any = args[-1]
        with torch.autocast(last.device.type, enabled=False):
            return step(*args, **kwargs)

    return run


class _Into(torch.autograd.Function):
    """`into` as a loop; its outputs in one row."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any, pairs: Pairs, products_Tr: list[Tensor], x_Td: Tensor, *weights_dm: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pairs = pairs
        ctx.save_for_backward(x_Td, *weights_dm)
        r = pairs.roots * pairs.neurons
        outs_Pn = [x_Td.new_empty(len(pairs.token_P), pairs.neurons) for _ in weights_dm]
        for rows, own, tokens in pairs.experts():
            x_td = x_Td.index_select(0, tokens)
            for weight_dm, out_Pn in zip(weights_dm, outs_Pn, strict=True):
                torch.mm(x_td, weight_dm[:, own], out=out_Pn[rows])
        outs_Tr = [known_Tr.detach() for known_Tr in products_Tr]
        outs_Tr = outs_Tr or [x_Td @ weight_dm[:, :r] for weight_dm in weights_dm]
        return tuple(out for both in zip(outs_Tr, outs_Pn, strict=True) for out in both)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        pairs, (x_Td, *weights_dm) = ctx.pairs, ctx.saved_tensors
        _, _, need_x, *need_weights = ctx.needs_input_grad
        r = pairs.roots * pairs.neurons
        # A fresh page costs as much as a product writes into it: only the first writes, the others add.
        dx_Td = torch.mm(grads[0], weights_dm[0][:, :r].t()) if need_x else None
        dweights_dm = [
            torch.zeros_like(weight_dm) if need else None
            for weight_dm, need in zip(weights_dm, need_weights, strict=True)
        ]
        parts = list(zip(weights_dm, dweights_dm, grads[::2], grads[1::2], strict=True))
        for index, (weight_dm, dweight_dm, dout_Tr, _) in enumerate(parts):
            if dx_Td is not None and index:
                dx_Td.addmm_(dout_Tr, weight_dm[:, :r].t())
            if dweight_dm is not None:
                torch.mm(x_Td.t(), dout_Tr, out=dweight_dm[:, :r])
        for rows, own, tokens in pairs.experts():
            x_td = x_Td.index_select(0, tokens)
            dx_td = None
            for weight_dm, dweight_dm, _, dout_Pn in parts:
                if dx_Td is not None:
                    back = dout_Pn[rows], weight_dm[:, own].t()
                    dx_td = torch.mm(*back) if dx_td is None else dx_td.addmm_(*back)
                if dweight_dm is not None:
                    torch.mm(x_td.t(), dout_Pn[rows], out=dweight_dm[:, own])
            if dx_Td is not None and dx_td is not None:
                dx_Td.index_add_(0, tokens, dx_td)
        return None, None, dx_Td, *dweights_dm


class _OutOf(torch.autograd.Function):
    """`out_of` as a loop. A token has an expert once, so that adding is in one order on every device."""

    @staticmethod
    @_without_autocast
    def forward(ctx: Any, pairs: Pairs, hidden_Tr: Tensor, hidden_Pn: Tensor, weight_md: Tensor) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(hidden_Tr, hidden_Pn, weight_md)
        y_Td = hidden_Tr @ weight_md[: hidden_Tr.shape[1]]
        for rows, own, tokens in pairs.experts():
            y_Td.index_add_(0, tokens, hidden_Pn[rows] @ weight_md[own])
        return y_Td

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx: Any, dy_Td: Tensor) -> tuple[Tensor | None, ...]:
        pairs, (hidden_Tr, hidden_Pn, weight_md) = ctx.pairs, ctx.saved_tensors
        r, need_weight = hidden_Tr.shape[1], ctx.needs_input_grad[3]
        dhidden_Tr, dhidden_Pn = dy_Td @ weight_md[:r].t(), torch.empty_like(hidden_Pn)
        dweight_md = torch.zeros_like(weight_md) if need_weight else None
        if dweight_md is not None:
            torch.mm(hidden_Tr.t(), dy_Td, out=dweight_md[:r])
        for rows, own, tokens in pairs.experts():
            dy_td = dy_Td.index_select(0, tokens)
            torch.mm(dy_td, weight_md[own].t(), out=dhidden_Pn[rows])
            if dweight_md is not None:
                torch.mm(hidden_Pn[rows].t(), dy_td, out=dweight_md[own])
        return None, dhidden_Tr, dhidden_Pn, dweight_md
