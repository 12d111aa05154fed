"""A corpus that every installation carries: four domains, no download, no cache.

    code       source of the Python standard library, cut at top-level definitions
    legal      licences of the installed distributions and of Python
    product    descriptions (README) of the installed distributions
    technical  Python's language reference (`pydoc`) and docstrings of the modules that `code` leaves

Its texts differ between installations, and so does its fingerprint: it is for trying things and for tests,
where numbers are compared within one machine. A document is a source file, a reference topic, a description
or a licence file (60 paragraphs of it: the long ones are lists of licences). Its pieces stay on one side:
documents are put in the order of their hash, and that row is cut by size into 30 % public, 50 % train, 10 %
valid and 10 % test. A paragraph most of which was there before is dropped: what is tested was not trained on.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from sam_ds.data.splits import Corpus, Splits, build_corpus
from sam_ds.errors import InputError

DOMAIN_CHARS = 750_000  # of a domain, all splits
# No document may fill a whole split (a tenth), even where a domain is a third of what it may be.
DOCUMENT_CHARS = 24_000
PIECE_CHARS = (1_000, 4_000)  # a piece is closed at the first, never longer than the second
SHORT_CHARS = 150  # pieces below are dropped
RUN_WORDS = 8
LICENCE_PARAGRAPHS = 60
BOUNDS = (0.3, 0.8, 0.9, 1.0)  # public, train, valid, test

Document = tuple[str, list[str]]  # name, and its blocks or pieces
Runs = set[tuple[str, ...]]  # of RUN_WORDS words each

_SKIPPED = {"antigravity", "encodings", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}


def embedded_corpus() -> Corpus:
    """The four domains; `fingerprint` tells installations apart.

    Raises `InputError` where a domain has too little text (an installation without its metadata or sources).
    """
    seen: Runs = set()
    modules = sorted(_modules(), key=lambda named: _digest(named[0]))
    code = _gather(_sources(modules), seen)
    used = {name for name, _ in code}
    left = [named for named in modules if named[0] not in used]
    gathered = {
        "code": code,
        "legal": _gather(_licences(), seen),
        "product": _gather(_descriptions(), seen),
        "technical": _gather(_references(left), seen),
    }
    return build_corpus("embedded", {name: _split(name, documents) for name, documents in gathered.items()})


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _gather(documents: Iterable[Document], seen: Runs) -> list[Document]:
    """The first documents (name, blocks) that fill a domain; `seen` grows by what they say."""
    gathered: list[Document] = []
    size = 0
    for name, blocks in documents:
        pieces: list[str] = []
        room = min(DOCUMENT_CHARS, DOMAIN_CHARS - size)
        parts = (part for block in blocks for part in _cut(block, PIECE_CHARS[1]))
        for piece in _pieces(_unseen(parts, seen)):
            if len(piece) > room:
                break
            if len(piece) < SHORT_CHARS:
                continue
            pieces.append(piece)
            room -= len(piece)
        if pieces:
            gathered.append((name, pieces))
            size += sum(map(len, pieces))
        if size > DOMAIN_CHARS - PIECE_CHARS[1]:
            break
    return gathered


def _unseen(blocks: Iterable[str], seen: Runs) -> Iterator[str]:
    """The blocks of whose runs of words at most half were seen: licences are repeated with small changes."""
    for block in blocks:
        words = re.findall(r"\w+", block.lower())
        runs = {tuple(words[start:start + RUN_WORDS]) for start in range(max(1, len(words) - RUN_WORDS + 1))}
        if 2 * len(runs & seen) <= len(runs):
            yield block
        seen |= runs


def _pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks that are short."""
    low, high = PIECE_CHARS
    piece = ""
    for block in blocks:
        if len(piece) + 2 + len(block) <= high:
            piece = f"{piece}\n\n{block}" if piece else block
        else:
            yield piece
            piece = block
        if len(piece) >= low:
            yield piece
            piece = ""
    yield piece


def _cut(block: str, high: int) -> list[str]:
    """Parts of at most `high` characters: cut at a blank line, else at a line's end, else anywhere."""
    parts: list[str] = []
    while len(block) > high:
        end = next((at for mark in ("\n\n", "\n") if (at := block.rfind(mark, high // 4, high)) > 0), high)
        parts.append(block[:end])
        block = block[end:].strip("\n")
    return [*parts, block]


def _split(domain: str, documents: list[Document]) -> Splits:
    total = sum(len(piece) for _, pieces in documents for piece in pieces)
    splits: tuple[list[str], ...] = ([], [], [], [])
    before = 0
    for _, pieces in sorted(documents, key=lambda named: _digest(f"{domain}:{named[0]}")):
        size = sum(map(len, pieces))
        # The middle of the document says where it goes: a split larger than every document is never empty.
        middle = (before + size / 2) / total
        splits[sum(middle >= bound for bound in BOUNDS[:-1])].extend(pieces)
        before += size
    if not all(splits):
        raise InputError(f"data = 'embedded': this installation has only {len(documents)} documents ({total} "
                         f"characters) for the domain {domain!r}; give a folder or a name for `datasets`")
    public, train, valid, test = map(tuple, splits)
    return Splits(public=public, train=train, valid=valid, test=test)


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n\s*\n", text.expandtabs(4)) if part.strip()]


def _modules() -> Iterator[tuple[str, Path]]:
    """(name, file) of the public modules of the standard library that have a source."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sys.stdlib_module_names:
        if name.startswith("_") or name in _SKIPPED:
            continue
        for file in [root / f"{name}.py", *(root / name).rglob("*.py")]:
            inside = file.relative_to(root).with_suffix("")
            if file.is_file() and not any(part.startswith("test") for part in inside.parts):
                yield ".".join(inside.parts), file


def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace").expandtabs(4)


def _sources(modules: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    for name, file in modules:
        source = _source(file)
        lines = source.splitlines()
        starts = [0]
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                starts.append(min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1)
        blocks = ["\n".join(lines[start:end]).strip("\n")
                  for start, end in zip(starts, [*starts[1:], len(lines)], strict=True)]
        yield name, [block for block in blocks if block.strip()]


def _references(modules: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """Topics of the language reference, then docstrings, each under the name of what it documents."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", _paragraphs(topics[name])
    for name, file in modules:
        blocks: list[str] = []
        for node in ast.walk(ast.parse(_source(file))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(node)
                if said:
                    label = name if isinstance(node, ast.Module) else f"{name}.{node.name}"
                    first, *rest = _paragraphs(said) or [""]
                    blocks += [f"{label}: {first}", *rest]
        yield name, blocks


def _distributions() -> list[tuple[str, metadata.Distribution]]:
    """The installed distributions by name, without this one: its own text is still being written."""
    found: dict[str, metadata.Distribution] = {}
    for each in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        if name and name != "sam-ds":
            found.setdefault(name, each)
    return sorted(found.items())


def _licences() -> Iterator[Document]:
    own = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if own.is_file():
        yield from _licence("python", own)
    for name, each in _distributions():
        for listed in sorted(each.files or [], key=str):
            if re.match("LICEN[CS]E|COPYING|NOTICE", listed.name, re.IGNORECASE) and listed.suffix != ".py":
                file = Path(str(listed.locate()))
                if file.is_file():
                    yield from _licence(f"{name} {listed}", file)


def _licence(name: str, file: Path) -> Iterator[Document]:
    paragraphs = _paragraphs(file.read_text(encoding="utf-8", errors="replace"))
    for start in range(0, len(paragraphs), LICENCE_PARAGRAPHS):
        yield f"{name} {start}", paragraphs[start:start + LICENCE_PARAGRAPHS]


def _descriptions() -> Iterator[Document]:
    for name, each in _distributions():
        body = each.metadata.get_payload()  # type: ignore[attr-defined]  # an email.message.Message
        text = each.metadata["Description"] or (body if isinstance(body, str) else "")
        yield name, _paragraphs(text)
