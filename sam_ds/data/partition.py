"""Which documents each client has.

The partitioners have the names and the arguments of `flwr_datasets` where those apply (that package does not
install beside `datasets` 5); what they part by is the domain. Only domains with train documents take part. A
client's valid documents are dealt like its train documents, so they have its mixture of domains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sam_ds.data.splits import Corpus
from sam_ds.errors import InputError

Document = tuple[str, str]  # domain, text


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientData:
    """What one client trains on. `domain` is the one with most of its documents; `valid` may be empty."""

    client: int
    domain: str
    texts: tuple[str, ...]
    valid: tuple[str, ...]

    @property
    def examples(self) -> int:
        """The number of documents, |D_i|."""
        return len(self.texts)


@dataclass(frozen=True, kw_only=True, slots=True)
class NaturalIdPartitioner:
    """One domain a client: clients are dealt to the domains in turn, a domain's documents to its clients."""

    num_partitions: int

    def partition(self, corpus: Corpus) -> list[ClientData]:
        """`num_partitions` clients. Raises `InputError` for fewer clients than domains, or documents."""
        domains = _held(corpus)
        if self.num_partitions < len(domains):
            raise InputError(f"clients must be at least {len(domains)}, the number of domains, so that each "
                             f"is held, got {self.num_partitions}: raise it, list domains under forgetting, "
                             f"or part by 'dirichlet' or 'iid'")
        clients = []
        for client in range(self.num_partitions):
            which, turn = client % len(domains), client // len(domains)
            shared = range(which, self.num_partitions, len(domains))
            splits = corpus.domains[domains[which]]
            train = [(domains[which], text) for text in splits.train[turn::len(shared)]]
            valid = splits.valid[turn::len(shared)]
            clients.append(_client(client, train, valid, self.num_partitions))
        return clients


@dataclass(frozen=True, kw_only=True, slots=True)
class IidPartitioner:
    """Every client has the same mixture: the documents of all domains are dealt in turn."""

    num_partitions: int

    def partition(self, corpus: Corpus) -> list[ClientData]:
        """`num_partitions` clients. Raises `InputError` if there are fewer documents."""
        domains = _held(corpus)
        train = [(domain, text) for domain in domains for text in corpus.domains[domain].train]
        valid = tuple(text for domain in domains for text in corpus.domains[domain].valid)
        return [_client(client, train[client::self.num_partitions], valid[client::self.num_partitions],
                        self.num_partitions) for client in range(self.num_partitions)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DirichletPartitioner:
    """Each domain is parted by proportions drawn from Dirichlet(alpha) over the clients (arXiv 1909.06335).

    A client left with fewer than `min_partition_size` documents gets some from the client that has most;
    `flwr_datasets` draws again instead, which for many clients and a small alpha does not end.
    """

    num_partitions: int
    alpha: float
    min_partition_size: int = 10
    seed: int = 42

    def partition(self, corpus: Corpus) -> list[ClientData]:
        """`num_partitions` clients. Raises `InputError` for alpha <= 0 or too few documents."""
        if not self.alpha > 0:
            raise InputError(f"alpha must be above 0, got {self.alpha}")
        domains = _held(corpus)
        total = sum(len(corpus.domains[domain].train) for domain in domains)
        if total < self.num_partitions * self.min_partition_size:
            raise InputError(f"{self.num_partitions} clients of {self.min_partition_size} documents or more "
                             f"need {self.num_partitions * self.min_partition_size}, the corpus has {total}: "
                             f"lower clients")
        rng = np.random.default_rng(self.seed)
        train: list[list[Document]] = [[] for _ in range(self.num_partitions)]
        valid: list[list[str]] = [[] for _ in range(self.num_partitions)]
        for domain in domains:
            splits = corpus.domains[domain]
            shares = rng.dirichlet(np.full(self.num_partitions, self.alpha))
            for client, chosen in enumerate(_cut(len(splits.train), shares, rng)):
                train[client].extend((domain, splits.train[index]) for index in chosen)
            for client, chosen in enumerate(_cut(len(splits.valid), shares, rng)):
                valid[client].extend(splits.valid[index] for index in chosen)
        while len(poorest := min(train, key=len)) < self.min_partition_size:
            poorest.append(max(train, key=len).pop())
        return [_client(client, train[client], valid[client], self.num_partitions)
                for client in range(self.num_partitions)]


def holder(client: int, round_: int, *, clients: int, shift_round: int) -> int:
    """Whose documents a client has in a round: from the round of the shift on (0: never) those the next one had."""
    return (client + 1) % clients if 0 < shift_round <= round_ else client


def partition_clients(corpus: Corpus, *, clients: int, scheme: str = "domain", alpha: float = 0.5,
                      seed: int = 0) -> list[ClientData]:
    """The clients of a run, in order of their number; each train document goes to exactly one of them.

    scheme: `"domain"` (`NaturalIdPartitioner`), `"iid"`, or `"dirichlet"` with `alpha` and `seed`, where the
        least that a client has is 10 documents, or a quarter of an even share if that is fewer.

    Raises `InputError` for another scheme, fewer than one client, or fewer documents than clients.
    """
    if clients < 1:
        raise InputError(f"clients must be at least 1, got {clients}")
    if scheme == "domain":
        return NaturalIdPartitioner(num_partitions=clients).partition(corpus)
    if scheme == "iid":
        return IidPartitioner(num_partitions=clients).partition(corpus)
    if scheme == "dirichlet":
        total = sum(len(splits.train) for splits in corpus.domains.values())
        least = min(10, max(1, total // (4 * clients)))
        return DirichletPartitioner(num_partitions=clients, alpha=alpha, min_partition_size=least,
                                    seed=seed).partition(corpus)
    raise InputError(f"partition must be 'domain', 'dirichlet' or 'iid', got {scheme!r}")


def _held(corpus: Corpus) -> list[str]:
    domains = [name for name, splits in corpus.domains.items() if splits.train]
    if not domains:
        raise InputError(f"the corpus {corpus.name!r} leaves clients no train documents: all are public "
                         f"(public_every, forgetting)")
    return domains


def _cut(documents: int, shares: np.ndarray, rng: np.random.Generator) -> list[list[int]]:
    """Indices for each client, ascending; the running sum of the shares is rounded to whole documents."""
    ends = np.rint(np.cumsum(shares)[:-1] * documents).astype(int)
    return [sorted(part.tolist()) for part in np.split(rng.permutation(documents), ends)]


def _client(client: int, train: Sequence[Document], valid: Sequence[str], clients: int) -> ClientData:
    if not train:
        raise InputError(f"client {client} of {clients} would have no document: lower clients")
    # The first of the most common: domains come in alphabetical order.
    domain = Counter(domain for domain, _ in train).most_common(1)[0][0]
    texts = tuple(text for _, text in train)
    return ClientData(client=client, domain=domain, texts=texts, valid=tuple(valid))
