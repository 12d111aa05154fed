"""The configuration: defaults, the three forms it travels in, and every refusal with its words."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_ds import config as module
from sam_ds.config import (
    EvaluationSection,
    FederationSection,
    RunConfig,
    SamSection,
    TierSection,
    TrainSection,
    WireSection,
    ds_config_path,
    flatten,
    from_flat,
    load_config,
    to_toml,
)
from sam_ds.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
names = st.text("abcdef -_é\"\\", min_size=1).filter(lambda name: name == name.strip())
domains = st.lists(names, max_size=3).map(tuple)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    experts = draw(st.integers(2, 64))
    top_k = draw(st.integers(1, experts))
    roots = draw(st.integers(1, top_k))
    names = draw(st.lists(st.from_regex(r"[a-z][A-Za-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=4,
                          unique=True))
    budgets = [draw(st.integers(roots, experts)) for _ in names]
    free = experts - roots
    floor = draw(st.floats(0, 1)) * min((b - roots) / free for b in budgets) if free else 1.0
    clients = draw(st.integers(1, 1000))
    return RunConfig(
        seed=draw(st.integers(0, 2**63)), model=draw(texts), out=draw(texts),
        method=draw(st.sampled_from(["sam", "fedavg", "fedit", "static_mask", "local", "central"])),
        sam=SamSection(num_experts=experts, top_k=top_k, roots=roots),
        federation=FederationSection(
            clients=clients, clients_per_round=draw(st.integers(1, clients)), forgetting=draw(domains),
            edges=free + 1, floor=floor, tau=draw(positive)),
        train=TrainSection(lr=draw(positive)),
        wire=WireSection(compress=draw(st.booleans())),
        tiers={name: TierSection(experts=budget, memory_gib=draw(positive), share=1 / len(names),
                                 trains=draw(st.sampled_from(["full", "lora"])))
               for name, budget in zip(names, budgets, strict=True)})


@given(configs())
def test_toml_and_flat_round_trip(config: RunConfig) -> None:
    assert from_flat(tomllib.loads(to_toml(config))) == config
    assert from_flat(flatten(config)) == config
    assert all(type(value) in (bool, int, float, str) for value in flatten(config).values())


def test_saved_file_loads_to_the_same_value_and_order(tmp_path: Path) -> None:
    config = replace(RunConfig(seed=7), federation=FederationSection(forgetting=("wiki", "fiction")))
    (tmp_path / "run.toml").write_text(to_toml(config))
    loaded = load_config(tmp_path / "run.toml", [])
    assert loaded == config
    assert list(loaded.tiers) == ["small", "medium", "large"]


def test_flower_app_config_is_the_schema() -> None:
    app = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    from flwr.common.config import flatten_dict

    assert flatten_dict(app["config"]) == flatten(RunConfig())
    assert from_flat(flatten_dict(app["config"])) == RunConfig()


def test_flat_keys_may_be_kebab_case_and_in_any_order() -> None:
    flat = {key.replace("_", "-"): value for key, value in reversed(flatten(RunConfig()).items())}
    config = from_flat(flat)
    assert config == RunConfig()
    assert list(config.tiers) == ["small", "medium", "large"]


def test_no_file_and_no_override_is_the_default() -> None:
    assert load_config(None, []) == RunConfig()


@pytest.mark.parametrize(("override", "where", "value"), [
    ("seed=3", "seed", 3),
    ("model=org/name", "model", "org/name"),
    ("model=../a folder/model", "model", "../a folder/model"),
    ('out="2024"', "out", "2024"),
    ("train.lr=1", "train.lr", 1.0),
    ("train.warmup-steps = 0", "train.warmup_steps", 0),
    ("wire.compress=true", "wire.compress", True),
    ("federation.forgetting=['wiki', 'math']", "federation.forgetting", "wiki,math"),
    ("federation.forgetting=wiki, math", "federation.forgetting", "wiki,math"),
    ("federation.forgetting=", "federation.forgetting", ""),
    ("tiers.small.experts=7", "tiers.small.experts", 7),
    ("sam={top_k=9}", "sam.top_k", 9),
])
def test_an_override_sets_one_field(override: str, where: str, value: Any) -> None:
    changed = flatten(load_config(None, [override]))
    assert changed[where] == value and type(changed[where]) is type(value)
    assert {**changed, where: None} == {**flatten(RunConfig()), where: None}


def test_overrides_win_over_the_file_and_later_over_earlier(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("seed = 1\n[sam]\ntop-k = 8\nroots = 3\n")
    config = load_config(file, ["sam.top_k=9", "sam.top_k=10"])
    assert (config.seed, config.sam.top_k, config.sam.roots) == (1, 10, 3)


def test_a_tiers_table_lists_all_tiers(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[tiers.small]\nshare = 0.25\n"
                    "[tiers.whole]\nexperts = 16\nmemory_gib = 8\nshare = 0.75\n")
    config = load_config(file, ["tiers.whole.trains=lora"])
    assert list(config.tiers) == ["small", "whole"]
    assert config.tiers["small"] == replace(RunConfig().tiers["small"], share=0.25)
    assert config.tiers["whole"].trains == "lora" and config.tiers["whole"].memory_gib == 8.0


@pytest.mark.parametrize(("override", "words"), [
    ("federation.rouds=3", ["unknown key 'federation.rouds'", "'federation.rounds'"]),
    ("rounds=3", ["unknown key 'rounds'", "'federation.rounds'"]),
    ("rouds=3", ["unknown key 'rouds'", "'federation.rounds'"]),
    ("sam.lr=3", ["unknown key 'sam.lr'", "'train.lr'"]),
    ("tiers.small.expert=3", ["unknown key 'tiers.small.expert'", "'tiers.small.experts'"]),
    ("zzz=3", ["unknown key 'zzz'", "known here: seed, model"]),
    ("rounds", ["--set 'rounds'", "section.key=value"]),
    ("=3", ["unknown key ''"]),
    ("sam=3", ["sam must be a table of num_experts", "got 3"]),
    ("seed.x=3", ["seed must be an integer", "{'x': 3}"]),
    ("sam.top_k=2.5", ["sam.top_k must be an integer", "got 2.5"]),
    ("sam.top_k=true", ["sam.top_k must be an integer", "got True"]),
    ("train.lr=fast", ["train.lr must be a number", "got 'fast'"]),
    ("train.lr=0", ["train.lr must be > 0", "got 0"]),
    ("train.lr=nan", ["train.lr must be finite", "nan"]),
    ("train.lr=inf", ["train.lr must be finite", "inf"]),
    ("wire.compress=1", ["wire.compress must be true or false", "got 1"]),
    ("model=5", ["model must be text", "got 5"]),
    ("model=", ["model must not be empty"]),
    ("federation.forgetting=[1]", ["federation.forgetting must be a list of texts", "[1]"]),
    ("federation.forgetting=a,,b", ["federation.forgetting must have no empty item"]),
    ("federation.explore=1.5", ["federation.explore must be in [0, 1]", "got 1.5"]),
    ("federation.clip=0.5", ["federation.clip must be >= 1", "got 0.5"]),
    ("federation.server_optimizer=adam", ["federation.server_lr = 1 with server_optimizer = 'adam'", "1e-2 or less"]),
    ("federation.beta_1=1", ["federation.beta_1 must be in [0, 1)", "got 1"]),
    ("sam.density=0", ["sam.density must be in (0, 1]", "got 0"]),
    ("method=fedavgg", ["method must be one of sam, fedavg, fedit, static_mask, local", "did you mean 'fedavg'"]),
    ("federation.score=[]", ["federation.score must be one of uniform", "got []"]),
    ("sam.top_k=17", ["sam.top_k must be at most sam.num_experts", "sam.top_k = 17", "= 16"]),
    ("sam.top_k=1", ["sam.roots must be at most sam.top_k", "sam.roots = 2", "= 1"]),
    ("sam.roots=0", ["sam.roots must be >= 1", "got 0"]),
    ("federation.clients_per_round=9", ["federation.clients_per_round must be at most federation.clients"]),
    ("federation.edit_every=0", ["federation.edit_every must be >= 1", "got 0"]),
    ("federation.edges=13", ["federation.edges must be at least", "= 14", "got 13"]),
    ("federation.floor=0.5", ["federation.floor = 0.5 asks for 7", "tiers.small.experts = 8 leaves 6"]),
    ("federation.sampling=stratum", ["federation.sampling must be one of without_replacement, poisson, stratified",
                                     "got 'stratum'", "did you mean 'stratified'"]),
    ("federation.score=fitnes", ["federation.score must be one of uniform", "got 'fitnes'", "did you mean 'fitness'"]),
    ("federation.fitness_decay=1", ["federation.fitness_decay must be in [0, 1)", "got 1"]),
    ("federation.load_weight=-1", ["federation.load_weight must be >= 0", "got -1"]),
    ("runtime.ranks_per_client=3", ["runtime.ranks_per_client = 3 does not divide train.batch = 4"]),
    ("evaluation.stride=512", ["evaluation.stride must be at most evaluation.window"]),
    ("tiers.small.experts=1", ["sam.roots must be at most tiers.small.experts"]),
    ("tiers.large.experts=17", ["tiers.large.experts must be at most sam.num_experts"]),
    ("tiers.small.memory_gib=-1", ["tiers.small.memory_gib must be > 0", "got -1"]),
    ("tiers.small.share=0.5", ["must sum to 1, got 1.125", "small 0.5, medium 0.375, large 0.25"]),
    ("tiers.new.experts=3", ["tiers.new.memory_gib is missing"]),
    ("tiers.a b={experts=9, memory_gib=1, share=0}", ["a tier's name", "'a b'"]),
    ("train.attention_rank=4", ["train.attention_rank = 4 is of low-rank updates", "trains = 'lora' in every tier"]),
    ("tiers={}", ["must sum to 1, got 0", "no tier"]),
    ("tiers=3", ["tiers must be a table of tiers", "got 3"]),
    ("tiers.small=3", ["tiers.small must be a table of experts"]),
    ("tiers.small.ds_config=cpu_zero3.json", ["no DeepSpeed configuration 'cpu_zero3.json'", "did you mean"]),
])
def test_bad_input_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        load_config(None, [override])
    for word in words:
        assert word in str(refusal.value)


def test_the_floor_leaves_room_for_an_anchor_and_does_not_bind_a_greedy_choice() -> None:
    assert load_config(None, ["federation.floor=0.4"]).federation.floor_in_force == 0.4
    with pytest.raises(InputError, match="asks for 5.2 .* roots and an anchor, tiers.small.experts = 8 leaves 5"):
        load_config(None, ["federation.floor=0.4", "federation.score=anchors"])
    with pytest.raises(InputError, match="tiers.small.experts = 2 leaves -1"):
        load_config(None, ["federation.floor=0", "federation.score=anchors", "tiers.small.experts=2"])
    greedy = load_config(None, ["federation.floor=0.5", "federation.score=greedy"]).federation
    assert greedy.floor_in_force == 0.0
    assert load_config(None, ["sam.roots=16", "sam.top_k=16", "federation.score=anchors", "tiers.small.experts=16",
                              "tiers.medium.experts=16"]).federation.score == "anchors"  # fmt: skip


def test_a_key_in_two_spellings_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[sam]\ntop_k = 8\ntop-k = 9\n")
    with pytest.raises(InputError, match=r"sam\.top_k is given twice"):
        load_config(file, [])
    with pytest.raises(InputError, match=r"sam\.top_k is given twice"):
        from_flat({"sam.top_k": 8, "sam.top-k": 9})


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot read the configuration"), (b"[sam\n", "not valid TOML"), (b"\xff\xfe", "not valid TOML")])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=words) as refusal:
        load_config(file, [])
    assert "run.toml" in str(refusal.value)


def test_sections_check_themselves_and_normalise() -> None:
    assert type(TrainSection(lr=1).lr) is float
    assert FederationSection(forgetting=["a"]).forgetting == ("a",)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="evaluation.window must be >= 2"):
        EvaluationSection(window=1)
    with pytest.raises(InputError, match="tiers.small must be a TierSection"):
        RunConfig(tiers={"small": 3})  # type: ignore[dict-item]


def test_ds_config_of_a_wheel_comes_first_then_the_checkout_then_a_path(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "sam_ds"
    (package / "ds_configs").mkdir(parents=True)
    (package.parent / "ds_configs").mkdir()
    (package.parent / "ds_configs" / "a.json").write_text("{}")
    own = tmp_path / "own.json"
    own.write_text("{}")
    monkeypatch.setattr(module, "__file__", str(package / "config.py"))
    assert ds_config_path("a.json") == package.parent / "ds_configs" / "a.json"
    (package / "ds_configs" / "a.json").write_text("{}")
    assert ds_config_path("a.json") == package / "ds_configs" / "a.json"
    assert ds_config_path(str(own)) == own
    with pytest.raises(InputError, match="no DeepSpeed configuration 'b.json': take one of a.json"):
        ds_config_path("b.json")


@pytest.mark.parametrize(("overrides", "message"), [
    (["tiers.large.ranks=3"], "tiers.large.ranks = 3 does not divide train.batch = 4"),
    (["train.batch=12", "tiers.large.ranks=3", "tiers.small.ranks=2"],
     "tiers.small.ranks = 2 does not divide the largest worker group = 3"),
    (["train.batch=6", "tiers.large.ranks=3", "runtime.ranks_per_client=2"],
     "runtime.ranks_per_client = 2 does not divide the largest worker group = 3"),
])  # fmt: skip
def test_groups_of_tiers_must_fit_into_the_largest(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, overrides)
    config = load_config(None, ["tiers.large.ranks=4", "tiers.small.ranks=2"])
    dense = load_config(None, ["method=fedavg", "tiers.small.ranks=4", "train.batch=6"])
    assert dense.pod == 1 and dense.working_tiers == ["large"]
    load_config(None, ["train.batch=6", "runtime.ranks_per_client=4", *(f"tiers.{t}.ranks=2" for t in config.tiers)])
    assert config.pod == 4 and [config.ranks_of(tier) for tier in config.tiers.values()] == [2, 1, 4]


AUTO = {"train_micro_batch_size_per_gpu", "gradient_clipping", "bf16.enabled"}


@pytest.mark.parametrize(("name", "stage"), [
    ("cpu_zero0.json", 0), ("cpu_zero2.json", 2), ("zero3.json", 3), ("bf16_48gb.json", 2), ("nf4_16gb.json", 2),
    ("nf4_8gb.json", 2), ("zero3_offload_24gb.json", 3),
])  # fmt: skip
def test_the_deepspeed_files_load_and_leave_the_same_values_open(name: str, stage: int) -> None:
    from sam_ds.tables import leaves

    settings = json.loads(ds_config_path(name).read_text())
    assert settings["zero_optimization"]["stage"] == stage
    assert {key for key, value in leaves(settings) if value == "auto"} == AUTO


def test_every_deepspeed_file_has_a_test() -> None:
    """In test_engine.py, or test_worker.py."""
    source = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in ("engine", "worker"))
    for file in (ROOT / "ds_configs").iterdir():
        assert file.name in source, file.name


def test_default_shares_and_budgets_are_what_the_default_run_needs() -> None:
    config = RunConfig()
    assert [tier.share * config.federation.clients for tier in config.tiers.values()] == [3, 3, 2]
    assert math.isclose(config.federation.floor * (config.sam.num_experts - config.sam.roots), 4.2)
