"""The one configuration schema of a run, for the launcher's TOML and for Flower's flat run config.

A run is a value: it is checked when it is built, printed, saved in the run folder and read back. Ranges and
choices stand in the annotations; rules between fields are in `RunConfig`. No check here touches a device, the
network or a model.
"""

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from sam_ds.checked import (
    Checked,
    Count,
    Decay,
    Fraction,
    Interval,
    Natural,
    NonNegative,
    Positive,
    Probability,
    checked,
)
from sam_ds.errors import InputError, nearest
from sam_ds.tables import Scalar, dump, leaves, merge, parse_value

Section = TypeVar("Section", bound=Checked)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamSection(Checked):
    """How the dense model becomes experts and a graph of them."""

    prefix: ClassVar[str] = "sam."
    num_experts: Count = 16  # E, per layer
    top_k: Count = 12  # k, experts a token visits, roots included
    roots: Count = 2  # r, always visited and always held
    root_choice: Literal["spread", "saliency"] = "spread"  # what makes neurons roots: varying output, or |w g|
    features: Literal["weights", "activations", "output", "random"] = "weights"  # what the neurons are clustered by
    regroups: Natural = 4  # how often they are regrouped for the routes
    router: Literal["linear", "roots", "low_rank", "mlp", "mean_key", "representative"] = "roots"
    router_rank: Count = 32  # of low_rank and mlp
    standin: Literal["none", "mean", "linear"] = "linear"  # what represents an expert that is not visited
    standin_rank: Count = 16  # q
    calibration_tokens: Count = 16384
    allocation: Literal["uniform", "sensitivity"] = "sensitivity"  # k of every layer, or on average over the layers
    density: Fraction = 0.5  # of the E (E - 1) / 2 possible edges of a layer, in the first graph
    graph: Literal["coactivation", "random"] = "coactivation"  # which edges the first graph has
    semantics: Literal["reach", "message"] = "reach"  # an edge lets a token go on, or carries outputs with a gain too


@dataclass(frozen=True, kw_only=True, slots=True)
class FederationSection(Checked):
    """Who takes part, how the answers are combined, how the graph changes."""

    prefix: ClassVar[str] = "federation."
    rounds: Count = 6
    clients: Count = 8  # N
    clients_per_round: Count = 8  # K; the expected number under Poisson sampling
    sampling: Literal["without_replacement", "poisson", "stratified"] = "without_replacement"
    partition: Literal["domain", "dirichlet", "iid"] = "domain"
    alpha: Positive = 0.5  # Dirichlet concentration
    forgetting: tuple[str, ...] = ()  # domains no client holds: they measure forgetting
    public_every: Annotated[int, Interval(2)] = 4  # documents of index mod this = 0 are public
    edges: Count = 48  # B, edges a client may use per layer
    explore: Probability = 0.05  # eps, an edge of a client's mask flips
    floor: Probability = 0.3  # least inclusion probability of an expert that is not a root
    score: Literal["uniform", "usage", "reach", "fitness", "greedy", "anchors"] = "reach"  # what experts are drawn by
    fitness_decay: Decay = 0.8  # of the running mean of how often a client's tokens visit an expert it holds
    load_decay: Decay = 0.8  # of the running mean of the share of a round's clients that hold an expert
    fitness_weight: NonNegative = 1.0
    load_weight: NonNegative = 0.5
    aggregation: Literal["ht", "hajek", "clipped", "none"] = "ht"
    clip: Annotated[float, Interval(1)] = 10.0  # largest 1/p under "clipped"; above it the other rules warn
    robust: Literal["none", "norm_clip", "trimmed_mean", "median"] = "none"  # the last two replace `aggregation`
    trim: Annotated[float, Interval(0, 0.5, "[)")] = 0.2  # share of the replies that trimmed_mean cuts at each end
    norm_bound: Positive = 2.0  # of norm_clip, times the median norm of the replies for a unit
    server_optimizer: Literal["sgd", "momentum", "adam", "yogi"] = "sgd"
    server_lr: Positive = 1.0
    server_momentum: Decay = 0.9
    beta_1: Decay = 0.9
    beta_2: Decay = 0.99
    tau: Positive = 1e-3  # adaptivity of adam and yogi
    edit_every: Count = 3  # T_m, rounds
    max_edits: Natural = 8  # rho_max, over all layers
    min_offered: Natural = 200  # times an edge must have been offered before it may be pruned
    edit_tolerance: NonNegative = 1e-3  # nats per token; an edit that costs more is rolled back
    refit_standins: bool = False  # every T_m rounds, after the edits: on public text, as the experts have drifted
    shift_round: Natural = 0  # from this round on a client has the documents of the next one; 0 = never
    edit_noise: NonNegative = 0.0  # on the counters, in units of what one client can change in a period; 0 = none
    edit_clip: Positive = 16.0  # with noise: L2 norm of a client's counters, over a round's tokens; 8 sqrt(L) is usual
    dp_noise: NonNegative = 0.0  # on the weights' updates, in units of dp_clip; 0 = none (federation/privacy.py)
    dp_clip: Positive = 1.0  # with noise: L2 norm of what one client adds to a round's update, its weight included
    dp_delta: Annotated[float, Interval(0, 1, "()")] = 1e-5  # at which epsilon is given; below 1 / clients
    void_retries: Natural = 2  # repeats of a round in which nobody answered, before the run stops
    timeout_seconds: Positive = 3600.0  # from the start of a round, for registration and for tiers that do not say
    min_clients: Natural = 0  # that must register for the run to begin; 0 = clients_per_round

    @property
    def least_clients(self) -> int:
        """`min_clients`, resolved: all, where a client comes to have the documents of another."""
        return self.clients if self.shift_round else self.min_clients or self.clients_per_round

    @property
    def floor_in_force(self) -> float:
        """`floor`, and 0 where the choice of experts is not drawn."""
        return 0.0 if self.score == "greedy" else self.floor


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection(Checked):
    """One client's local training in one round."""

    prefix: ClassVar[str] = "train."
    steps: Count = 16
    batch: Count = 4  # sequences a step, over all ranks of the client
    sequence: Annotated[int, Interval(2)] = 128  # tokens
    lr: Positive = 2e-3
    final_lr: Fraction = 1.0  # the last round's share of lr; it falls linearly over the rounds
    warmup_steps: Natural = 3
    weight_decay: NonNegative = 0.0
    clip: NonNegative = 1.0  # gradient norm; 0 leaves it alone
    lora_rank: Count = 16
    lora_alpha: Positive = 16.0
    factors: Literal["seed", "text"] = "text"  # what the frozen low-rank factors are from; after a redraw the seed
    attention_rank: Natural = 0  # of low-rank updates of the attention, shared by all clients; 0 = none
    redraw_every: Natural = 0  # rounds after which low-rank rows are merged and new frozen factors drawn; 0 = never
    whole: Probability = 0.0  # share of the steps that visit all experts held: the merged model's part (1903.05134)
    dense: bool = True  # also what belongs to no expert: all of it beside `full` rows, the norms beside `lora` slices

    def whole_steps(self) -> list[bool]:
        """Of each step, whether it visits all experts held: `whole` of them, rounded down, spread evenly."""
        done = [int(step * self.whole) for step in range(self.steps + 1)]
        return [after > before for before, after in zip(done, done[1:], strict=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class WireSection(Checked):
    """How updates are encoded."""

    prefix: ClassVar[str] = "wire."
    values: Literal["raw", "bf16", "int8", "int4"] = "raw"  # of updates; the last two with error feedback, but for ht
    compress: bool = False  # zstd over the encoded body; needs the extra `zstd`


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSection(Checked):
    """Held-out perplexity, in tokens of the model's own tokenizer."""

    prefix: ClassVar[str] = "evaluation."
    every: Count = 1  # rounds
    split: Literal["valid", "test"] = "valid"  # of the text that is scored during the run
    window: Annotated[int, Interval(2)] = 256
    stride: Count = 256
    batch: Count = 8  # windows
    max_tokens: Annotated[int, Interval(2)] = 2048  # per domain, during the run
    test_tokens: Annotated[int, Interval(2)] = 8192  # per domain of the test split, before and after
    sparse: bool = True  # also with k experts visited, beside the merged model


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeSection(Checked):
    """Processes and files."""

    prefix: ClassVar[str] = "runtime."
    ranks_per_client: Count = 1  # g, the size of a worker group where its tier does not say
    threads: Natural = 0  # per rank, and of a server without ranks; 0 = cores / ranks
    keep_checkpoints: Count = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class TierSection(Checked):
    """One class of clients."""

    prefix: ClassVar[str] = "tier "
    experts: Count  # held per layer, roots included
    sends: Natural = 0  # of them, drawn anew each round; 0 = all: for an uplink narrower than the memory
    memory_gib: Positive
    precision: Literal["fp32", "bf16", "nf4"] = "fp32"  # of the frozen weights; nf4 computes in bf16
    trains: Literal["full", "lora"] = "full"  # rows of the held experts, or their slices of an adapter
    ds_config: str = "cpu_zero2.json"  # a file of ds_configs/, or a path
    ranks: Natural = 0  # of one client's worker group; 0 = runtime.ranks_per_client
    timeout_seconds: NonNegative = 0.0  # from the start of a round to its clients' answers; 0 = federation's
    share: Probability  # of the clients; 0 = none


def _default_tiers() -> dict[str, TierSection]:
    return {
        "small": TierSection(experts=8, memory_gib=0.5, share=0.375),
        "medium": TierSection(experts=12, memory_gib=1.0, share=0.375),
        "large": TierSection(experts=16, memory_gib=2.0, share=0.25),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig(Checked):
    """A whole run. Raises `InputError` for a value out of its range and for values that contradict."""

    prefix: ClassVar[str] = ""
    seed: Natural = 0
    model: str = "embedded"  # or a Hugging Face folder or hub id
    data: str = "embedded"  # or a folder of <domain>/{train,valid,test}.*, or a name for `datasets`
    method: Literal["sam", "fedavg", "fedit", "static_mask", "local", "central"] = "sam"
    out: str = "runs/default"  # run folder
    sam: SamSection = field(default_factory=SamSection)
    federation: FederationSection = field(default_factory=FederationSection)
    train: TrainSection = field(default_factory=TrainSection)
    wire: WireSection = field(default_factory=WireSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    tiers: dict[str, TierSection] = field(default_factory=_default_tiers)

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        sam, federation, evaluation = self.sam, self.federation, self.evaluation
        _at_most("sam.top_k", sam.top_k, "sam.num_experts", sam.num_experts)
        _at_most("sam.roots", sam.roots, "sam.top_k", sam.top_k)
        _at_most("federation.clients_per_round", federation.clients_per_round,
                 "federation.clients", federation.clients)
        _at_most("federation.min_clients", federation.min_clients, "federation.clients", federation.clients)
        _at_most("evaluation.stride", evaluation.stride, "evaluation.window", evaluation.window)
        if federation.refit_standins and sam.standin == "none":
            raise InputError("federation.refit_standins = true, but sam.standin = 'none' has nothing to fit: give "
                             "false, or stand-ins 'mean' or 'linear'")
        if federation.server_optimizer in ("adam", "yogi") and federation.server_lr > 0.1:
            raise InputError(f"federation.server_lr = {federation.server_lr:g} with server_optimizer = "
                             f"{federation.server_optimizer!r} moves every weight by about that much a round: give "
                             "1e-2 or less")
        self._check_privacy()
        free = sam.num_experts - sam.roots
        if federation.edges < free:
            raise InputError(f"federation.edges must be at least sam.num_experts - sam.roots = {free}, got "
                             f"{federation.edges}: each expert beside the roots needs an edge to be reached")
        anchor = int(federation.score == "anchors" and free > 0)
        for name, tier in self.tiers.items():
            if not (name.isascii() and name.replace("_", "a").isalnum()):
                raise InputError(f"a tier's name must be of letters, digits and underscores, got {name!r}")
            _at_most("sam.roots", sam.roots, f"tiers.{name}.experts", tier.experts)
            _at_most(f"tiers.{name}.experts", tier.experts, "sam.num_experts", sam.num_experts)
            _at_most(f"tiers.{name}.sends", tier.sends, f"tiers.{name}.experts", tier.experts)
            least, places = federation.floor_in_force * (free - anchor), tier.experts - sam.roots - anchor
            if least > places + 1e-9:
                raise InputError(
                    f"federation.floor = {federation.floor} asks for {least:g} experts beside the roots"
                    f"{' and an anchor' if anchor else ''}, tiers.{name}.experts = {tier.experts} leaves "
                    f"{places}: lower the floor or raise the tier's budget")
        sliced = self.subsets and all(tier.trains == "lora" for tier in self.tiers.values() if tier.share > 0.0)
        if self.train.redraw_every and not sliced:
            raise InputError(f"train.redraw_every = {self.train.redraw_every} is of low-rank slices: give 0, or "
                             "method = 'sam' with trains = 'lora' in every tier")
        if self.train.attention_rank and not sliced and self.method not in ("fedit", "local"):
            raise InputError(f"train.attention_rank = {self.train.attention_rank} is of low-rank updates: give 0, or "
                             "method = 'sam' with trains = 'lora' in every tier, or method = 'fedit'")
        total = math.fsum(tier.share for tier in self.tiers.values())
        if abs(total - 1.0) > 1e-6:
            shares = ", ".join(f"{name} {tier.share:g}" for name, tier in self.tiers.items())
            raise InputError(f"the shares of the tiers must sum to 1, got {total:g} ({shares or 'no tier'})")
        # A run config that travelled through a protobuf map has lost the order of its tiers.
        in_order = sorted(self.tiers.items(), key=lambda item: (item[1].experts, item[0]))
        object.__setattr__(self, "tiers", dict(in_order))
        for name in self.working_tiers:
            ranks = self.ranks_of(self.tiers[name])
            key = f"tiers.{name}.ranks" if self.tiers[name].ranks else "runtime.ranks_per_client"
            for what, whole in (("train.batch", self.train.batch), ("the largest worker group", self.pod)):
                if whole % ranks:
                    raise InputError(f"{key} = {ranks} does not divide {what} = {whole}: give a divisor of it")

    def _check_privacy(self) -> None:
        """Refuse what would make the epsilon of `federation.dp_noise` void, and a delta that promises nothing."""
        section, sparse = self.federation, self.method == "sam"
        noised = [name for name in ("dp_noise", "edit_noise") if getattr(section, name)]
        if noised and section.dp_delta * section.clients >= 1:
            raise InputError(f"federation.dp_delta = {section.dp_delta:g} must be below 1 / federation.clients = "
                             f"{1 / section.clients:g}: at more, telling all of one client is allowed")
        if not section.dp_noise:
            return
        for void, setting, remedy in (
            (self.method in ("local", "central"), f"method = {self.method!r}",
             "it averages nothing over clients; take another method"),
            (sparse and section.aggregation not in ("ht", "clipped"), f"federation.aggregation = "
             f"{section.aggregation!r}", "it divides by weights that the replies decide; take 'ht' or 'clipped'"),
            (section.robust != "none", f"federation.robust = {section.robust!r}",
             "what one client sends moves what the others add; give 'none', dp_clip bounds each already"),
            (sparse and section.score in ("fitness", "anchors"), f"federation.score = {section.score!r}",
             "what one client holds would follow from the others; take 'uniform', 'usage', 'reach' or 'greedy'"),
            (sparse and section.max_edits > 0 and not section.edit_noise,
             f"federation.max_edits = {section.max_edits} and federation.edit_noise = 0",
             "the graph would tell the counters; give edit_noise, or max_edits = 0"),
            (section.shift_round > 0, f"federation.shift_round = {section.shift_round}",
             "a client's documents would be behind two clients; give 0"),
        ):  # fmt: skip
            if void:
                raise InputError(f"federation.dp_noise = {section.dp_noise:g} does not go with {setting}: {remedy}")

    @property
    def subsets(self) -> bool:
        """Whether clients hold only some experts; else all train the whole model."""
        return self.method in ("sam", "static_mask")

    @property
    def working_tiers(self) -> list[str]:
        """The tiers that have an engine: those that clients are of, or the largest where all train the whole model."""
        names = [name for name, tier in self.tiers.items() if tier.share > 0.0]
        return names if self.subsets else names[-1:]

    def ranks_of(self, tier: TierSection) -> int:
        """Ranks that train a client of this tier together."""
        return tier.ranks or self.runtime.ranks_per_client

    @property
    def counter_bound(self) -> float:
        """The L2 norm that one client's counters of a round may have, in visits; without noise there is no bound."""
        tokens = self.train.steps * self.train.batch * self.train.sequence
        return self.federation.edit_clip * tokens if self.federation.edit_noise else math.inf

    @property
    def pod(self) -> int:
        """Ranks that take work together: one worker group of the largest size, or several smaller ones."""
        return max(self.ranks_of(self.tiers[name]) for name in self.working_tiers)


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file, then apply `section.key=value` overrides (a value is TOML if it parses, else text).

    A file with a `[tiers]` table lists *all* tiers; a tier that has the name of a default one needs only the
    fields that differ. `-` and `_` are the same in a key. Raises `InputError` for a missing or malformed
    file, an unknown key, a wrong value, or a tier whose DeepSpeed file does not exist.
    """
    document: dict[str, Any] = {}
    if path is not None:
        try:
            merge(document, tomllib.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"cannot read the configuration {str(path)!r}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"the configuration {str(path)!r} is not valid TOML: {error}") from error
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"--set {override!r} must have the form section.key=value")
        if key.startswith("tiers."):
            document.setdefault("tiers", {name: {} for name in _default_tiers()})
        merge(document, {key.strip(): parse_value(text.strip())}, replace=True)
    config = _built(RunConfig, document, "")
    for tier in config.tiers.values():
        ds_config_path(tier.ds_config)
    return config


def from_flat(mapping: Mapping[str, Scalar]) -> RunConfig:
    """The configuration from dotted keys, as in Flower's `context.run_config`, by the rules of a file."""
    document: dict[str, Any] = {}
    merge(document, mapping)
    return _built(RunConfig, document, "")


def flatten(config: RunConfig) -> dict[str, Scalar]:
    """Dotted keys and scalar values; tuples become comma-joined text. The inverse of `from_flat`."""
    return {name: ",".join(value) if isinstance(value, tuple) else value
            for name, value in leaves(asdict(config))}


def to_toml(config: RunConfig) -> str:
    """The file that `load_config` reads back to an equal value."""
    return dump(flatten(config))


def ds_config_path(name: str) -> Path:
    """The file of a tier's `ds_config`: one of `ds_configs/`, or a path to the user's own.

    An installed wheel carries the folder inside the package, a checkout beside it. Raises `InputError`.
    """
    package = Path(__file__).resolve().parent
    folders = [package / "ds_configs", package.parent / "ds_configs"]
    for candidate in [*(folder / name for folder in folders), Path(name)]:
        if candidate.is_file():
            return candidate
    known = sorted({file.name for folder in folders for file in folder.glob("*.json")})
    choices = f"take one of {', '.join(known)}, or a path to a file{nearest(name, known)}"
    raise InputError(f"no DeepSpeed configuration {name!r}: {choices}")


def _built(cls: type[Section], document: Any, prefix: str, base: Section | None = None) -> Section:
    """A section from a table; fields that the table lacks come from `base`, then from the class."""
    types = {each.name: each.type for each in fields(cls)}
    if not isinstance(document, dict):
        raise InputError(f"{prefix[:-1]} must be a table of {', '.join(types)}, got {document!r}")
    values = {name: getattr(base, name) for name in types} if base else {}
    for key, value in document.items():
        kind = types.get(key)
        if kind is None:
            raise InputError(f"unknown key {prefix + key!r}{_suggestion(key, prefix, list(types))}")
        if kind == dict[str, TierSection]:
            values[key] = _built_tiers(value)
        elif isinstance(kind, type) and issubclass(kind, Checked):
            values[key] = _built(kind, value, f"{prefix}{key}.")
        else:
            values[key] = checked(prefix + key, value, kind)
    missing = [each.name for each in fields(cls)
               if each.name not in values and each.default is each.default_factory is MISSING]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: it has no default")
    return cls(**values)


def _built_tiers(document: Any) -> dict[str, TierSection]:
    if not isinstance(document, dict):
        raise InputError(f"tiers must be a table of tiers, got {document!r}")
    bases = _default_tiers()
    return {name: _built(TierSection, table, f"tiers.{name}.", bases.get(name))
            for name, table in document.items()}


def _suggestion(key: str, prefix: str, siblings: Sequence[str]) -> str:
    """The nearest name, of this section or of another: a right key is often put in the wrong table."""
    homes = {name.rpartition(".")[2]: name for name in flatten(RunConfig()) if not name.startswith("tiers.")}
    homes |= {name: prefix + name for name in siblings}
    close = get_close_matches(key, list(homes), n=1, cutoff=0.6)
    return f"; did you mean {homes[close[0]]!r}?" if close else f"; known here: {', '.join(siblings)}"


def _at_most(name: str, value: int, other_name: str, other: int) -> None:
    if value > other:
        raise InputError(f"{name} must be at most {other_name}, got {name} = {value}, {other_name} = {other}")
