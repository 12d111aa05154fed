"""The house has one direction of flow: a test walks the imports of every file."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["data", "graph", "wire", "discovery", "experts", "evaluation", "clients", "federation", "bench", "commands"]
COMMON = {"errors", "tables", "checked", "config"}  # below every room; they import no room
PURE = ["sam_ds/graph", "sam_ds/wire", "sam_ds/federation/participation.py", "sam_ds/federation/scores.py",
        "sam_ds/federation/aggregation.py", "sam_ds/federation/robust.py", "sam_ds/federation/accountant.py",
        "sam_ds/federation/privacy.py"]
EDGES = ["sam_ds/federation", "sam_ds/bench", "sam_ds/cli.py", "sam_ds/__main__.py", "launch"]  # may know Flower


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also inside functions; relative names are made absolute.

    `from a import b` gives `a.b`, since b may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def violations(path: str, source: str) -> list[str]:
    """Every import of one file that goes against the house, as `file:line: reason`."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    inside = any(path == root or path.startswith(root + "/") for root in PURE)
    room = parts[1] if len(parts) > 2 and parts[1] in ROOMS else None
    found = []
    for line, name in imports(source, module, is_package):
        target = name.split(".")
        reason = None
        if target[0] == "sam_ds" and len(target) > 1:
            if target[1] in ROOMS and room and ROOMS.index(target[1]) > ROOMS.index(room):
                reason = f"{room}/ may import only from {', '.join(ROOMS[:ROOMS.index(room)]) or 'no room'}"
            elif target[1] in ROOMS and len(parts) == 2 and parts[1] in COMMON:
                reason = f"{parts[1]}.py lies below every room"
            elif target[1] not in ROOMS and target[1] not in COMMON and room:
                reason = f"{room}/ may import only rooms and {', '.join(sorted(COMMON))}"
        elif target[0] in ("flwr", "deepspeed") and inside:
            reason = f"a pure part imports neither flwr nor deepspeed, but {name}"
        elif target[:2] == ["deepspeed", "moe"] and room not in ("experts", "bench"):
            reason = f"only experts/ and bench/ import deepspeed.moe, but {name}"
        elif target[0] == "flwr" and not any(path == edge or path.startswith(edge + "/") for edge in EDGES):
            reason = f"only federation/, bench/ and the commands import flwr, but {name}"
        if reason:
            found.append(f"{path}:{line}: {reason} ({name})")
    return found


def test_imports_flow_one_way() -> None:
    files = [file for folder in ("sam_ds", "launch") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > len(ROOMS)
    found = []
    for file in files:
        found += violations(file.relative_to(ROOT).as_posix(), file.read_text())
    assert not found, "\n" + "\n".join(found)


def test_pure_parts_load_neither_flower_nor_deepspeed() -> None:
    """Not through what they import either: seen in a fresh interpreter."""
    patterns = [path if path.endswith(".py") else f"{path}/*.py" for path in PURE]
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    program = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n" \
        "print(*({'flwr', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not result.stdout.split(), f"{result.stdout.strip()} was loaded by one of {', '.join(names)}"


def test_every_package_is_a_room() -> None:
    packages = {file.parent.name for file in (ROOT / "sam_ds").glob("*/__init__.py")}
    assert packages == set(ROOMS)


@pytest.mark.parametrize(("path", "source", "bad"), [
    ("sam_ds/graph/dag.py", "from sam_ds.wire import codec", True),
    ("sam_ds/wire/codec.py", "from sam_ds.graph import dag", False),
    ("sam_ds/wire/codec.py", "def f():\n    from sam_ds import federation", True),
    ("sam_ds/wire/codec.py", "from ..clients.tiers import Tier", True),
    ("sam_ds/wire/__init__.py", "from .codec import encode", False),
    ("sam_ds/federation/aggregation.py", "import flwr.app", True),
    ("sam_ds/federation/strategy.py", "import flwr.app", False),
    ("sam_ds/federation/methods/sam.py", "from ...clients import training", False),
    ("sam_ds/clients/training.py", "import deepspeed", False),
    ("sam_ds/clients/training.py", "from deepspeed import moe", True),
    ("sam_ds/experts/native.py", "from deepspeed.moe.layer import MoE", False),
    ("sam_ds/clients/tiers.py", "from flwr.app import Message", True),
    ("launch/run_federation.py", "import flwr", False),
    ("sam_ds/config.py", "from sam_ds.data import corpora", True),
    ("sam_ds/data/corpora.py", "from sam_ds.config import RunConfig", False),
    ("sam_ds/data/corpora.py", "from sam_ds.cli import main", True),
    ("sam_ds/cli.py", "from sam_ds.federation import apps", False),
])
def test_the_walk_sees_what_it_should(path: str, source: str, bad: bool) -> None:
    found = violations(path, source)
    assert bool(found) == bad, found
    if bad:
        assert found[0].startswith(f"{path}:{source.count(chr(10)) + 1}: ")
