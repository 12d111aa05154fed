"""`SamConfig`: how to turn a feed-forward network into a graph of experts, and what that makes of its sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from sam_ds.config import RunConfig
from sam_ds.errors import InputError, nearest

CONFIG_FILE = "sam_config.json"
ROUTERS = ("roots", "linear", "low_rank", "mlp", "mean_key", "representative")


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """How to turn an FFN into a graph of experts."""

    num_experts: int = 16
    """E, experts a layer; must divide the number of FFN neurons."""
    top_k: int = 12
    """k, experts a token visits in each layer, roots included."""
    roots: int = 1
    """r, experts every token visits: the entries of the graph."""
    root_choice: str = "spread"
    """Which neurons become roots: those whose output varies most (`spread`), or of the largest |w g| (`saliency`)."""
    features: str = "weights"
    """What neurons are clustered by: `weights` (EMoE), `activations` (CMoE), `output`, or nothing (`random`)."""
    regroups: int = 4
    """How often neurons are regrouped after it for the routes they will be visited on (discovery/regroup.py)."""
    router: str = "roots"
    """What the gate scores experts by (experts/router.py)."""
    router_rank: int = 32
    """Rank of the `low_rank` router, inner units of the `mlp`."""
    routing: str = "threshold"
    """Whether a token visits the experts that score enough, top_k of them on average over text like the calibration
    text (`threshold`), or always as many (`top_k`). The thresholds stay where calibration found them: where gates
    train, it is `top_k` that keeps the budget."""
    standin: str = "linear"
    """What stands in for an expert not visited: `none`, `mean` or `linear`."""
    standin_rank: int = 8
    """q, rank of the `linear` stand-ins."""
    allocation: str = "sensitivity"
    """Whether every layer visits top_k (`uniform`), or top_k on average, more where the loss feels it more."""
    density: float = 1.0
    """Share of the E (E - 1) / 2 possible edges that the initial graph has; a path that is missing costs quality."""
    graph: str = "coactivation"
    """Which edges these are: between experts that are visited together (`coactivation`), or any (`random`)."""
    semantics: str = "reach"
    """What an edge p -> e means: a token that visits p may go on to e (`reach`), and what p puts out for it is added to
    e's input with a learned gain, 0 at the start (`message`: experts/message.py)."""
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
        for name, least in (("standin_rank", 1), ("router_rank", 1), ("regroups", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SamConfig:
        """Raises InputError on an unknown key, naming the nearest."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"unknown key {key!r} in {CONFIG_FILE}{nearest(key, known)}")
        return cls(**values)

    @classmethod
    def of_run(cls, config: RunConfig) -> SamConfig:
        """The conversion part of a run's configuration.

        Tokens visit a fixed number of experts: under training, scores leave the thresholds that calibration found.
        """
        section = {name: value for name, value in asdict(config.sam).items() if name != "calibration_tokens"}
        return cls(**section, routing="top_k", seed=config.seed)

    def router_shape(self, *, hidden: int, neurons: int, gated: bool) -> tuple[int, int]:
        """(I, F) of a layer of so many neurons, as `router_shape` says."""
        return router_shape(
            self.router, hidden=hidden, num_experts=self.num_experts,
            root_neurons=self.roots * neurons // self.num_experts, rank=self.router_rank, gated=gated,
        )  # fmt: skip

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


def router_shape(
    router: str, *, hidden: int, num_experts: int, root_neurons: int, rank: int, gated: bool
) -> tuple[int, int]:
    """(I, F): units of the inner product that a gate's features begin with, and these (experts/router.py)."""
    if router == "roots":
        return 0, hidden + root_neurons + 1
    if router in ("low_rank", "mlp"):
        return rank, rank + 1
    if router == "representative":
        return num_experts * (2 if gated else 1), num_experts
    return 0, hidden + (router == "linear")


_CHOICES = (
    ("root_choice", ("spread", "saliency")),
    ("features", ("weights", "activations", "output", "random")),
    ("graph", ("coactivation", "random")),
    ("router", ROUTERS),
    ("routing", ("threshold", "top_k")),
    ("standin", ("none", "mean", "linear")),
    ("allocation", ("uniform", "sensitivity")),
    ("semantics", ("reach", "message")),
)
