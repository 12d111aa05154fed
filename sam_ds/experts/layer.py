"""A feed-forward network as a graph of experts (design 3, 5): the `torch` back end.

Expert e is the contiguous block of neurons [e n, (e+1) n) of the permuted FFN; its weights are views, no second copy
exists. The output for the visited set A(x), with stand-ins s_e(x) = C_e [V x, 1] W for the experts not visited:

    y = sum_{all e} s_e(x) + sum_{e in A(x)} w_e (f_e(x) - s_e(x)),      w_e = 1 in value

so all experts visited is exactly the dense layer. The roots are always visited, their stand-in is zero. On a client
the layer holds only some experts: its *slots*, in ascending order of expert id, roots first; the others are known by
the sum of their stand-ins.

Legend: T tokens, S slots (= E experts where all are held), J = k - roots choices, P = T J pairs, n neurons an expert,
m = S n, r neurons of all the roots, d hidden, q and p input and output rank of the stand-ins, Q = q + 1, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_ds.errors import InputError
from sam_ds.experts.grouped import Pairs, into, out_of, pairs_of
from sam_ds.experts.lora import LoraSlices
from sam_ds.experts.standins import with_one
from sam_ds.experts.surgery import FFN
from sam_ds.graph.route import Counters, count, gate_values, route, straight_through

Hidden = tuple[Tensor, Tensor]
"""Of the roots (T, r) and of the pairs of tokens and other experts (P, n)."""


class SamParts(nn.Module):
    """What SAM adds to one FFN: gate, stand-ins, graph. Everything is small beside the FFN itself."""

    def __init__(self, *, slots: int, standin_rank: int, standin_outputs: int, like_dm: Tensor) -> None:
        """Stand-ins have the precision of the FFN's weights `like_dm`, everything its device."""
        super().__init__()
        hidden, device = like_dm.shape[0], like_dm.device
        # fp32 whatever the model's precision: a route must not depend on how a score was rounded.
        self.wg = nn.Parameter(torch.zeros(slots, hidden, device=device))
        self.register_buffer("basis_dq", like_dm.new_zeros(hidden, standin_rank))
        self.register_buffer("core_SQp", like_dm.new_zeros(slots, standin_rank + 1, standin_outputs))
        self.register_buffer("core_all_Qp", like_dm.new_zeros(standin_rank + 1, standin_outputs))
        self.register_buffer("spread_pd", like_dm.new_zeros(standin_outputs, hidden))
        self.register_buffer("adjacency_SS", torch.ones(slots, slots, dtype=torch.bool, device=device).triu(1))

    def standins(self, x_Td: Tensor, visited_TS: Tensor | None = None) -> Tensor:
        """(T, d): the sum of all experts' stand-ins, less those of the visited by their weights (None: of all)."""
        z_TQ = with_one(x_Td @ self.basis_dq)
        if visited_TS is None:
            return z_TQ @ (self.core_all_Qp - self.core_SQp.sum(0)) @ self.spread_pd
        own_Tp = (visited_TS[:, :, None] * z_TQ[:, None, :]).flatten(1) @ self.core_SQp.flatten(0, 1)
        return (z_TQ @ self.core_all_Qp - own_Tp) @ self.spread_pd


class SamFFN(nn.Module):
    """Takes the place of an FFN module and keeps its children under their own names, so that a checkpoint of the
    model is still a checkpoint of the original architecture plus the `sam.*` and `lora.*` entries.

    An inline FFN has no module: there the layer takes the activation's place, and the weights stay where they are."""

    def __init__(
        self, ffn: FFN, *, num_experts: int, top_k: int, roots: int, standin_rank: int,
        standin_outputs: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
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
        self.neurons = ffn.neurons // num_experts
        self.sam = SamParts(
            slots=num_experts, standin_rank=standin_rank, standin_outputs=standin_outputs,
            like_dm=self.matrices()[0].detach(),
        )  # fmt: skip
        self.lora: LoraSlices | None = None
        self.counters: Counters | None = None
        """Set to collect edge counts over the coming forward passes (None: do not count)."""
        self.edge_logits_SS: Tensor | None = None
        """Set by the model's forward: the assembler's logits for the slots, for the gate's gradient."""

    def matrices(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Views up (d, m), gate (d, m) or None, down (m, d)."""
        return self.ffn.weights()

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
        if self.top_k >= self.slots:
            y_Td = self._dense(x_Td)
            if self.slots < self.num_experts:
                y_Td = y_Td + self.sam.standins(x_Td)
        elif torch.compiler.is_compiling():
            # One break in the graph: how many tokens an expert has, only the route says.
            y_Td = torch.compiler.disable(self._routed)(x_Td)
        else:
            y_Td = self._routed(x_Td)
        bias = self.ffn.biases()[2]
        if bias is not None:
            y_Td = y_Td + bias
        if self.dropout is not None:
            y_Td = self.dropout(y_Td)
        y = y_Td.view(hidden_states.shape)
        return y if residual is None else residual + y

    def scores(self, x_Td: Tensor) -> Tensor:
        """(T, S) gate scores, fp32. The input is detached: the gate must not bend what the experts see."""
        return F.linear(x_Td.detach().float(), self.sam.wg.float())

    def _routed(self, x_Td: Tensor) -> Tensor:
        scores_TS = self.scores(x_Td)
        routing = route(scores_TS, self.sam.adjacency_SS, roots=self.roots, k=self.top_k)
        # A graph task is under way where gradient checkpointing repeats a forward pass: counted already.
        if self.counters is not None and torch._C._current_graph_task_id() == -1:
            self.counters = self.counters + count(routing, self.sam.adjacency_SS)
        found_TJ = routing.chosen_TJ >= 0
        # A token that found no further expert goes to the first non-root with weight 0: no host sync for a rare case.
        slot_TJ = torch.where(found_TJ, routing.chosen_TJ, self.roots)
        weight_TJ = found_TJ.to(x_Td.dtype)
        if torch.is_grad_enabled():
            g_TJ = gate_values(scores_TS, routing, self.edge_logits_SS)
            weight_TJ = weight_TJ * straight_through(g_TJ).to(x_Td.dtype)
        pairs = pairs_of(slot_TJ, slots=self.slots, roots=self.roots, neurons=self.neurons)
        y_Td = self._visited(x_Td, weight_TJ.flatten().index_select(0, pairs.order_P), pairs)
        if len(self.sam.spread_pd) == 0:
            return y_Td
        # The roots have no stand-in to take off.
        visited_TS = x_Td.new_zeros(x_Td.shape[0], self.slots).scatter_add(1, slot_TJ, weight_TJ)
        return y_Td + self.sam.standins(x_Td, visited_TS)

    def _dense(self, x_Td: Tensor) -> Tensor:
        """(T, d): all slots, visited by every token. Bias of the down-projection not included."""
        up_dm, gate_dm, down_md = self.matrices()
        up_b, gate_b, _ = self.ffn.biases()
        lora = self.lora
        up_Tm = x_Td @ up_dm if up_b is None else torch.addmm(up_b, x_Td, up_dm)
        if lora is not None:
            up_Tm = up_Tm + lora.scale * (x_Td @ lora.up_in) @ lora.up_rows.t()
        if gate_dm is None:
            hidden_Tm = self.activation(up_Tm)
        else:
            gate_Tm = x_Td @ gate_dm if gate_b is None else torch.addmm(gate_b, x_Td, gate_dm)
            if lora is not None:
                gate_Tm = gate_Tm + lora.scale * (x_Td @ lora.gate_in) @ lora.gate_rows.t()
            hidden_Tm = self.activation(gate_Tm) * up_Tm
        y_Td = hidden_Tm @ down_md
        if lora is not None:
            y_Td = y_Td + lora.scale * (hidden_Tm @ lora.down_rows) @ lora.down_out
        return y_Td

    def _visited(self, x_Td: Tensor, weight_P: Tensor, pairs: Pairs) -> Tensor:
        """(T, d): `_dense` of the roots, and of the sorted pairs by their weights."""
        up_dm, gate_dm, down_md = self.matrices()
        up_b, gate_b, _ = self.ffn.biases()
        lora = self.lora

        def complete(hidden: Hidden, bias_m: Tensor | None, inner: Tensor | None, rows: Tensor | None) -> Hidden:
            hidden_Tr, hidden_Pn = hidden
            if bias_m is not None:
                bias_Pn = bias_m.unflatten(0, (self.slots, self.neurons)).index_select(0, pairs.slot_P)
                hidden_Tr, hidden_Pn = hidden_Tr + bias_m[: hidden_Tr.shape[1]], hidden_Pn + bias_Pn
            if lora is not None:
                ((low_Tr, low_Pn),) = into(x_Td @ inner, [rows.t()], pairs)
                hidden_Tr, hidden_Pn = hidden_Tr + lora.scale * low_Tr, hidden_Pn + lora.scale * low_Pn
            return hidden_Tr, hidden_Pn

        if gate_dm is None:
            (up,) = into(x_Td, [up_dm], pairs)
            up = complete(up, up_b, lora and lora.up_in, lora and lora.up_rows)
            hidden_Tr, hidden_Pn = (self.activation(part) for part in up)
        else:
            up, gate = into(x_Td, [up_dm, gate_dm], pairs)
            up = complete(up, up_b, lora and lora.up_in, lora and lora.up_rows)
            gate = complete(gate, gate_b, lora and lora.gate_in, lora and lora.gate_rows)
            hidden_Tr, hidden_Pn = (self.activation(g) * u for g, u in zip(gate, up, strict=True))
        # Here, not on what comes out of the experts, which is wider.
        hidden_Pn = hidden_Pn * weight_P.to(hidden_Pn.dtype)[:, None]
        y_Td = out_of(hidden_Tr, hidden_Pn, down_md, pairs)
        if lora is not None:
            y_Td = y_Td + lora.scale * out_of(hidden_Tr, hidden_Pn, lora.down_rows, pairs) @ lora.down_out
        return y_Td


@torch.no_grad()
def check_layers(model: nn.Module, ffns: Sequence[FFN], layers: Sequence[SamFFN], ids_BS: Tensor) -> None:
    """Run the model, in eval mode, and compare each FFN with the layer made from it, all experts visited.

    An FFN is known by the shapes of its parts; what it does with them is its own code. Raises InputError naming the
    first that is not down(act(gate(x)) * up(x)), or that no forward pass reaches.
    """
    inputs: dict[int, tuple[Tensor, ...]] = {}
    compared = set()
    handles = []

    def keep(index: int, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args

    def compare(index: int, output: Tensor) -> None:
        ffn, layer, (x, *residual) = ffns[index], layers[index], inputs[index]
        ours = layer._dense(x.reshape(-1, x.shape[-1])).view(x.shape)
        bias = ffn.biases()[2]
        theirs = output - residual[0] if residual else output
        error = (ours - theirs if bias is None else ours + bias - theirs).float().norm()
        rounding = torch.finfo(x.dtype).eps * output.float().norm()
        compared.add(index)
        # What is not finite is reported with the calibration text, which it may come from.
        if error > 0.05 * theirs.float().norm() + 4 * rounding:
            inner = f"act({ffn.up}(x))" if ffn.gate is None else f"act({ffn.gate}(x)) * {ffn.up}(x)"
            raise InputError(
                f"{ffn.path} does not compute {ffn.down}({inner}), as its parts suggest (relative error "
                f"{error / theirs.float().norm():.2g}); sam_ds/experts/surgery.py must learn what it does"
            )

    for index, ffn in enumerate(ffns):
        handles.append(ffn.entry.register_forward_pre_hook(lambda _, args, index=index: keep(index, args)))
        handles.append(ffn.exit.register_forward_hook(lambda _, args, output, index=index: compare(index, output)))
    try:
        model(input_ids=ids_BS.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for index, ffn in enumerate(ffns):
        if index not in compared:
            raise InputError(f"{ffn.path} has the parts of a feed-forward network, but no forward pass reaches it")
