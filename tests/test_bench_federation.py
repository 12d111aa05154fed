"""`sam-ds bench federation`: what a suite says, what makes two cells the same, and where curves are compared."""

from __future__ import annotations

import fcntl
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from in_process import SETTINGS

from sam_ds.bench.side_by_side import equal_points
from sam_ds.bench.suite import Suite, read_results
from sam_ds.cli import main
from sam_ds.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
SUITE = """
[base]
model = "m"
data = "d"
{base}
[variants.sam]
train = {{ lr = 0.1 }}
rates = [0.1, 0.2]
[variants.twin]
federation = {{ explore = 0.0 }}
rates_of = "sam"
[variants.fedavg]
method = "fedavg"
[settings.one]
federation = {{ rounds = 2 }}
[tune]
setting = "one"
seed = 100
rounds = 1
[tables.main]
variants = ["sam", "twin", "fedavg"]
settings = ["one"]
seeds = [0, 1]
compare = [["sam", "fedavg", "upload", "merged"]]
"""


def write(folder, text=SUITE, base=""):
    path = folder / "suite.toml"
    path.write_text(text.format(base=base))
    return path


def test_cells_take_the_rate_of_the_variant_they_name(tmp_path):
    suite = Suite(write(tmp_path))
    table = suite.tables["main"]
    trials = suite.trials(table)
    assert {name: list(by_rate) for name, by_rate in trials.items()} == {"sam": [0.1, 0.2]}
    for rate, cell in trials["sam"].items():
        assert cell.config.train.lr == rate and cell.config.seed == 100 and cell.config.federation.rounds == 1
        assert cell.config.evaluation.split == "valid"
    # What trial of the rate it was is the first of the warm-up's.
    assert suite.warmups({"sam": 0.2})["sam"] == {3: trials["sam"][0.2]}
    tried = Suite(write(tmp_path, SUITE.replace("seed = 100", "seed = 100\nwarmups = [0, 3, 4]")))
    assert [
        (steps, cell.config.train.warmup_steps, cell.config.train.lr)
        for steps, cell in tried.warmups({"sam": 0.2})["sam"].items()
    ] == [(3, 3, 0.2), (0, 0, 0.2), (4, 4, 0.2)]
    cells = suite.cells(table, {"sam": {"lr": 0.2, "warmup_steps": 7}})
    assert [(c.variant, c.config.seed) for c in cells] == [
        (variant, seed) for seed in (0, 1) for variant in ("sam", "twin", "fedavg")
    ]  # fmt: skip
    assert [c.config.train.lr for c in cells[:3]] == [0.2, 0.2, 0.002]
    assert [c.config.train.warmup_steps for c in cells[:3]] == [7, 7, 3]
    assert cells[1].config.federation.explore == 0.0 and cells[0].config.federation.rounds == 2


def test_a_cell_is_its_configuration_wherever_it_runs(tmp_path):
    path = write(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    here, there = Suite(path, data="/x/d"), Suite(path, models=tmp_path / "models", data="/y/x/d")
    one, other = (suite.cells(suite.tables["main"], {}) for suite in (here, there))
    assert [cell.digest for cell in one] == [cell.digest for cell in other]
    assert len({cell.digest for cell in one}) == 6
    assert one[0].config.model == "m" and other[0].config.model == str(tmp_path / "models" / "m")
    renamed = Suite(write(tmp_path, SUITE.replace('"m"', '"n"')))
    assert renamed.cells(renamed.tables["main"], {})[0].digest != one[0].digest
    elsewhere = Suite(write(tmp_path, base="runtime = { threads = 3 }"))
    assert elsewhere.cells(elsewhere.tables["main"], {})[0].digest == one[0].digest


def test_central_training_is_the_same_cell_under_every_partition(tmp_path):
    text = SUITE.replace('settings = ["one"]', 'settings = ["one", "two"]').replace('"fedavg"', '"central"')
    two = '[settings.two]\nfederation = {{ rounds = 2, partition = "dirichlet", alpha = 0.1 }}\n'
    text = text.replace("[variants.fedavg]", "[variants.central]").replace("[tune]", two + "[tune]")
    suite = Suite(write(tmp_path, text))
    digests: dict[str, set[str]] = {}
    for cell in suite.cells(replace(suite.tables["main"], seeds=(0,)), {}):
        digests.setdefault(cell.variant, set()).add(cell.digest)
    assert len(digests["sam"]) == 2 and len(digests["central"]) == 1


@pytest.mark.parametrize(("old", "new", "message"), [
    ("[tune]", "[tuning]", r"unknown table \[tuning\].*did you mean 'tune'"),
    ('variants = ["sam",', 'variants = ["sma",', "tables.main.variants must name some of sam, .* got 'sma'"),
    ("seeds = [0, 1]", "seeds = [-1]", "tables.main.seeds must be whole numbers"),
    ('"upload"', '"time"', "tables.main.compare must be of"),
    ('"sam", "fedavg", "upload"', '"sam", "fedit", "upload"', "tables.main.compare must be of"),
    ("{{ explore = 0.0 }}", "{{ explore = 2.0 }}", "variants.twin under settings.one: federation.explore must be"),
    ("[settings.one]", "[settings.one]\nsead = 1\n[settings.two]", "unknown key 'sead'"),
    ('setting = "one"', 'setting = "two"', "tune.setting must be one of one, got 'two'"),
    ("rounds = 1", "warm_ups = [0]", "unknown key tune.warm_ups; did you mean 'warmups'"),
    ("rounds = 1", "rounds = 1\nwarmups = 3", "tune must have a seed, rounds and, .* a list of steps"),
    ("rounds = 1", "rounds = 1\nmargin = 1", "tune.margin must be a share, at least 0 and less than 1, got 1"),
    ("rounds = 1", "rounds = 1\nwarmups = [-1]", "variants.sam under settings.one: train.warmup_steps must be"),
    ('[tune]\nsetting = "one"\nseed = 100\nrounds = 1\n', "", r"variants.sam has rates, but the suite has no \[tune\]"),
    ('["sam", "fedavg", "upload", "merged"]', '["fedavg", "sam", "upload", "sparse"]', "'fedavg' has no sparse model"),
    ("compare =", "compared =", "unknown key tables.main.compared; did you mean 'compare'"),
])  # fmt: skip
def test_a_suite_that_makes_no_sense_is_refused(tmp_path, old, new, message):
    assert old in SUITE
    with pytest.raises(InputError, match=message):
        Suite(write(tmp_path, SUITE.replace(old, new)))


def test_curves_are_read_where_as_much_was_spent_never_in_our_favour():
    ours = [{"up": up, "down": 3 * up, "flops": 2 * up, "merged": 10 - up} for up in (0, 1, 2)]
    peer = [{"up": up, "down": up, "flops": up, "merged": 20 - up} for up in (0, 1.5, 3, 4.5)]
    # The peer at its first round with at least our bytes: more than ours.
    assert equal_points(ours, peer, "upload") == (ours[-1], peer[2])
    # Ours between two of its rounds, where it has spent what all of the peer's costs.
    mine, yours = equal_points(peer, ours, "upload")
    assert mine == {"merged": pytest.approx(18)} and yours == ours[2]
    # At a round of its own it is that round.
    assert equal_points([*ours, {"up": 9, "down": 0, "flops": 99, "merged": 0}], ours, "upload") == (ours[2], ours[2])
    assert equal_points(ours, peer, "flops") == (ours[2], peer[3])
    assert equal_points(ours, peer, "traffic") == (ours[2], peer[3])
    assert equal_points(ours, peer, "rounds") == (ours[-1], peer[-1])


def test_the_example_is_a_suite():
    suite = Suite(ROOT / "examples" / "benchmark.toml")
    for table in suite.tables.values():
        suite.trials(table)
        for cell in suite.cells(table, {}):
            assert cell.config.evaluation.test_tokens in (1024, 4096)


def test_lines_that_are_no_cells_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == {}
    path.write_text('{"digest": "a", "seed": 1}\n{"digest": "a", "seed": 2}\n')
    assert read_results(path)["a"]["seed"] == 2
    path.write_text('{"digest": "a", "seed": 1}\n{"digest": "b", "se')
    assert list(read_results(path)) == ["a"]
    path.write_text("{}\n")
    with pytest.raises(InputError, match="line 1 is not a cell"):
        read_results(path)


def test_rates_and_then_warm_ups_are_tuned_and_what_they_come_to_is_compared(tmp_path, capsys):
    """On records that are there already."""
    text = SUITE.replace("seed = 100", "seed = 100\nwarmups = [0, 4]").replace("seeds = [0, 1]", "seeds = [0]")
    path = write(tmp_path, text.replace("federation = {{ rounds = 2 }}", 'federation = {{ forgetting = ["far"] }}'))
    suite = Suite(path)
    table, results = suite.tables["main"], tmp_path / "results.jsonl"
    trials = suite.trials(table)["sam"]
    warmups = suite.warmups({"sam": 0.2})["sam"]
    cells = suite.cells(table, {"sam": {"lr": 0.2, "warmup_steps": 4}})
    assert cells[0].config.train.lr == 0.2 and cells[0].config.train.warmup_steps == 4
    ends = {trials[0.1].digest: 6.0, trials[0.2].digest: 5.0, warmups[0].digest: 5.5, warmups[4].digest: 4.0}
    ends |= {cell.digest: 10.0 + position for position, cell in enumerate(cells)}

    def record(digest, end):
        domains = {"near": end - 1, "nearer": end + 1, "far": 99.0}
        curve = [{"round": 1, "up": 1, "down": 1, "flops": 1.0, "merged": end, "sparse": None, "domains": domains}]
        return {"digest": digest, "lr": 0.2, "seconds": 1.0, "data": "d", "curve": curve, "after": domains,
                "sparse_after": None, "forgetting": 99.0}  # fmt: skip

    def table_of(*left_out):
        kept = [record(digest, end) for digest, end in ends.items() if digest not in left_out]
        results.write_text("".join(json.dumps(line) + "\n" for line in kept))
        arguments = ["bench", "federation", "--config", str(path), "--results", str(results), "--minutes", "0"]
        assert main([*arguments, "--runs", str(tmp_path / "runs"), "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    found = table_of()
    assert found["tuned"] == {"sam": {"lr": 0.2, "warmup_steps": 4}}
    assert found["missing"] == 0 and found["diverged"] == []
    assert [(row["variant"], row["merged"], row["worst"]) for row in found["rows"]] == [
        ("sam", 10.0, 11.0), ("twin", 11.0, 12.0), ("fedavg", 12.0, 13.0)
    ]  # fmt: skip
    assert found["ratios"] == {"sam / fedavg at equal upload, merged: one": pytest.approx(10 / 12)}
    # A warm-up that is a fifth better, where it must be a quarter, or must be less.
    for margin, steps in ((0.25, 3), (0.15, 4)):
        path.write_text(path.read_text().replace("seed = 100", f"seed = 100\nmargin = {margin}"))
        found = table_of()
        assert found["tuned"] == {"sam": {"lr": 0.2, "warmup_steps": steps}}
        path.write_text(path.read_text().replace(f"margin = {margin}\n", ""))
    # Nobody runs a table with a rate or a warm-up that is not the best of all.
    for trial in (trials[0.1], warmups[0]):
        found = table_of(trial.digest)
        assert found["tuned"] == {} and [row["variant"] for row in found["rows"]] == ["fedavg"]
        assert found["missing"] == 2
    # A trial that diverged is an outcome: another one wins.
    results.write_text(results.read_text() + json.dumps({"digest": warmups[0].digest, "diverged": True}) + "\n")
    assert main(["bench", "federation", "--config", str(path), "--results", str(results), "--minutes", "0", "--runs",
                 str(tmp_path / "runs"), "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tuned"] == {"sam": {"lr": 0.2, "warmup_steps": 4}}
    results.write_text("".join(json.dumps({"digest": digest, "diverged": True}) + "\n" for digest in ends))
    assert main(["bench", "federation", "--config", str(path), "--results", str(results), "--minutes", "0", "--runs",
                 str(tmp_path / "runs")]) == 2  # fmt: skip
    assert "all that ran diverged: " in capsys.readouterr().err


def test_of_sparse_models_too_the_headline_and_the_worst_domain_are_drawn(tmp_path):
    """On records that are there already, of which an older one does not have the sparse model's domains."""
    text = SUITE.replace("rates = [0.1, 0.2]\n", "").replace("seeds = [0, 1]", "seeds = [0]")
    path, results = write(tmp_path, text), tmp_path / "results.jsonl"
    suite = Suite(path)
    domains = {"near": 4.0, "far": 6.0}
    point = {"round": 1, "up": 1, "down": 1, "flops": 1.0, "merged": 5.0, "sparse": 5.5, "domains": domains}

    def plots(*points):
        sparse = [cell for cell in suite.cells(suite.tables["main"], {}) if cell.variant != "fedavg"]
        results.write_text("".join(
            json.dumps({"digest": cell.digest, "lr": 0.2, "seconds": 1.0, "data": "d", "curve": [last],
                        "after": domains, "sparse_after": domains, "forgetting": None}) + "\n"
            for cell, last in zip(sparse, points, strict=True)
        ))  # fmt: skip
        arguments = ["bench", "federation", "--config", str(path), "--results", str(results), "--minutes", "0"]
        assert main([*arguments, "--runs", str(tmp_path / "runs")]) == 0
        return results.with_name("results-main.svg").read_text().count("<svg") - 1

    new = point | {"sparse_domains": domains}
    assert plots(new, new) == 4 * 3
    assert plots(new, point) == 3 * 3


@pytest.mark.distributed
def test_a_cell_that_fails_or_runs_elsewhere_does_not_stop_the_others(tiny, tmp_path, capsys, monkeypatch):
    """The runs are stood in for: one fails, one diverges, one is locked by another process."""
    text = SUITE.replace("rates = [0.1, 0.2]\n", "").replace("seeds = [0, 1]", "seeds = [0]")
    suite = Suite(write(tmp_path, text))
    cells = {cell.variant: cell for cell in suite.cells(suite.tables["main"], {})}
    runs = tmp_path / "runs"
    reason = {"sam": "no-answer", "twin": "not-finite"}
    asked = []

    def stands_in(command, *, stdout, **_):
        folder = Path(command[-1].removeprefix("out="))
        name = folder.name.split("-")[0]
        asked.append(name)
        answers = [{"kind": "client", "round": round_, "reason": why} for round_, why in ((1, None), (2, reason[name]))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        stdout.write("round 2 had no valid answer in 3 attempts")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("subprocess.run", stands_in)
    (runs / cells["fedavg"].name).mkdir(parents=True)
    with open(runs / cells["fedavg"].name / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = ["bench", "federation", "--config", str(tmp_path / "suite.toml"), "--runs", str(runs)]
        for expected in (["sam", "twin"], ["sam"]):
            asked.clear()
            assert main([*arguments, "--jobs", "1"]) == 2
            assert asked == expected  # what diverged is an outcome, what broke is tried again
            assert "round 2 had no valid answer" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_cell_that_another_process_has_run_meanwhile_is_not_run_again(tiny, tmp_path, capsys, monkeypatch):
    text = SUITE.replace("rates = [0.1, 0.2]\n", "").replace("seeds = [0, 1]", "seeds = [0]")
    suite = Suite(write(tmp_path, text))
    _, *others = suite.cells(suite.tables["main"], {})
    results, asked = tmp_path / "results.jsonl", []

    def stands_in(command, *, stdout, **_):
        asked.append(Path(command[-1].removeprefix("out=")).name.split("-")[0])
        results.write_text("".join(json.dumps({"digest": cell.digest, "diverged": True}) + "\n" for cell in others))
        stdout.write("something broke")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("subprocess.run", stands_in)
    arguments = ["bench", "federation", "--config", str(tmp_path / "suite.toml"), "--results", str(results)]
    assert main([*arguments, "--runs", str(tmp_path / "runs"), "--jobs", "1"]) == 2
    assert len(others) > 1 and asked == ["sam"]


@pytest.mark.distributed
def test_a_cell_that_was_stopped_goes_on(tmp_path, monkeypatch):
    text = SUITE.replace("rates = [0.1, 0.2]\n", "").replace('["sam", "twin", "fedavg"]', '["sam", "fedavg"]')
    suite = Suite(write(tmp_path, text.replace("seeds = [0, 1]", "seeds = [0]")))
    begun, fresh = suite.cells(suite.tables["main"], {})
    asked = []

    def stands_in(command, *, stdout, **_):
        asked.append(command[-2:])
        stdout.write("something broke")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr("subprocess.run", stands_in)
    runs = tmp_path / "runs"
    (runs / begun.name).mkdir(parents=True)
    # What a run writes before its first round.
    (runs / begun.name / "config.toml").write_text("")
    assert main(["bench", "federation", "--config", str(tmp_path / "suite.toml"), "--runs", str(runs), "--jobs", "1"])
    assert asked == [["--resume", str(runs / begun.name)], ["--set", f"out={runs / fresh.name}"]]


@pytest.mark.distributed
def test_cells_run_once_and_are_compared(tiny, tmp_path, capsys):
    base = dict(setting.split("=") for setting in SETTINGS)
    base |= {"federation.rounds": "1", "federation.clients": "3", "evaluation.split": '"test"'}
    lines = "\n".join(f"{key} = {value}" for key, value in base.items())
    text = SUITE.replace("rates = [0.1, 0.2]\n", "").replace("federation = {{ rounds = 2 }}", "seed = 0")
    text = text.replace('["sam", "twin", "fedavg"]', '["sam", "fedavg"]').replace("seeds = [0, 1]", "seeds = [0]")
    text = text.replace('"upload"', '"rounds"').replace('model = "m"', f'model = "{tiny.model.name}"')
    arguments = ["bench", "federation", "--config", str(write(tmp_path, text, lines)), "--data", str(tiny.corpus),
                 "--models", str(tiny.model.parent), "--runs", str(tmp_path / "runs"), "--json"]  # fmt: skip
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["variant"], row["seeds"]) for row in result["rows"]] == [("sam", 1), ("fedavg", 1)]
    sam, fedavg = result["rows"]
    assert sam["worst"] > sam["merged"] and sam["sparse_worst"] > sam["sparse"] and fedavg["sparse_worst"] is None
    assert 0 < sam["MB_up"] and 0 < sam["TFLOPs"] < fedavg["TFLOPs"] and fedavg["sparse"] is None
    (ratio,) = result["ratios"].values()
    assert ratio == pytest.approx(sam["merged"] / fedavg["merged"]) and result["missing"] == 0
    lines = (tmp_path / "benchmarks" / "suite.jsonl").read_text()
    assert str(tmp_path) not in lines and len(lines.splitlines()) == 2
    for record in map(json.loads, lines.splitlines()):
        last = record["curve"][-1]["sparse_domains"]
        assert last == record["sparse_after"] and (last is None) == (record["variant"] == "fedavg")
    plots = (tmp_path / "benchmarks" / "suite-main.svg").read_text()
    # The figure and three axes for headline and worst domain of the merged models; of sparse ones there is but one.
    assert plots.count("<svg") == 1 + 2 * 3 and "sam</text>" in plots and "fedavg</text>" in plots
    # Nothing runs again, wherever the model is now.
    assert main([*arguments, "--jobs", "1", "--minutes", "0", "--models", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == result["rows"]
    assert (tmp_path / "benchmarks" / "suite.jsonl").read_text() == lines
