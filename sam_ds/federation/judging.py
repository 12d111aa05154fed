"""How good the server's model is: perplexity by domain, the loss after a round, and what edits of the graph are judged
by. What it takes is added to `server.evaluation_seconds`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sam_ds.evaluation.domains import DomainScore, headline, perplexity_by_domain
from sam_ds.experts.personal import personal_graph, text_condition
from sam_ds.federation.server import Server
from sam_ds.graph.assembler import hard_graph

Graph: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
"""(L, E, E) edges, and (L, E + 1) what the assembler knows of the text, whose own gains messages then have."""
Texts: TypeAlias = Mapping[str, Sequence[str]]
Mode: TypeAlias = Callable[[], AbstractContextManager[None]]


def evaluate(server: Server, split: str, tokens: int) -> dict[str, Any]:
    """Perplexities of the merged model and, if asked for, of the sparse one, each domain over its graph:
    {"merged": {"domains", "headline", "forgetting"}, "sparse": the same or None}.

    Where clients have units of their own, the mean over the clients with mostly text of the domain, of all clients
    where there are none."""
    with _timed(server):
        texts = {name: getattr(splits, split) for name, splits in server.corpus.domains.items()}
        whole: dict[str, Graph] = dict.fromkeys(texts, (server.model.graph(), None))
        result: dict[str, Any] = {"merged": _judged(server, texts, tokens, server.model.dense, whole), "sparse": None}
        if server.config.evaluation.sparse and server.method.sparse:
            graphs = _domain_graphs(server) if server.method.assembles else whole
            routed = partial(server.model.active, server.config.sam.top_k)
            result["sparse"] = _judged(server, texts, tokens, routed, graphs)
    return result


@torch.no_grad()
def validation_loss(server: Server, graph: NDArray[np.bool_]) -> float:
    """Nats a token of the sparse model over this graph, on a fixed batch of public text."""
    with _timed(server), server.model.over(torch.from_numpy(graph)):
        return _loss(server, server.public.validation)


def loss_in_use(server: Server) -> Callable[[NDArray[np.bool_]], float]:
    """(L, E, E) -> nats a token of the sparse model where every domain routes over its own edges of that graph, and
    sends messages with its own gains, as clients do: what an edit of the graph is judged by. On a fixed batch of
    every domain's public (or valid) text."""
    edges, roots = server.config.federation.edges, server.config.sam.roots
    with _timed(server):
        conditions = {name: text_condition(server.model, ids) for name, ids in server.public.of_domains.items()}

    @torch.no_grad()
    def loss(graph_LEE: NDArray[np.bool_]) -> float:
        losses = []
        with _timed(server):
            for name, ids in server.public.validation_of_domains.items():
                own_LEE = hard_graph(server.assembler(), conditions[name], graph_LEE, edges, roots)
                with server.model.over(torch.from_numpy(own_LEE), conditions[name]):
                    losses.append(_loss(server, ids))
        return float(np.mean(losses))

    return loss


@contextmanager
def _timed(server: Server) -> Iterator[None]:
    began = time.perf_counter()
    yield
    server.evaluation_seconds += time.perf_counter() - began


def _loss(server: Server, ids_BS: torch.Tensor) -> float:
    return float(server.model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss)


def _domain_graphs(server: Server) -> dict[str, Graph]:
    """The graph of each domain: the assembler's for a client that holds everything and whose text is the domain's
    public (or valid) text, as the model sees it now."""
    edges = server.config.federation.edges
    own = {name: personal_graph(server.model, ids, edges=edges) for name, ids in server.public.of_domains.items()}
    return {name: (personal.graph_LEE, personal.condition) for name, personal in own.items()}


def _judged(server: Server, texts: Texts, tokens: int, mode: Mode, graphs: Mapping[str, Graph]) -> dict[str, Any]:
    state, clients = server.state, range(len(server.domains))
    if not state.personal:
        return _summary(server, _score(server, texts, tokens, mode, graphs))
    now = [server.domains[server.holder(client, state.round)] for client in clients]
    judges = {name: [c for c, domain in enumerate(now) if domain == name] for name in texts}
    sums = {name: DomainScore(nll_sum=0.0, tokens=0) for name in texts}
    for client in clients:
        mine = {name: text for name, text in texts.items() if client in (judges[name] or [client])}
        server.write(state.units | state.personal.get(client, {}))
        for name, score in _score(server, mine, tokens, mode, graphs).items():
            sums[name] = DomainScore(
                nll_sum=sums[name].nll_sum + score.nll_sum, tokens=sums[name].tokens + score.tokens
            )
    server.follow_state()
    return _summary(server, sums)


def _score(
    server: Server, texts: Texts, tokens: int, mode: Mode, graphs: Mapping[str, Graph]
) -> dict[str, DomainScore]:
    section = server.config.evaluation
    scores: dict[str, DomainScore] = {}
    for name, own in texts.items():
        with mode(), server.model.over(*graphs[name]):
            scores |= perplexity_by_domain(
                server.model, server.tokenizer, {name: own}, window=section.window, stride=section.stride,
                batch=section.batch, max_tokens=tokens,
            )  # fmt: skip
    return scores


def _summary(server: Server, scores: Mapping[str, DomainScore]) -> dict[str, Any]:
    forgetting = [name for name in scores if name in server.config.federation.forgetting]
    return {
        "domains": {name: score.perplexity for name, score in scores.items()},
        "headline": headline(scores, [name for name in scores if name not in forgetting]),
        "forgetting": headline(scores, forgetting) if forgetting else None,
    }
