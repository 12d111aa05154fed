"""Messages along the edges of the expert graph.

    x_e = x + sum_{p in A(x), p -> e} (gain_ep + own_ep) w_p f_p(x_p)
    y   = sum_{all e} s_e(x) + sum_{e in A(x)} w_e (f_e(x_e) - s_e(x))

What a visited expert p puts out for a token is added to the input of every visited expert that an edge of the graph in
use leads to from p; on a client that is a path through experts it does not hold, too. Edges lead from lower to higher
ids, so experts are computed in that order, all of a level at a time: those whose longest path from a source has the
same length. Stand-ins read x and send nothing; gate and route see x alone. w_p is 1 in value: by its gradient the gate
learns what its choices send, too. The nearest published thing is Chain-of-Experts (2506.18945), whose experts pass on
what they have found in a layer, trained from scratch.

own_ep is what the assembler writes for a client or a text (`graph/assembler.py`); without one it is 0.

All gains are 0 at the start. The layer computes then what it does without messages, to rounding, forward and for the
gradients of all else, and the gradient of the gains is not 0. With other gains the layer with all experts visited is
no dense FFN any more: nothing folds messages into weights.

The shared gains of an edge belong to its head: they are a row of the head, as its gate row is, and train, travel and
are weighed with it. That needs nothing new: where the tail is not held the row's change is 0, as that of an expert held
and not used, and what the server estimates is the design's mean over what clients hold, E[delta_e(S) | e in S]. A
matrix shared by all would be sent whole to everybody and average zeros over heads as well.

Legend: T tokens, S slots, A edges, d hidden, n neurons an expert; t tokens of one expert, a of those that visit both
ends of an edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sam_ds.experts.grouped import of_each

if TYPE_CHECKING:
    from sam_ds.experts.layer import SamFFN


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order in which a graph's experts are computed."""

    levels: tuple[tuple[int, ...], ...]
    """The slots by the length of the longest path to them."""
    edges: tuple[tuple[int, int], ...]
    """(tail, head)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mail:
    """Which tokens every expert has, and what it is sent."""

    order: Order
    token_S: Sequence[Tensor]
    """(t,) the tokens of each slot."""
    rows_A: Sequence[tuple[Tensor, Tensor]]
    """(a,) of each edge: where the tokens that visit both ends are among the tail's, and among the head's."""


def order_of(adjacency_SS: Tensor) -> Order:
    """Of a strictly upper triangular graph; worked out once for the same one. Waits for the device."""
    return _order(adjacency_SS.cpu().numpy().tobytes(), len(adjacency_SS))


@lru_cache(maxsize=1024)
def _order(graph: bytes, slots: int) -> Order:
    adjacency_SS = np.frombuffer(graph, dtype=np.bool_).reshape(slots, slots)
    level_S: list[int] = []
    for head in range(slots):
        level_S.append(1 + max((level_S[tail] for tail in np.flatnonzero(adjacency_SS[:head, head])), default=-1))
    levels = [tuple(slot for slot in range(slots) if level_S[slot] == level) for level in range(max(level_S) + 1)]
    return Order(levels=tuple(levels), edges=tuple((int(p), int(e)) for p, e in np.argwhere(adjacency_SS)))


def mail_of(visited_TS: Tensor, order: Order) -> Mail:
    """Of tokens that visit these experts (bool). Waits for the device."""
    tails, heads = _ends(order, visited_TS.device)
    _, token_P = visited_TS.t().nonzero(as_tuple=True)
    both_TA = visited_TS[:, tails] & visited_TS[:, heads]
    edge_M, token_M = both_TA.t().nonzero(as_tuple=True)
    row_TS = visited_TS.cumsum(0) - 1
    sizes_S, sizes_A = visited_TS.sum(0).tolist(), both_TA.sum(0).tolist()
    rows = [row_TS[token_M, ends[edge_M]].split(sizes_A) for ends in (tails, heads)]
    return Mail(order=order, token_S=token_P.split(sizes_S), rows_A=list(zip(*rows, strict=True)))


def mail_to_all(x_Td: Tensor, order: Order) -> Mail:
    """Of tokens that all visit all experts of the graph."""
    every_T = torch.arange(len(x_Td), device=x_Td.device)
    slots = sum(map(len, order.levels))
    return Mail(order=order, token_S=[every_T] * slots, rows_A=[(every_T, every_T)] * len(order.edges))


def exchange(layer: SamFFN, x_Td: Tensor, mail: Mail, weight_TS: Tensor | None = None) -> Tensor:
    """(T, d): the sum of what the visited experts of a layer put out; w is 1 for roots, and for all without
    `weight_TS`.

    Bias of the down-projection not included.
    """
    up_dm, gate_dm, down_md = layer.matrices()
    # Views whose gradients are written into one of the whole.
    into = [matrix_dm.split(layer.neurons, dim=1) for matrix_dm in (up_dm, gate_dm) if matrix_dm is not None]
    down_Snd, lora = down_md.split(layer.neurons), layer.lora
    low_SnR = None if lora is None else lora.down_rows.split(layer.neurons)
    assert layer.sam.gain_SE is not None
    tails, heads = _ends(mail.order, x_Td.device)
    gain_SE = layer.sam.gain_SE if layer.own_gain_SE is None else layer.sam.gain_SE + layer.own_gain_SE
    gain_A = gain_SE[heads, layer.held.to(x_Td.device)[tails]].unbind()
    received: dict[int, list[int]] = {}
    for edge, ((_, head), (row_a, _)) in enumerate(zip(mail.order.edges, mail.rows_A, strict=True)):
        if len(row_a):
            received.setdefault(head, []).append(edge)
    out: dict[int, Tensor] = {}
    for level in mail.order.levels:
        slots = [slot for slot in level if slot < layer.roots or len(mail.token_S[slot])]
        inputs = []
        for slot in slots:
            x_td = x_Td.index_select(0, mail.token_S[slot])
            for edge in received.get(slot, ()):
                x_td = _Receive.apply(x_td, out[mail.order.edges[edge][0]], gain_A[edge], *mail.rows_A[edge])
            inputs.append(x_td)
        products = [of_each(inputs, [own_Sdn[slot] for slot in slots]) for own_Sdn in into]
        hidden = []
        for index, (slot, x_td) in enumerate(zip(slots, inputs, strict=True)):
            hidden_tn = layer._complete(x_td, [product[index] for product in products], slot, 1)
            if weight_TS is not None and slot >= layer.roots:
                # Here, not on what comes out of the expert, which is wider.
                weight_t = weight_TS[:, slot].index_select(0, mail.token_S[slot])
                hidden_tn = hidden_tn * weight_t.to(hidden_tn.dtype)[:, None]
            hidden.append(hidden_tn)
        outputs = of_each(hidden, [down_Snd[slot] for slot in slots])
        if lora is not None and low_SnR is not None:
            low = of_each(hidden, [low_SnR[slot].to(x_Td.dtype) for slot in slots])
            outputs = [
                y_td + lora.scale * low_tR @ lora.down_out.to(low_tR.dtype)
                for y_td, low_tR in zip(outputs, low, strict=True)
            ]
        out.update(zip(slots, outputs, strict=True))
    y_Td = torch.zeros_like(x_Td, dtype=out[0].dtype)
    for slot, y_td in out.items():
        # A token has an expert once, so that adding is in one order on every device.
        y_Td = y_Td.index_add_(0, mail.token_S[slot], y_td)
    return y_Td


def _ends(order: Order, device: torch.device) -> tuple[Tensor, Tensor]:
    """(A,) tails and heads."""
    ends_2A = torch.tensor(order.edges, dtype=torch.int64).view(-1, 2).t().to(device)
    return ends_2A[0], ends_2A[1]


class _Receive(torch.autograd.Function):
    """x[row of the head] += gain f[row of the tail], in place; of the rows that are sent nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x_td: Tensor, sent_td: Tensor, gain: Tensor, tail_a: Tensor, head_a: Tensor) -> Tensor:
        ctx.save_for_backward(sent_td, gain, tail_a, head_a)
        ctx.mark_dirty(x_td)
        message_ad = sent_td.index_select(0, tail_a) * gain.to(sent_td.dtype)
        return x_td.index_add_(0, head_a, message_ad.to(x_td.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_td: Tensor) -> tuple[Tensor | None, ...]:
        sent_td, gain, tail_a, head_a = ctx.saved_tensors
        dmessage_ad = dx_td.index_select(0, head_a).to(sent_td.dtype)
        dsent_td = dgain = None
        if ctx.needs_input_grad[1]:
            dsent_td = torch.zeros_like(sent_td).index_add_(0, tail_a, dmessage_ad * gain.to(sent_td.dtype))
        if ctx.needs_input_grad[2]:
            dgain = (dmessage_ad * sent_td.index_select(0, tail_a)).sum(dtype=torch.float32).to(gain.dtype)
        return dx_td, dsent_td, dgain, None, None
