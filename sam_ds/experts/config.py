"""`SamConfig`: how to turn a feed-forward network into a graph of experts, and what that makes of its sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from sam_ds.errors import InputError, nearest

CONFIG_FILE = "sam_config.json"


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """How to turn an FFN into a graph of experts."""

    num_experts: int = 16
    """E, experts a layer; must divide the number of FFN neurons."""
    top_k: int = 12
    """k, experts a token visits in each layer, roots included."""
    roots: int = 2
    """r, experts every token visits: the entries of the graph."""
    features: str = "weights"
    """What neurons are clustered by: `weights` (EMoE), `activations` (CMoE) or `output`."""
    standin: str = "linear"
    """What stands in for an expert not visited: `none`, `mean` or `linear`."""
    standin_rank: int = 16
    """q, rank of the `linear` stand-ins."""
    allocation: str = "sensitivity"
    """Whether every layer visits top_k (`uniform`), or top_k on average, more where the loss feels it more."""
    density: float = 0.5
    """Share of the E (E - 1) / 2 possible edges that the initial graph has."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise InputError(f"num_experts must be at least 2, got {self.num_experts}")
        if not 1 <= self.roots <= self.top_k:
            raise InputError(f"roots must be from 1 to top_k={self.top_k}, got {self.roots}")
        if self.top_k > self.num_experts:
            raise InputError(f"top_k={self.top_k} exceeds num_experts={self.num_experts}; lower it")
        if not 0.0 < self.density <= 1.0:
            raise InputError(f"density must be in (0, 1], got {self.density}")
        for name, choices in _CHOICES:
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.standin_rank < 1:
            raise InputError(f"standin_rank must be at least 1, got {self.standin_rank}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamConfig:
        """Raises InputError on an unknown key, naming the nearest."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"unknown key {key!r} in {CONFIG_FILE}{nearest(key, known)}")
        return cls(**values)

    def standin_shape(self, hidden: int) -> tuple[int, int]:
        """(q, p) of a layer of this hidden size, as `standin_shape` says."""
        return standin_shape(
            self.standin, num_experts=self.num_experts, roots=self.roots, rank=self.standin_rank, hidden=hidden
        )  # fmt: skip


def standin_shape(standin: str, *, num_experts: int, roots: int, rank: int, hidden: int) -> tuple[int, int]:
    """(q, p): the inputs that a layer's stand-ins read and the output directions they write (experts/standins.py).

    A mean writes one direction for each expert that is not a root, a linear stand-in 3 q: more do not pay (conversion
    benchmark). No layer has more directions than its hidden size. Raises InputError for a stand-in that does not exist.
    """
    outputs = {"none": 0, "mean": num_experts - roots, "linear": 3 * rank}
    if standin not in outputs:
        raise InputError(f"standin must be one of {', '.join(outputs)}, got {standin!r}")
    return (rank if standin == "linear" else 0), min(hidden, outputs[standin])


_CHOICES = (
    ("features", ("weights", "activations", "output")),
    ("standin", ("none", "mean", "linear")),
    ("allocation", ("uniform", "sensitivity")),
)
