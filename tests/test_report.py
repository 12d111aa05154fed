"""The report of a realistic run: complete, self-contained, escaped, and readable while the run goes on."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_ds.errors import InputError
from sam_ds.evaluation.figure import figure
from sam_ds.evaluation.records import read
from sam_ds.evaluation.report import summary_table, write_report
from sam_ds.evaluation.svg import arc_diagram, line_chart, lines, powers, short, stacked_bars, ticks

HOSTILE = "<script>alert('x')</script>&\"q\""
LAYERS, EXPERTS = 2, 6
DOMAINS = ["legal", "medical", HOSTILE, "wiki"]
Records = list[dict[str, Any]]


def _scores(level: float) -> dict[str, Any]:
    domains = {name: level * (1 + 0.1 * index) for index, name in enumerate(DOMAINS)}
    return {"domains": domains, "headline": level * 1.1, "forgetting": level * 1.3}


def _bytes(message: int) -> dict[str, int]:
    return {"raw": message * 2, "encoded": message - 100, "message": message}


def _records(rounds: int = 3) -> Records:
    """A run of clients 0..2, one rejected reply a round, edits in round 2."""
    graph = [[[int(p < e) for e in range(EXPERTS)] for p in range(EXPERTS)] for _ in range(LAYERS)]
    graph[0][2][5] = 0
    after = json.loads(json.dumps(graph))
    after[0][2][5], after[0][1][4] = 1, 0
    used = [
        [[(p + 1) * (e + 2) * (p < e) for e in range(EXPERTS)] for p in range(EXPERTS)] for _ in range(LAYERS)
    ]
    edits = [
        {"layer": 0, "tail": 2, "head": 5, "kind": "promote", "kept": True, "change": -0.002},
        {"layer": 0, "tail": 1, "head": 4, "kind": "prune", "kept": True, "change": 0.0005},
        {"layer": 1, "tail": 0, "head": 3, "kind": "prune", "kept": False, "change": math.inf},
    ]
    records: Records = [{
        "kind": "run", "method": "sam", "config": {"seed": 7, "model": HOSTILE, "sam": {"top_k": 4}},
        "data": {"name": "embedded", "fingerprint": "0123456789abcdef",
                 "domains": {name: {"train": 1000 + i} for i, name in enumerate(DOMAINS)}},
        "model": {"name": "base", "parameters": 2_200_000, "layers": LAYERS, "experts": EXPERTS, "top_k": 4,
                  "roots": 1},
        "clients": [{"client": i, "domain": DOMAINS[i], "tier": "small", "examples": 40 + i}
                    for i in range(3)],
        "tiers": [{"name": "small", "experts": 4, "memory_gib": 0.5, "precision": "fp32", "trains": "full",
                   "ds_config": "cpu_zero2.json"}],
        "graph": graph,
    }]  # fmt: skip
    for r in range(rounds + 1):
        for client in range(3) if r else ():
            rejected = {"status": f"rejected: corrupt: checksum {HOSTILE}", "reason": "corrupt"}
            answer = {"status": "ok", "train_seconds": 2.0, "load_seconds": 0.5, "loss_first": 4.0,
                      "loss_last": 3.5, "tokens": 12288, "active_flops": 5e10}  # fmt: skip
            records.append({
                "kind": "client", "round": r, "client": client, "domain": DOMAINS[client], "tier": "small",
                "bytes_up": _bytes(1_000_000), "bytes_down": _bytes(2_000_000),
                **(rejected if client == 2 else answer),
            })  # fmt: skip
        records.append({
            "kind": "round", "round": r, "wall_seconds": 10.0 if r else 2.0, "evaluation_seconds": 2.0,
            "orchestration_seconds": 0.5 if r else 0.0, "effective_sample_size": 1.9, "largest_weight": 3.2,
            "bytes_up": _bytes(3_000_000 * bool(r)), "bytes_down": _bytes(6_000_000 * bool(r)),
            "merged": _scores(40 - r) if r != 1 else None, "sparse": _scores(44 - r) if r != 1 else None,
            "edits": edits if r == 2 else [], "gamma": 0.002 if r == 2 else None, "edges": [14, 15],
            "warnings": [f"few decide {HOSTILE}"] if r == 3 else [],
        })  # fmt: skip
    records.append({
        "kind": "end", "rounds": rounds, "merged_before": _scores(41), "merged_after": _scores(36),
        "sparse_before": _scores(45), "sparse_after": _scores(39), "graph": after, "used": used,
        "bounds": {"uncorrected": 0.91, "corrected": 0.42, "measured": 0.13, "note": "estimates, nats a token"},
        "wall_seconds": 40.0, "orchestration_share": 0.05, "bytes_base": 5_000_000,
    })  # fmt: skip
    return records


def _written(folder: Path, records: Records, tail: str = "") -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


class _Page(HTMLParser):
    """What a page refers to, its section headings, its text, and whether the tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.headings: list[str] = []
        self.words: list[str] = []
        self.classes: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta",):
            self.stack.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data"):
                self.references.append(value or "")
            elif name == "class":
                self.classes += (value or "").split()
            assert not name.startswith("on"), f"an event handler: {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack and self.stack[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.stack:
            self.words.append(data)


def _page(tmp_path: Path, records: Records, tail: str = "") -> tuple[str, _Page]:
    write_report(_written(tmp_path, records, tail), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = _Page(text)
    assert not page.stack
    return text, page


def test_the_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    text, page = _page(tmp_path, _records())
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "form"}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_every_section_is_there_and_linked(tmp_path: Path) -> None:
    text, page = _page(tmp_path, _records())
    assert page.headings == [
        "Headline", "Perplexity before and after", "Perplexity over the run", "Expert graph", "Edge usage",
        "Topology edits and bounds", "Bytes", "Time", "Client compute", "Clients and tiers",
        "Rejected replies", "Warnings", "Privacy", "Data", "Configuration",
    ]  # fmt: skip
    anchors = re.findall(r'<section id="([^"]+)"', text)
    assert [reference[1:] for reference in page.references] == anchors and len(set(anchors)) == len(anchors)
    assert "{" not in " ".join(page.words)


def test_the_figures_are_those_of_the_run(tmp_path: Path) -> None:
    words = " ".join(_page(tmp_path, _records())[1].words)
    for expected in [
        "39.60", "from 45.10", "-12.2%", "42.90",  # merged headline and sparse headline after
        "9.0 MB", "18.0 MB", "50% of the raw tensors", "5.0% of the wall time",
        "5.0 MB of frozen base weights",
        "18,000,000", "0123456789abcdef", "2 → 5", "rolled back", "+inf", "+5.00e-04", "0.91", "0.42", "0.13",
        "uncorrected bound (estimate)", "corrected bound (estimate)",
        "0.002 nats, the largest change seen",
        "layer 0: 1 pruned, 1 promoted", "layer 1: 0 pruned, 0 promoted", "36,864", "150GFLOP", "sam.top_k",
    ]:  # fmt: skip
        assert expected in words, expected


def test_faults_are_counted_by_reason(tmp_path: Path) -> None:
    records = _records()
    late = {"kind": "refused", "round": 3, "node": 4711, "client": None, "reason": "late", "detail": "given up"}
    records[-1:-1] = [late, late | {"client": 2}, late | {"reason": HOSTILE}]
    rounds = [record for record in records if record["kind"] == "round"]
    rounds[3]["void"] = 2
    text, page = _page(tmp_path, records)
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    assert ["corrupt", "3", "3", "client 2"] in cells and ["late", "2", "1", "node 4711, client 2"] in cells
    assert ["3", "4711", "2", "late", "given up"] in cells and "<script" not in text
    words = " ".join(page.words)
    assert f"few decide {HOSTILE}" in words and "Round 3 was void, without a valid answer, 2 times" in words


def test_a_run_without_faults_says_so(tmp_path: Path) -> None:
    records = [record | {"status": "ok"} if record["kind"] == "client" else record | {"warnings": []}
               for record in _records() if record.get("client") != 2]  # fmt: skip
    text = _page(tmp_path, records)[0]
    assert "none: every reply was valid" in text and '<h2>Warnings</h2><p class="none">none</p>' in text
def test_the_privacy_of_a_run_is_of_its_last_round_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    records = _records()
    assert "nothing is promised of a client's answers" in " ".join(_page(tmp_path, records)[1].words)
    rounds = [record for record in records if record["kind"] == "round"]
    for record in rounds[2:]:
        record["epsilon"] = {"delta": 1e-5, "edits": 0.125 * record["round"]}
    words = " ".join(_page(tmp_path, records)[1].words)
    assert "0.375" in words and "delta 1e-05" in words and "of the run as a whole nothing is promised" in words
    rounds[-1]["epsilon"] |= {"weights": 1.75, "run": 1.76}
    words = " ".join(_page(tmp_path, records)[1].words)
    assert "1.76" in words and "of the run as a whole" not in words


def test_graphs_mark_what_was_edited(tmp_path: Path) -> None:
    page = _page(tmp_path, _records())[1]
    assert page.classes.count("pruned") == 1 and page.classes.count("promoted") == 1
    assert page.classes.count("arc") == (14 + 15) * 2
    assert page.classes.count("root") == LAYERS * 2


def test_what_came_from_outside_is_escaped(tmp_path: Path) -> None:
    text, page = _page(tmp_path, _records())
    assert "<script" not in text and HOSTILE in " ".join(page.words)
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(svgs) > 8
    for svg in svgs:
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("kept", range(1, 15))
def test_a_run_under_way_has_a_report(tmp_path: Path, kept: int) -> None:
    records = _records()
    assert kept < len(records) == 15
    text, page = _page(tmp_path, records[:kept], tail='{"kind": "round", "rou')
    assert "under way" in text and "Headline" in page.headings
    assert "(under way)" in summary_table(tmp_path / "metrics.jsonl")


def test_the_graph_so_far_is_the_one_that_the_end_will_show(tmp_path: Path) -> None:
    records = _records()
    so_far = read(_written(tmp_path, records[:-1])).graph_after()
    assert so_far == records[-1]["graph"] != records[0]["graph"]


def test_methods_without_a_sparse_model_have_a_report(tmp_path: Path) -> None:
    records = _records()
    for record in records:
        if record["kind"] == "round":
            record["sparse"] = None
    records[-1] |= {"sparse_before": None, "sparse_after": None, "bounds": None, "bytes_base": 0}
    words = " ".join(_page(tmp_path, records)[1].words)
    assert "sparse before" not in words and "No bounds" in words and "frozen base" not in words


def test_the_summary_is_a_plain_aligned_table(tmp_path: Path) -> None:
    lines = summary_table(_written(tmp_path, _records())).splitlines()
    assert lines[0].split() == [
        "perplexity",
        *"merged before after change sparse before after change".split(),
    ]
    assert lines[2].split() == ["legal", "41.00", "36.00", "-12.2%", "45.00", "39.00", "-13.3%"]
    assert [line.split()[0] for line in lines[-4:-2]] == ["headline", "forgetting"]
    assert len({len(line) for line in lines[:-2]}) == 1
    assert lines[-1] == "3 rounds   up 9.0 MB   down 18.0 MB   orchestration 5.0% of the wall time"


def test_a_file_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the metrics"):
        summary_table(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no record of kind 'run'"):
        summary_table(_written(tmp_path, _records()[1:]))
    path = _written(tmp_path, _records())
    path.write_text(path.read_text().replace('"kind": "client"', '"kind": ', 1))
    with pytest.raises(InputError, match="line 3"):
        summary_table(path)


@pytest.mark.parametrize(("low", "high"), [(0, 10), (36.0, 41.3), (5, 5), (0, 0), (1e-5, 3e-5), (-2, 7e6)])
def test_ticks_are_round_and_cover_the_values(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert 2 <= len(marks) <= 8 and marks[0] <= low and marks[-1] >= high and marks == sorted(set(marks))


def test_numbers_are_short() -> None:
    assert [short(x) for x in (0, 1.23456, 12345, 5e10, math.inf)] == ["0", "1.235", "12.3k", "50G", "inf"]


def test_lines_leave_out_what_is_not_finite() -> None:
    chart = line_chart({"a": [(0, 1.0), (1, math.inf), (2, 3.0), (3, math.nan)]}, "x", "y")
    assert chart.count("<circle") == 2 and "inf" not in chart and "nan" not in chart
    assert "no figures" in line_chart({}, "x", "y") and "no figures" in stacked_bars({}, ["a"], "s")


def test_a_logarithmic_axis_puts_tenfold_apart_equally() -> None:
    chart = lines({"a": [(0.0, 9.0), (1.0, 1.0), (10.0, 2.0), (100.0, 3.0)]}, "x", "y", log_x=True)
    first, second, third = (float(x) for x in re.findall(r'cx="([\d.]+)"', chart))
    assert third - second == pytest.approx(second - first, abs=0.1) and second > first


@given(low=st.floats(1e-6, 1e6), factor=st.floats(1, 1e6))
def test_powers_cover(low: float, factor: float) -> None:
    marks = powers(low, low * factor)
    assert len(marks) >= 2 and marks[0] <= low * (1 + 1e-9) and marks[-1] >= low * factor * (1 - 1e-9)


def test_a_figure_names_its_series_once() -> None:
    names = [f"series {number}" for number in range(8)]
    charts = {title: lines({name: [(1, 1), (2, 2)] for name in names}, "x", title) for title in ("first", "second")}
    drawn = ElementTree.fromstring(figure(charts, names, columns=1))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    assert [texts.count(name) for name in names] == [1] * 8 and {"first", "second"} <= {*texts}
    # What has a colour of an earlier series is dashed.
    assert sum("again" in element.attrib.get("class", "") for element in drawn.iter()) == 2 + 2 * (2 + 2 * 2)
    _, _, width, height = map(float, drawn.attrib["viewBox"].split())
    assert width < height


def test_more_use_is_darker() -> None:
    drawing = arc_diagram(3, 1, [(0, 1), (0, 2)], {(0, 1): 1.0, (0, 2): 0.1}, {}, "t")
    opacities = [float(value) for value in re.findall(r"opacity:([\d.]+)", drawing)]
    assert opacities[0] > opacities[1] > 0
