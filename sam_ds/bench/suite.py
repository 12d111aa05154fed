"""A suite of federations: a TOML file that says what is compared, and the cells that it comes to.

    [base]                    a run's configuration, sam_ds/config.py
    [variants.NAME]           what is compared: keys that differ; `rates` = train.lr to try, or `rates_of` = a variant
                              whose rate and warm-up it takes
    [settings.NAME]           under what: keys that differ for all variants alike
    [tables.NAME]             variants, settings, seeds, `tuned` (true), `compare` = [[ours, peer, axis, model], ...]
    [tune]                    setting, seed and rounds in which every variant with rates finds its own, and `warmups`:
                              train.warmup_steps that it then tries at the best of them, beside the configured one,
                              whose place the best takes where it ends lower by more than a share of `margin` (0)

A variant, a setting and a seed are a cell: one run of the federation. What a cell is follows from its resolved
configuration alone, paths aside, so that a record of it can be told from that of another.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from sam_ds.config import RunConfig, flatten, from_flat
from sam_ds.errors import InputError, nearest
from sam_ds.federation.methods.registry import configured
from sam_ds.tables import leaves, merge

SPENT: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "upload": lambda point: float(point["up"]),
    "traffic": lambda point: float(point["up"] + point["down"]),
    "flops": lambda point: float(point["flops"]),
}
"""Bytes or FLOPs that a point of a curve has spent, for the axes that have them."""
AXES = ("rounds", *SPENT)
MODELS = ("merged", "sparse")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Ours against a peer where both have spent as much on the axis, by the headline of the merged or sparse model."""

    ours: str
    peer: str
    axis: str
    model: str

    @property
    def name(self) -> str:
        return f"{self.ours} / {self.peer} at equal {self.axis}, {self.model}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Variants x settings x seeds."""

    variants: tuple[str, ...]
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    tuned: bool
    """Whether variants with rates find their own first."""
    compare: tuple[Comparison, ...]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """How variants find their rates and warm-ups."""

    setting: str
    seed: int
    rounds: int
    warmups: tuple[int, ...]
    margin: float
    """How much lower than the configured one, as a share, a warm-up must end to be taken: seeds differ too."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run."""

    variant: str
    setting: str
    config: RunConfig

    @property
    def digest(self) -> str:
        """Of what decides the outcome: all that is not the default, so that a new setting leaves old cells as they
        are; of the paths only the last name."""
        facts, usual = flatten(self.config), flatten(RunConfig())
        facts |= {name: Path(str(facts[name])).name for name in ("model", "data")}
        kept = {
            name: value for name, value in facts.items()
            if name != "out" and not name.startswith("runtime.") and value != usual.get(name)
        }  # fmt: skip
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """A folder's name."""
        return f"{self.variant}-{self.setting}-{self.config.seed}-{self.digest}"


class Suite:
    """A suite as its file says it. Raises InputError for what is missing, unknown or no configuration."""

    def __init__(self, path: Path, *, models: Path = Path("."), data: str | None = None) -> None:
        """`models`: the folder where models lie under the names that the suite has for them; `data`: where the base's
        data are on this machine."""
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read the suite {str(path)!r}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"the suite {str(path)!r} is not valid TOML: {error}") from error
        known = ("base", "variants", "settings", "tables", "tune")
        for name in document:
            if name not in known:
                raise InputError(f"unknown table [{name}] in {path}{nearest(name, known)}")
        for name in known[1:4]:
            if not document.get(name):
                raise InputError(f"{path} has no [{name}.NAME]")
        self._base = document.get("base", {})
        self._models, self._data = models, data
        self.variants: dict[str, dict[str, Any]] = document["variants"]
        self.settings: dict[str, dict[str, Any]] = document["settings"]
        self.tables = {name: self._table(name, table) for name, table in document["tables"].items()}
        self._tune = self._tuning(document["tune"]) if "tune" in document else None
        self.margin = 0.0 if self._tune is None else self._tune.margin
        # What contradicts is found before anything runs.
        for name, table in self.tables.items():
            subsets = {cell.variant: cell.config.subsets for cell in self.cells(table, {})}
            for comparison in table.compare:
                if comparison.model == "sparse" and not subsets[comparison.ours]:
                    raise InputError(f"tables.{name}.compare: {comparison.ours!r} has no sparse model")
            self.warmups({variant: next(iter(by_rate)) for variant, by_rate in self.trials(table).items()})

    def cells(self, table: Table, tuned: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        """All cells of a table; `tuned`: keys of [train] of the variants that were tuned."""
        return [
            self._cell(variant, setting, seed, tuned.get(self.rates_of(variant), {}))
            for seed in table.seeds for setting in table.settings for variant in table.variants
        ]  # fmt: skip

    def rates_of(self, variant: str) -> str:
        """The variant whose learning rate and warm-up this one takes: itself, where `rates_of` does not say another."""
        return str(self.variants[variant].get("rates_of", variant))

    def trials(self, table: Table) -> dict[str, dict[float, Cell]]:
        """Variant -> learning rate -> the run that tries it, for all that the table's variants need."""
        found: dict[str, dict[float, Cell]] = {}
        for variant in dict.fromkeys(self.rates_of(variant) for variant in table.variants if table.tuned):
            rates = self.variants[variant].get("rates", [])
            if rates and self._tune is None:
                raise InputError(f"variants.{variant} has rates, but the suite has no [tune]")
            if rates:
                found[variant] = {rate: self._trial(variant, {"lr": rate}) for rate in rates}
        return found

    def warmups(self, rates: Mapping[str, float]) -> dict[str, dict[int, Cell]]:
        """Variant -> warm-up steps -> the run that tries them, at the rates found: those of the configuration, which
        is the run that tried the rate, and then `tune.warmups`."""
        found: dict[str, dict[int, Cell]] = {}
        for variant, rate in rates.items():
            usual = self._trial(variant, {"lr": rate})
            found[variant] = {usual.config.train.warmup_steps: usual}
            assert self._tune is not None, "`trials` has looked"
            for steps in self._tune.warmups:
                found[variant].setdefault(steps, self._trial(variant, {"lr": rate, "warmup_steps": steps}))
        return found

    def _trial(self, variant: str, train: Mapping[str, Any]) -> Cell:
        assert self._tune is not None, "`trials` has looked"
        rounds = self._tune.rounds
        cell = self._cell(variant, self._tune.setting, self._tune.seed, train)
        # Judged once, at the end, on text that no table is of.
        evaluation = replace(cell.config.evaluation, split="valid", every=rounds)
        federation = replace(cell.config.federation, rounds=rounds)
        return replace(cell, setting="tune", config=replace(cell.config, federation=federation, evaluation=evaluation))

    def _cell(self, variant: str, setting: str, seed: int, train: Mapping[str, Any]) -> Cell:
        document: dict[str, Any] = {}
        own = {name: value for name, value in self.variants[variant].items() if name not in ("rates", "rates_of")}
        here = {} if self._data is None else {"data": self._data}
        for table in (self._base, here, self.settings[setting], own, {"seed": seed}):
            merge(document, table, replace=True)
        if (folder := self._models / str(document.get("model"))).is_dir():
            document["model"] = str(folder)
        merge(document, {"train": dict(train)}, replace=True)
        try:
            config = configured(from_flat(dict(leaves(document))))
        except InputError as error:
            raise InputError(f"variants.{variant} under settings.{setting}: {error}") from error
        return Cell(variant=variant, setting=setting, config=config)

    def _tuning(self, table: dict[str, Any]) -> Tune:
        known = ("setting", "seed", "rounds", "warmups", "margin")
        for key in table:
            if key not in known:
                raise InputError(f"unknown key tune.{key}{nearest(key, known)}")
        if (setting := table.get("setting")) not in self.settings:
            raise InputError(f"tune.setting must be one of {', '.join(self.settings)}, got {setting!r}")
        seed, rounds, warmups = table.get("seed"), table.get("rounds"), table.get("warmups", [])
        if not isinstance(seed, int) or not isinstance(rounds, int) or not isinstance(warmups, list):
            raise InputError("tune must have a seed, rounds and, where warm-ups are tried, a list of steps, "
                             f"got {table!r}")  # fmt: skip
        if not isinstance(margin := table.get("margin", 0.0), (int, float)) or not 0 <= margin < 1:
            raise InputError(f"tune.margin must be a share, at least 0 and less than 1, got {margin!r}")
        return Tune(setting=str(setting), seed=seed, rounds=rounds, warmups=tuple(warmups), margin=margin)

    def _table(self, name: str, table: dict[str, Any]) -> Table:
        known = ("variants", "settings", "seeds", "tuned", "compare")
        for key in table:
            if key not in known:
                raise InputError(f"unknown key tables.{name}.{key}{nearest(key, known)}")
        for key, choices in (("variants", self.variants), ("settings", self.settings)):
            for value in table.get(key) or [None]:
                if value not in choices:
                    hint = nearest(str(value), choices)
                    raise InputError(f"tables.{name}.{key} must name some of {', '.join(choices)}, got {value!r}{hint}")
        seeds = table.get("seeds", [0])
        if not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
            raise InputError(f"tables.{name}.seeds must be whole numbers from 0 on, got {seeds!r}")
        compare = []
        for quadruple in table.get("compare", []):
            match quadruple:
                case [ours, peer, axis, model] if axis in AXES and model in MODELS and {ours, peer} <= {
                    *table["variants"]
                }:
                    compare.append(Comparison(ours=ours, peer=peer, axis=axis, model=model))
                case _:
                    raise InputError(f"tables.{name}.compare must be of [variant, variant, {'|'.join(AXES)}, "
                                     f"{'|'.join(MODELS)}], got {quadruple!r}")  # fmt: skip
        return Table(
            variants=tuple(table["variants"]), settings=tuple(table["settings"]), seeds=tuple(seeds),
            tuned=bool(table.get("tuned", True)), compare=tuple(compare),
        )  # fmt: skip


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Digest -> record, the last line of each; a last line that is only half written is left out. Raises InputError for
    a line that is no record."""
    records = {}
    for number, line in enumerate(path.read_text().split("\n")[:-1] if path.exists() else [], 1):
        try:
            record = cast(dict[str, Any], json.loads(line))
            records[str(record["digest"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number} is not a cell of this benchmark: remove the line, or give another "
                             "file") from error  # fmt: skip
    return records
