"""Nothing in the package opens a pickle or runs what it is given."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen", "numpy.load", "np.load",
         "yaml.load", "pandas.read_pickle"}  # fmt: skip


def findings(source: str) -> Iterator[str]:
    """`line: what` of everything that could run code out of data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS:
                yield f"{node.lineno}: {ast.unparse(node.func)}()"
            for keyword in node.keywords:
                given = getattr(keyword.value, "value", True)
                if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and given is not False:
                    yield f"{node.lineno}: {keyword.arg}"
            continue
        else:
            continue
        yield from (f"{node.lineno}: import {name}" for name in names if name.split(".")[0] in MODULES)


def test_the_package_runs_nothing_that_it_is_given() -> None:
    files = [file for folder in ("sam_ds", "launch", "examples") for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    found = [f"{file.relative_to(ROOT)}:{what}" for file in files for what in findings(file.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", [
    "import pickle", "from cloudpickle import loads", "def f():\n    import dill", "torch.load(p)", "eval(text)",
    "np.load(p)", "load(p, allow_pickle=True)", "from_pretrained(n, trust_remote_code=flag)", "run(c, shell=True)",
])  # fmt: skip
def test_the_walk_finds_it(source: str) -> None:
    assert len(list(findings(source))) == 1


@pytest.mark.parametrize("source", ["model.eval()", "re.compile(p)", "from safetensors.torch import load_file",
                                    "f(allow_pickle=False)"])  # fmt: skip
def test_the_walk_leaves_the_rest_alone(source: str) -> None:
    assert not list(findings(source))
