"""A feed-forward network as a graph of experts: the `torch` back end.

Expert e is the contiguous block of neurons [e n, (e+1) n) of the permuted FFN; its weights are views, no second copy
exists. The output for the visited set A(x), with stand-ins s_e(x) = C_e [V x, 1] W for the experts not visited:

    y = sum_{all e} s_e(x) + sum_{e in A(x)} w_e (f_e(x) - s_e(x)),      w_e = 1 in value

so all experts visited is exactly the dense layer. The roots are always visited, their stand-in is zero. On a client
the layer holds only some experts: its *slots*, in ascending order of expert id, roots first; the others are known by
the sum of their stand-ins.

Legend: T tokens, S slots (= E experts where all are held), J decisions, P pairs of a token and an expert beside the
roots, n neurons an expert, m = S n, r neurons of all the roots, d hidden, q and p input and output rank of the
stand-ins, Q = q + 1, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_ds.errors import InputError
from sam_ds.experts.grouped import into, out_of, pairs_of
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.message import exchange, mail_of, mail_to_all, order_of
from sam_ds.experts.router import Features
from sam_ds.experts.standins import with_one
from sam_ds.experts.surgery import FFN
from sam_ds.graph.route import Counters, Routing, count, gate_values, route, straight_through
from sam_ds.graph.widest import widths

Hidden = tuple[Tensor, Tensor]
"""Of the roots (T, r) and of the pairs of tokens and other experts (P, n)."""


STANDINS = ("basis_dq", "core_SQp", "core_all_Qp", "spread_pd")
"""The buffers that the stand-ins are made of; in the precision of the FFN's weights."""


class SamParts(nn.Module):
    """What SAM adds to one FFN: gate, stand-ins, graph. Everything is small beside the FFN itself."""

    threshold_K: Tensor
    basis_dq: Tensor
    core_SQp: Tensor
    core_all_Qp: Tensor
    spread_pd: Tensor
    adjacency_SS: Tensor

    def __init__(
        self, *, slots: int, phi: Features, by_threshold: bool, standin_rank: int, standin_outputs: int,
        hidden: int, like: Tensor, messages: bool,
    ) -> None:  # fmt: skip
        """Stand-ins have the precision of `like`, a weight of the FFN, everything its device."""
        super().__init__()
        device = like.device
        self.phi = phi
        self.wg = nn.Parameter(torch.zeros(slots, phi.width, device=device))
        # By the ids of all tails: what an expert is sent is its own, whoever else is held (experts/message.py).
        self.gain_SE = nn.Parameter(torch.zeros(slots, slots, device=device)) if messages else None
        # The score that an expert must have to be visited, for every mean number of visits; empty for a fixed number.
        budgets = slots + 1 if by_threshold else 0
        self.register_buffer("threshold_K", torch.full((budgets,), float("-inf"), device=device))
        self.register_buffer("basis_dq", like.new_zeros(hidden, standin_rank))
        self.register_buffer("core_SQp", like.new_zeros(slots, standin_rank + 1, standin_outputs))
        self.register_buffer("core_all_Qp", like.new_zeros(standin_rank + 1, standin_outputs))
        self.register_buffer("spread_pd", like.new_zeros(standin_outputs, hidden))
        self.register_buffer("adjacency_SS", torch.ones(slots, slots, dtype=torch.bool, device=device).triu(1))

    def standins(self, x_Td: Tensor, visited_TS: Tensor | None = None) -> Tensor:
        """(T, d): the sum of all experts' stand-ins, less those of the visited by their weights (None: of all)."""
        # DeepSpeed casts a model's parameters, not its buffers.
        basis_dq, core_SQp, core_all_Qp, spread_pd = (
            value.to(x_Td.dtype) for value in (self.basis_dq, self.core_SQp, self.core_all_Qp, self.spread_pd)
        )
        z_TQ = with_one(x_Td @ basis_dq)
        if visited_TS is None:
            return z_TQ @ (core_all_Qp - core_SQp.sum(0)) @ spread_pd
        own_Tp = (visited_TS[:, :, None] * z_TQ[:, None, :]).flatten(1) @ core_SQp.flatten(0, 1)
        return (z_TQ @ core_all_Qp - own_Tp) @ spread_pd


class SamFFN(nn.Module):
    """Takes the place of an FFN module and keeps its children under their own names, so that a checkpoint of the
    model is still a checkpoint of the original architecture plus the `sam.*` and `lora.*` entries.

    An inline FFN has no module: there the layer takes the activation's place, and the weights stay where they are."""

    backend = "torch"
    """What computes the experts: these views, `deepspeed` (`experts.deepspeed_moe`) or `nf4` (`experts.nf4`)."""

    def __init__(
        self, ffn: FFN, *, num_experts: int, top_k: int, roots: int, router: str, router_rank: int,
        by_threshold: bool, standin_rank: int, standin_outputs: int, semantics: str,
    ) -> None:  # fmt: skip
        super().__init__()
        # ZeRO-3 gathers the parameters of a leaf at once: this layer reads its children's, and never calls them.
        self._z3_leaf = True
        self.register_forward_pre_hook(_with_gradient)
        if ffn.neurons % num_experts:
            divisors = [e for e in range(2, 257) if ffn.neurons % e == 0]
            raise InputError(
                f"num_experts={num_experts} does not divide the {ffn.neurons} neurons of {ffn.path}; "
                f"these do: {', '.join(map(str, divisors))}"
            )
        if ffn.inline is None:
            for name, child in ffn.module.named_children():
                self.add_module(name, child)
        self.ffn = ffn if ffn.inline is not None else replace(ffn, module=self)
        """The FFN as it is now: its module is this layer, or the decoder layer that holds the weights."""
        self.ffn_names = (ffn.up, ffn.gate, ffn.down)
        self.dropout = ffn.dropout
        self.num_experts = num_experts
        self.slots = num_experts
        self.held = torch.arange(num_experts)
        """(S,) the ids of the experts in the slots, ascending."""
        self.roots = roots
        self.top_k = top_k
        """k, roots included; on average over the tokens where they are routed by a threshold."""
        self.neurons = ffn.neurons // num_experts
        like = ffn.linear(ffn.down).weight.detach()
        phi = Features(
            router, hidden=ffn.hidden, num_experts=num_experts, root_neurons=roots * self.neurons, rank=router_rank,
            gated=ffn.gate is not None, device=like.device,
        )  # fmt: skip
        self.sam = SamParts(
            slots=num_experts, phi=phi, by_threshold=by_threshold, standin_rank=standin_rank,
            standin_outputs=standin_outputs, hidden=ffn.hidden, like=like, messages=semantics == "message",
        )  # fmt: skip
        self.semantics = semantics
        """`reach` or `message`; a layer that knows messages sends none while this is `reach`."""
        self.lora: LoraSlices | None = None
        self.counters: Counters | None = None
        """Set to collect edge counts over the coming forward passes (None: do not count)."""
        self.edge_logits_SS: Tensor | None = None
        """Set by the model's forward: the assembler's logits for the slots, for the gate's gradient."""
        self.own_gain_SE: Tensor | None = None
        """Set by the model's forward: the gains of messages that the assembler writes, as `SamParts.gain_SE`."""

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Views up (d, m), gate (d, m) or None, down (m, d)."""
        return self.ffn.weights()

    @property
    def by_threshold(self) -> bool:
        """Whether a token visits the experts that score enough, not a fixed number."""
        return len(self.sam.threshold_K) > 0

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The FFN's own, elementwise."""
        return self.ffn.activation

    def slots_in(self, matrix_dm: Tensor) -> Tensor:
        """(S, d, n) view of an input-side matrix: the columns of each expert."""
        return matrix_dm.unflatten(1, (self.slots, self.neurons)).permute(1, 0, 2)

    def slots_out(self, matrix_md: Tensor) -> Tensor:
        """(S, n, d) view of an output-side matrix: the rows of each expert."""
        return matrix_md.unflatten(0, (self.slots, self.neurons))

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., d). The FFNs that are given the residual (Bloom's) return the sum."""
        x_Td = hidden_states.reshape(-1, hidden_states.shape[-1])
        whole = self.top_k >= self.slots
        compute = self._dense if whole else self._routed
        if torch.compiler.is_compiling() and not (whole and self.semantics == "reach"):
            # One break in the graph: how many tokens an expert has, only the route says; who sends, only the graph.
            compute = torch.compiler.disable(compute)
        y_Td = compute(x_Td)
        if whole and self.slots < self.num_experts:
            y_Td = y_Td + self.sam.standins(x_Td)
        bias = self.ffn.biases()[2]
        if bias is not None:
            y_Td = y_Td + bias
        if self.dropout is not None:
            y_Td = self.dropout(y_Td)
        y = y_Td.view(hidden_states.shape)
        return y if residual is None else residual + y

    def scores(self, x_Td: Tensor, products_Tr: Sequence[Tensor] | None = None) -> Tensor:
        """(T, S) gate scores, fp32; `products_Tr` as of `_root_products`, computed here if not given."""
        features_TF = self.gate_features(x_Td, products_Tr)
        with torch.autocast(x_Td.device.type, enabled=False):
            return F.linear(features_TF, self.sam.wg.float())

    @torch.no_grad()
    def gate_features(self, x_Td: Tensor, products_Tr: Sequence[Tensor] | None = None) -> Tensor:
        """(T, F) what the gate's rows are multiplied with. No gradient: the gate must not bend what experts see."""
        products_Tr = self._root_products(x_Td) if products_Tr is None else products_Tr
        hidden_Tr = self._complete(x_Td.to(products_Tr[0].dtype), products_Tr, 0, self.roots) if products_Tr else None
        with torch.autocast(x_Td.device.type, enabled=False):
            return self.sam.phi(x_Td, hidden_Tr, self.activation)

    @torch.no_grad()
    def _root_products(self, x_Td: Tensor) -> list[Tensor]:
        """(T, r) x times the roots' up and, if there is one, gate weights, where the gate reads them, else none.

        No gradient, for who routes over them computes it with all others' (`into`).
        """
        if self.sam.phi.router != "roots":
            return []
        x_Td, r = x_Td.to(self.matrices()[0].dtype), self.roots * self.neurons
        return [x_Td @ matrix_dm[:, :r] for matrix_dm in self.matrices()[:2] if matrix_dm is not None]

    def _complete(self, x_Td: Tensor, products_Tm: Sequence[Tensor], first: int, slots: int) -> Tensor:
        """(T, m) what the neurons of `slots` experts put out, from the `first` on: x times their weights, low-rank
        updates, biases and activation."""
        own, lora = slice(first * self.neurons, (first + slots) * self.neurons), self.lora
        up_b, gate_b, _ = self.ffn.biases()
        # Low-rank updates train in fp32 beside weights in half precision.
        dtype = x_Td.dtype

        def complete(out_Tm: Tensor, bias_m: Tensor | None, inner: Tensor | None, rows: Tensor | None) -> Tensor:
            if bias_m is not None:
                out_Tm = out_Tm + bias_m[own]
            if lora is None or inner is None or rows is None:
                return out_Tm
            return out_Tm + lora.scale * (x_Td @ inner.to(dtype)) @ rows[own].t().to(dtype)

        up_Tm = complete(products_Tm[0], up_b, lora and lora.up_in, lora and lora.up_rows)
        if len(products_Tm) == 1:
            return self.activation(up_Tm)
        return self.activation(complete(products_Tm[1], gate_b, lora and lora.gate_in, lora and lora.gate_rows)) * up_Tm

    def hidden(self, x_Td: Tensor) -> Tensor:
        """(T, m) what the neurons of all slots put out."""
        up_dm, gate_dm, _ = self.matrices()
        products_Tm = [x_Td @ matrix_dm for matrix_dm in (up_dm, gate_dm) if matrix_dm is not None]
        return self._complete(x_Td, products_Tm, 0, self.slots)

    @torch.no_grad()
    def visited(self, x_Td: Tensor, k: int | None = None) -> Tensor:
        """(T, S) bool: the experts that the tokens visit, or would visit with a budget of k."""
        k = self.top_k if k is None else k
        if k >= self.slots:
            return torch.ones(x_Td.shape[0], self.slots, dtype=torch.bool, device=x_Td.device)
        return self.reached(self.scores(x_Td), k)

    def reached(self, scores_TS: Tensor, k: int) -> Tensor:
        """(T, S) bool: what tokens of these scores visit with a budget of k, fewer than all."""
        if self.by_threshold:
            width_TS = widths(scores_TS, self.sam.adjacency_SS, roots=self.roots)
            return width_TS >= self.sam.threshold_K[k]
        return route(scores_TS, self.sam.adjacency_SS, roots=self.roots, k=k).visited_TS

    def routing(self, scores_TS: Tensor) -> Routing:
        """The same visits, with the order and the edges that led to each."""
        threshold, k = None, self.top_k
        if self.by_threshold and k < self.slots:
            threshold, k = self.sam.threshold_K[k], self.slots
        return route(scores_TS, self.sam.adjacency_SS, roots=self.roots, k=k, threshold=threshold)

    def _routed(self, x_Td: Tensor) -> Tensor:
        products_Tr = self._root_products(x_Td)
        scores_TS = self.scores(x_Td, products_Tr)
        counters = self.counters
        if counters is not None and torch._C._current_graph_task_id() != -1:
            # A graph task is under way where gradient checkpointing repeats a forward pass: counted already.
            counters = None
        learning = torch.is_grad_enabled() and (self.sam.wg.requires_grad or self.edge_logits_SS is not None)
        if counters is not None or learning:
            routing = self.routing(scores_TS)
            visited_TS = routing.visited_TS
            if counters is not None:
                self.counters = counters + count(routing, self.sam.adjacency_SS)
        else:
            visited_TS = self.reached(scores_TS, self.top_k)
        weight_TS = visited_TS.to(x_Td.dtype)
        if learning:
            g_TJ = straight_through(gate_values(scores_TS, routing, self.edge_logits_SS)).to(x_Td.dtype)
            # What no decision chose falls on a root, whose weight is not used and whose stand-in is zero.
            weight_TS = torch.zeros_like(weight_TS).scatter_add(1, routing.chosen_TJ.clamp(min=0), g_TJ)
        y_Td = self._visit(x_Td, visited_TS, weight_TS, products_Tr)
        if len(self.sam.spread_pd) == 0:
            return y_Td
        return y_Td.add_(self.sam.standins(x_Td, weight_TS))

    def _dense(self, x_Td: Tensor) -> Tensor:
        """(T, d): all slots, visited by every token. Bias of the down-projection not included."""
        if self.semantics == "message":
            return exchange(self, x_Td, mail_to_all(x_Td, order_of(self.sam.adjacency_SS)))
        hidden_Tm = self.hidden(x_Td)
        y_Td = hidden_Tm @ self.matrices()[2]
        if self.lora is not None:
            down_rows, down_out = (factor.to(hidden_Tm.dtype) for factor in (self.lora.down_rows, self.lora.down_out))
            y_Td = y_Td + self.lora.scale * (hidden_Tm @ down_rows) @ down_out
        return y_Td

    def _visit(
        self, x_Td: Tensor, visited_TS: Tensor, weight_TS: Tensor, products_Tr: Sequence[Tensor]
    ) -> Tensor:
        """(T, d): `_dense` of the roots, and of the other experts for the tokens that visit them, by their weights."""
        if self.semantics == "message":
            return exchange(self, x_Td, mail_of(visited_TS, order_of(self.sam.adjacency_SS)), weight_TS)
        pairs = pairs_of(visited_TS, roots=self.roots, neurons=self.neurons)
        weight_P, dtype = weight_TS[pairs.token_P, pairs.slot_P], x_Td.dtype
        up_dm, gate_dm, down_md = self.matrices()
        up_b, gate_b, _ = self.ffn.biases()
        lora = self.lora

        def complete(hidden: Hidden, bias_m: Tensor | None, inner: Tensor | None, rows: Tensor | None) -> Hidden:
            hidden_Tr, hidden_Pn = hidden
            if bias_m is not None:
                bias_Pn = bias_m.unflatten(0, (self.slots, self.neurons)).index_select(0, pairs.slot_P)
                hidden_Tr, hidden_Pn = hidden_Tr + bias_m[: hidden_Tr.shape[1]], hidden_Pn + bias_Pn
            if lora is not None and inner is not None and rows is not None:
                ((low_Tr, low_Pn),) = into(x_Td @ inner.to(dtype), [rows.t().to(dtype)], pairs)
                hidden_Tr, hidden_Pn = hidden_Tr + lora.scale * low_Tr, hidden_Pn + lora.scale * low_Pn
            return hidden_Tr, hidden_Pn

        if gate_dm is None:
            (up,) = into(x_Td, [up_dm], pairs, products_Tr)
            up = complete(up, up_b, lora and lora.up_in, lora and lora.up_rows)
            hidden_Tr, hidden_Pn = (self.activation(part) for part in up)
        else:
            up, gate = into(x_Td, [up_dm, gate_dm], pairs, products_Tr)
            up = complete(up, up_b, lora and lora.up_in, lora and lora.up_rows)
            gate = complete(gate, gate_b, lora and lora.gate_in, lora and lora.gate_rows)
            hidden_Tr, hidden_Pn = (self.activation(g) * u for g, u in zip(gate, up, strict=True))
        # Here, not on what comes out of the experts, which is wider.
        hidden_Pn = hidden_Pn * weight_P.to(hidden_Pn.dtype)[:, None]
        y_Td = out_of(hidden_Tr, hidden_Pn, down_md, pairs)
        if lora is not None:
            low_TR = out_of(hidden_Tr, hidden_Pn, lora.down_rows.to(dtype), pairs)
            y_Td = y_Td + lora.scale * low_TR @ lora.down_out.to(low_TR.dtype)
        return y_Td


def _with_gradient(layer: SamFFN, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Under ZeRO-3 a leaf's weights are gathered for the backward pass where a gradient arrives at its input: with all
    before it frozen there would be none, and the weights would be empty."""
    if not torch.is_grad_enabled() or args[0].requires_grad or not layer.ffn.sharded:
        return None
    return (args[0].detach().requires_grad_(), *args[1:])
