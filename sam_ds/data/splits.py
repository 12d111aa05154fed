"""A corpus: named domains, each cut into public, train, valid and test documents.

Clients hold train documents only. The public documents are what the server may read: a base model is trained
on them, experts are found with them, stand-ins are refitted on them. A *forgetting* domain is held by no
client, so what a run loses on it is what it forgets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """The documents of one domain; no document is in two of them."""

    public: tuple[str, ...]
    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Domains in alphabetical order; `fingerprint`: 16 hex digits of their names and texts, in order."""

    name: str
    domains: dict[str, Splits]
    fingerprint: str

    @property
    def public(self) -> tuple[str, ...]:
        """The public documents of all domains."""
        return tuple(text for splits in self.domains.values() for text in splits.public)


def build_corpus(name: str, domains: Mapping[str, Splits]) -> Corpus:
    """A corpus of these domains, sorted and fingerprinted."""
    digest = hashlib.sha256()
    for domain in sorted(domains):
        for split in fields(Splits):
            texts: tuple[str, ...] = getattr(domains[domain], split.name)
            for part in (domain, split.name, str(len(texts)), *texts):
                encoded = part.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
    ordered = {domain: domains[domain] for domain in sorted(domains)}
    return Corpus(name=name, domains=ordered, fingerprint=digest.hexdigest()[:16])
