"""Which client is of which tier: the same on the server and on every client, from the run's configuration alone."""

from __future__ import annotations

from sam_ds.config import RunConfig


def dealt_tiers(config: RunConfig) -> list[str]:
    """The tier of every client: shares by largest remainder, spread evenly over the clients' order so that each
    domain gets every tier where there are enough clients."""
    clients = config.federation.clients
    names = [name for name, tier in config.tiers.items() if tier.share > 0.0]
    exact = [config.tiers[name].share * clients for name in names]
    counts = [int(value) for value in exact]
    for index in sorted(range(len(names)), key=lambda i: counts[i] - exact[i])[: clients - sum(counts)]:
        counts[index] += 1
    dealt: list[str] = []
    given = [0] * len(names)
    for position in range(1, clients + 1):
        # Whole numbers: a tie is a tie on every machine, and goes to the smallest tier.
        behind = [count * position - clients * has for count, has in zip(counts, given, strict=True)]
        index = behind.index(max(behind))
        given[index] += 1
        dealt.append(names[index])
    return dealt
