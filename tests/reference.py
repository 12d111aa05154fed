"""Slow oracles: each reads like the formula it stands for; the fast paths are tested against them."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sam_ds.graph.dag import random_graph
from sam_ds.graph.route import gate_values, route

# graph

@dataclass
class Walk:
    """One token: the experts in the order visited, the credited parents and the eligible sets of each
    decision."""

    visited: list[int]
    parents: list[int]
    eligible: list[set[int]]
    left: set[int]


def walk(
    scores_S: np.ndarray, adjacency_SS: np.ndarray, roots: int, k: int, threshold: float = -np.inf
) -> Walk:
    """Greedy best-first expansion: a heap of the experts that the visited ones lead to; none below the threshold."""
    num_held = len(scores_S)
    heap: list[tuple[float, int]] = []
    visited: list[int] = []
    result = Walk(visited=visited, parents=[], eligible=[], left=set())

    def visit(expert: int) -> None:
        visited.append(expert)
        for head in range(num_held):
            if adjacency_SS[expert, head]:
                heapq.heappush(heap, (-float(scores_S[head]), head))

    def frontier() -> set[int]:
        return {expert for _, expert in heap} - set(visited)

    for root in range(roots):
        visit(root)
    while len(visited) < min(k, num_held) and frontier():
        result.eligible.append(frontier())
        if all(scores_S[expert] < threshold for expert in frontier()):
            break
        _, expert = heapq.heappop(heap)
        while expert in visited:
            _, expert = heapq.heappop(heap)
        tails = [p for p in visited if adjacency_SS[p, expert]]
        # roots first, by index; then the highest score, by index
        parent = min(tails, key=lambda p: (0, 0.0, p) if p < roots else (1, -float(scores_S[p]), p))
        result.parents.append(parent)
        visit(expert)
    result.left = frontier()
    return result


def counts(walks: list[Walk], adjacency_SS: np.ndarray, roots: int) -> dict[str, np.ndarray]:
    """used, offered and together, token by token and edge by edge."""
    num_held = len(adjacency_SS)
    total = {name: np.zeros((num_held, num_held), dtype=np.int64) for name in ("used", "offered", "together")}
    for w in walks:
        for parent, expert in zip(w.parents, w.visited[roots:], strict=True):
            total["used"][parent, expert] += 1
        offered = set()
        for j, eligible in enumerate(w.eligible):
            offered |= {(p, e) for p in w.visited[: roots + j] for e in eligible if adjacency_SS[p, e]}
        for p, e in offered:
            total["offered"][p, e] += 1
        for p in w.visited:
            for e in w.visited:
                total["together"][p, e] += p < e
    return total


def has_path(mask_EE: np.ndarray, tail: int, head: int, interior: set[int]) -> bool:
    """Depth-first search for a path tail ~> head whose inner experts all lie in `interior`."""
    return any(
        mask_EE[tail, e] and (e == head or (e in interior and has_path(mask_EE, e, head, interior)))
        for e in range(tail + 1, head + 1)
    )


@st.composite
def graphs(draw: st.DrawFn, max_experts: int = 9) -> tuple[np.ndarray, int]:
    """A reachable strictly upper (E, E) mask and its number of roots; edges into roots occur too."""
    num_experts = draw(st.integers(2, max_experts))
    roots = draw(st.integers(1, num_experts))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    fewest = num_experts - roots
    num_edges = draw(st.integers(fewest, num_experts * (num_experts - 1) // 2))
    mask_EE = random_graph(num_experts, num_edges, roots, rng)
    if draw(st.booleans()):
        mask_EE[:, :roots] = np.triu(rng.random((num_experts, num_experts)) < 0.5, 1)[:, :roots]
    return mask_EE, roots


# experts

@torch.no_grad()
def layer_input(model, module, batches):
    """(T, d) what `module` is given as the text runs through the whole model."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).float()))
    for ids_BS in batches:
        model(input_ids=ids_BS)
    handle.remove()
    return torch.cat(seen)


def updated_matrices(layer):
    """Up, gate and down with the low-rank updates."""
    up_dm, gate_dm, down_md = layer.matrices()
    if layer.lora is None:
        return up_dm, gate_dm, down_md
    deltas = layer.lora
    up_dm = up_dm + deltas.scale * deltas.up_in @ deltas.up_rows.t()
    down_md = down_md + deltas.scale * deltas.down_rows @ deltas.down_out
    if gate_dm is not None:
        gate_dm = gate_dm + deltas.scale * deltas.gate_in @ deltas.gate_rows.t()
    return up_dm, gate_dm, down_md


def neurons_output(layer, x_Td, own):
    """(T, n) what the neurons of the slice `own` put out."""
    up_dm, gate_dm, _ = updated_matrices(layer)
    up_b, gate_b, _ = layer.ffn.biases()
    up_Tn = x_Td @ up_dm[:, own] + (0 if up_b is None else up_b[own])
    if gate_dm is None:
        return layer.activation(up_Tn)
    return layer.activation(x_Td @ gate_dm[:, own] + (0 if gate_b is None else gate_b[own])) * up_Tn


def gate_features(layer, x_Td):
    """phi(x) as the table of experts/router.py writes it."""
    phi, x_Td, one_T1 = layer.sam.phi, x_Td.detach(), torch.ones(len(x_Td), 1)
    if phi.router == "mean_key":
        return x_Td
    if phi.router == "linear":
        return torch.cat([x_Td, one_T1], 1)
    if phi.router == "roots":
        root_Tr = neurons_output(layer, x_Td, slice(0, layer.roots * layer.neurons))
        return torch.cat([x_Td, root_Tr.detach().abs(), one_T1], 1)
    if phi.router == "low_rank":
        return torch.cat([x_Td @ phi.inner_dI, one_T1], 1)
    if phi.router == "mlp":
        return torch.cat([torch.nn.functional.silu(x_Td @ phi.inner_dI + phi.inner_I), one_T1], 1)
    gate_TE, up_TE = (x_Td @ phi.inner_dI + phi.inner_I).chunk(2, dim=1) if phi.gated else (None, None)
    if gate_TE is None:
        return layer.activation(x_Td @ phi.inner_dI + phi.inner_I).abs()
    return (layer.activation(gate_TE) * up_TE).abs()


def gate_scores(layer, x_Td):
    """w_e . phi(x)."""
    return gate_features(layer, x_Td) @ layer.sam.wg.t()


def limit(layer):
    """The most experts that a token may visit and the least score of one."""
    threshold_K = layer.sam.threshold_K
    return {"k": layer.slots, "threshold": float(threshold_K[layer.top_k])} if len(threshold_K) else {"k": layer.top_k}


def pairs_by_slot(visited_TS):
    """(slot, token) of every visit, sorted by slot, then by token."""
    visits = [(slot, t) for t, slots in enumerate(visited_TS.tolist()) for slot, there in enumerate(slots) if there]
    return sorted(visits, key=lambda pair: pair[0])


def products_into(x_Td, weight_dm, visited_TS, r, n):
    """x W[:, :r], and x_t W_e of one pair after the other."""
    rows = [x_Td[t] @ weight_dm[:, slot * n : (slot + 1) * n] for slot, t in pairs_by_slot(visited_TS)]
    return x_Td @ weight_dm[:, :r], torch.stack(rows) if rows else x_Td.new_zeros(0, n)


def products_out_of(hidden_Tr, hidden_Pn, weight_md, visited_TS, n):
    """hidden W[:r], and hidden_p W_e of one pair after the other added to its token's row."""
    rows = list(hidden_Tr @ weight_md[: hidden_Tr.shape[1]])
    for hidden_n, (slot, t) in zip(hidden_Pn, pairs_by_slot(visited_TS), strict=True):
        rows[t] = rows[t] + hidden_n @ weight_md[slot * n : (slot + 1) * n]
    return torch.stack(rows)


def moe_output(layer, x_Td):
    """y = sum_e s_e(x) + sum_{e in A(x)} w_e (f_e(x_e) - s_e(x)), one token and one expert at a time.

    x_e = x, and under `message` + sum_{p in A(x), p -> e} gain_ep w_p f_p(x_p).
    """
    parts = layer.sam
    scores_TS = gate_scores(layer, x_Td)
    routing = route(scores_TS, parts.adjacency_SS, roots=layer.roots, **limit(layer))
    g_TJ = gate_values(scores_TS, routing, layer.edge_logits_SS)
    down_md, down_b = updated_matrices(layer)[2], layer.ffn.biases()[2]
    rows = []
    for t, x_d in enumerate(x_Td):
        y_d = absent_standins(parts, x_d)
        y_d = y_d + sum(standin_output(parts, slot, x_d[None])[0] for slot in range(layer.slots))
        weights = {root: torch.tensor(1.0) for root in range(layer.roots)}
        for j, expert in enumerate(routing.chosen_TJ[t].tolist()):
            if expert >= 0:
                weights[expert] = 1 + g_TJ[t, j] - g_TJ[t, j].detach()
        sent = {}
        for expert, weight in sorted(weights.items()):
            own = slice(expert * layer.neurons, (expert + 1) * layer.neurons)
            x_e = x_d
            for parent, message_d in sent.items():
                if layer.semantics == "message" and parts.adjacency_SS[parent, expert]:
                    x_e = x_e + parts.gain_SE[expert, layer.held[parent]] * message_d
            output_d = neurons_output(layer, x_e[None], own)[0] @ down_md[own]
            y_d = y_d + weight * (output_d - standin_output(parts, expert, x_d[None])[0])
            sent[expert] = weight * output_d
        if down_b is not None:
            y_d = y_d + down_b
        rows.append(y_d)
    return torch.stack(rows)


@contextmanager
def masked_dense(layers, places):
    """Inside the block the dense model at `places`, pairs (module called with the FFN's input, down-projection), sets
    the neurons of the experts that `layers` would not visit to zero and adds those experts' stand-ins."""
    handles = []
    for layer, (entry, down) in zip(layers, places, strict=True):
        parts, seen = layer.sam, {}

        def reach(_, args, layer=layer, parts=parts, seen=seen):
            x_Td = args[0].reshape(-1, args[0].shape[-1])
            left_TS = torch.ones(x_Td.shape[0], layer.slots, dtype=torch.bool)
            for t, scores_S in enumerate(gate_scores(layer, x_Td).numpy()):
                left_TS[t, walk(scores_S, parts.adjacency_SS.numpy(), layer.roots, **limit(layer)).visited] = False
            seen["left_TS"] = left_TS
            standins_TSd = torch.stack([standin_output(parts, slot, x_Td) for slot in range(layer.slots)], dim=1)
            seen["standins_Td"] = (standins_TSd * left_TS[:, :, None]).sum(1)

        def mask(_, args, layer=layer, seen=seen):
            hidden_TSn = args[0].reshape(-1, layer.slots, layer.neurons)
            return ((hidden_TSn * ~seen["left_TS"][:, :, None]).reshape(args[0].shape),)

        def add(_, args, y, seen=seen):
            return y + seen["standins_Td"].view(y.shape)

        handles += [entry.register_forward_pre_hook(reach), down.register_forward_pre_hook(mask)]
        handles.append(down.register_forward_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def neurons(ffn):
    """The multiset of an FFN's neurons: what each reads, its biases, what it writes."""
    up_dm, gate_dm, down_md = ffn.weights()
    columns = [up_dm.t(), down_md]
    if gate_dm is not None:
        columns.append(gate_dm.t())
    columns += [bias_m[:, None] for bias_m in ffn.biases()[:2] if bias_m is not None]
    return sorted(map(tuple, torch.cat(columns, dim=1).tolist()))


def expert_output(layer, expert, x_Td):
    """f_e(x) of one expert, by its slot; the bias of the down-projection is nobody's."""
    (up_dm, gate_dm, down_md), (up_b, gate_b, _) = layer.matrices(), layer.ffn.biases()
    own = slice(expert * layer.neurons, (expert + 1) * layer.neurons)

    def project(matrix_dm, bias_m):
        y_Tn = x_Td @ matrix_dm[:, own]
        return y_Tn if bias_m is None else y_Tn + bias_m[own]

    up_Tn = project(up_dm, up_b)
    hidden_Tn = layer.activation(up_Tn) if gate_dm is None else layer.activation(project(gate_dm, gate_b)) * up_Tn
    return hidden_Tn @ down_md[own]


def standin_output(parts, expert, x_Td):
    """s_e(x) = C_e [V x, 1] W, one expert."""
    return with_bias(x_Td @ parts.basis_dq) @ parts.core_SQp[expert] @ parts.spread_pd


def absent_standins(parts, x_d):
    """The stand-ins of the experts that a layer does not hold."""
    absent_Qp = parts.core_all_Qp - sum(parts.core_SQp)
    return with_bias((x_d @ parts.basis_dq)[None])[0] @ absent_Qp @ parts.spread_pd


def with_bias(z_Tq):
    return torch.nn.functional.pad(z_Tq, (0, 1), value=1.0)


def ridge_oracle(x_TF, y_TO, strength):
    """argmin ||Y - X W||^2 + strength * mean(diag(X'X)) * ||W||^2 as least squares with rows added below X."""
    features = x_TF.shape[1]
    penalty = np.sqrt(strength * np.mean(np.sum(x_TF**2, axis=0)))
    above = np.concatenate([x_TF, penalty * np.eye(features)])
    return np.linalg.lstsq(above, np.concatenate([y_TO, np.zeros((features, y_TO.shape[1]))]), rcond=None)[0]


# discovery

def transport_cost(cost_mE):
    """Least total cost of m points in E clusters of m / E places: one column for each place."""
    size = cost_mE.shape[0] // cost_mE.shape[1]
    expanded = np.repeat(cost_mE, size, axis=1)
    rows, places = linear_sum_assignment(expanded)
    return expanded[rows, places].sum()


def inertia(points_md, labels_m):
    """sum over points of ||w - mean of its cluster||^2."""
    total = 0.0
    for label in set(labels_m.tolist()):
        own = points_md[labels_m == label]
        total += sum(float(((point - own.mean(0)) ** 2).sum()) for point in own)
    return total


# evaluation

def full_context_nll(model, ids):
    """-sum_t log p(x_t | x_1 .. x_{t-1}), one prefix after the other."""
    total = 0.0
    for t in range(1, len(ids)):
        logits = model(input_ids=ids[None, :t]).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, 0)[ids[t]])
    return total


def strided_nll(model, ids, window, stride):
    """Token t is seen by the first window that reaches it; windows start `min(stride, window - 1)` apart."""
    step = min(stride, window - 1)
    total = 0.0
    for t in range(1, len(ids)):
        begin = 0
        while begin + window <= t:
            begin += step
        logits = model(input_ids=ids[None, begin:t]).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, 0)[ids[t]])
    return total


# wire and federation

def reference_varint(value):
    """LEB128 of one integer, one byte at a time."""
    out = []
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def reference_crc32c(data):
    """Bit by bit, as in RFC 3720: the reflected polynomial 0x1EDC6F41."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def reference_edges(codes):
    """Where zeros turn into non-zeros and back, by walking the values."""
    return [k for k, code in enumerate(codes) if bool(code) != (k > 0 and bool(codes[k - 1]))]


def reference_body_sizes(codes, width):
    """Bytes of the body in each encoding, by walking the values; `width` bytes for each value sent."""
    nonzero = [k for k, code in enumerate(codes) if code]
    runs, current, length = [], False, 0
    for code in codes:
        if bool(code) != current:
            runs.append(length)
            current, length = bool(code), 0
        length += 1
    runs.append(length)
    gaps = [k - before - 1 for before, k in zip([-1, *nonzero], nonzero, strict=False)]

    def section(numbers):
        body = b"".join(map(reference_varint, numbers))
        return len(reference_varint(len(body)) + body)

    return {
        "dense": len(codes) * width,
        "rle": section(runs) + len(nonzero) * width,
        "bitmap": -(-len(codes) // 8) + len(nonzero) * width,
        "delta-varint": section(gaps) + len(nonzero) * width,
    }


def reference_inclusion(scores, budget, roots, floor):
    """Water-filling by bisection over c; the scores must allow the budget."""
    low, high = 0.0, 1.0

    def h(c):
        return np.concatenate([np.ones(roots), np.clip(c * scores[roots:], floor, 1)])

    while h(high).sum() < budget:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if h(middle).sum() < budget else (low, middle)
    return h(high)


class EnumeratedGenerator:
    """Stands in for a generator: every call gives the outcome that `path` says, the first one past its end."""

    def __init__(self, path):
        self.path, self.counts = path, []

    def _outcome(self, count):
        self.counts.append(count)
        return self.path[len(self.counts) - 1] if len(self.counts) <= len(self.path) else 0

    def integers(self, high):
        return self._outcome(high)

    def permutation(self, size):
        return np.array(_permutations(size)[self._outcome(math.factorial(size))])


@functools.cache
def _permutations(size):
    return list(itertools.permutations(range(size)))


def exact_design(sample):
    """{subset: exact probability} of `sample(rng)`, over everything that its generator may give."""
    design, path = {}, []
    while True:
        rng = EnumeratedGenerator(path)
        subset = tuple(sample(rng).tolist())
        design[subset] = design.get(subset, 0) + Fraction(1, math.prod(rng.counts))
        path = path + [0] * (len(rng.counts) - len(path))
        while path and path[-1] == rng.counts[len(path) - 1] - 1:
            path.pop()
        if not path:
            break
        path[-1] += 1
    assert sum(design.values()) == 1
    return design


def inclusion(design):
    """{expert: probability} of a design."""
    held = sorted({e for subset in design for e in subset})
    return {e: sum(p for subset, p in design.items() if e in subset) for e in held}


def reference_aggregate(replies, total, rule, clip):
    """The rules of design section 8, one reply at a time; a reply is (deltas, |D_i|, {unit: p})."""
    updates = {}
    for unit in {unit for deltas, _, _ in replies for unit in deltas}:
        held = [(deltas[unit], size / total, p[unit]) for deltas, size, p in replies if unit in deltas]
        if rule == "ht":
            updates[unit] = sum(w / p * delta for delta, w, p in held)
        elif rule == "clipped":
            updates[unit] = sum(w * min(1 / p, clip) * delta for delta, w, p in held)
        elif rule == "hajek":
            updates[unit] = sum(w / p * delta for delta, w, p in held) / sum(w / p for _, w, p in held)
        else:
            updates[unit] = sum(w * delta for delta, w, _ in held) / sum(w for _, w, _ in held)
    return updates


def reference_trimmed_mean(values, trim):
    """One coordinate: the mean without the int(trim n) smallest and as many of the largest."""
    cut = int(trim * len(values))
    kept = sorted(map(float, values))[cut : len(values) - cut]
    return sum(kept) / len(kept)


def reference_clipped(replies, norm_bound):
    """The replies with each unit's delta no longer than norm_bound x the median, the lower of two middle ones, of the
    norms of the replies that hold it."""
    clipped = []
    for deltas, size, p in replies:
        kept = {}
        for unit, delta in deltas.items():
            norms = sorted(math.sqrt((other[unit] ** 2).sum()) for other, _, _ in replies if unit in other)
            norm, bound = math.sqrt((delta**2).sum()), norm_bound * statistics.median_low(norms)
            kept[unit] = delta if norm <= bound else bound / norm * delta
        clipped.append((kept, size, p))
    return clipped


def reference_fedopt(theta, deltas, optimizer, eta, momentum, beta_1, beta_2, tau):
    """Scalar FedOpt (2003.00295, algorithm 2) and FedAvgM over a sequence of deltas."""
    m, v, velocity = 0.0, tau**2, 0.0
    for delta in deltas:
        if optimizer == "sgd":
            theta += eta * delta
        elif optimizer == "momentum":
            velocity = momentum * velocity + delta
            theta += eta * velocity
        else:
            m = beta_1 * m + (1 - beta_1) * delta
            if optimizer == "adam":
                v = beta_2 * v + (1 - beta_2) * delta**2
            else:
                v = v - (1 - beta_2) * delta**2 * math.copysign(1, v - delta**2)
            theta += eta * m / (math.sqrt(v) + tau)
    return theta
