"""Reading a corpus: the embedded one, a folder of files, or a data set by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from sam_ds.data.embedded import embedded_corpus
from sam_ds.data.splits import Corpus, Splits, build_corpus
from sam_ds.errors import InputError, nearest

SPLITS = ("train", "valid", "test")


def load_corpus(data: str, *, public_every: int = 4, forgetting: Sequence[str] = ()) -> Corpus:
    """The corpus that a run's `data` names.

    data: `"embedded"`; a folder of `<domain>/{train,valid,test}` as .jsonl or .json (an object with "text" a
        line), .txt (documents parted by blank lines) or .parquet (a column "text"); or a name for `datasets`,
        `"name"` or `"name:configuration"` (columns "text" and, if there are several domains, "domain").
        Where valid is missing (for `datasets` also test), it is cut from train by the hash of the text.
    public_every: train documents of index mod this = 0 are public and leave train; 0 = none. The embedded
        corpus does not heed it: its base model was trained on a public split of its own.
    forgetting: domains whose train documents are all public.

    Raises `InputError` for data that cannot be read, a domain without train or test documents and an unknown
    forgetting domain.
    """
    if public_every < 0:
        raise InputError(f"public_every must be 0 (no public documents) or more, got {public_every}")
    if data == "embedded":
        domains = dict(embedded_corpus().domains)
    else:
        domains = {name: _publish(splits, public_every) for name, splits in _read(data).items()}
    for name in forgetting:
        if name not in domains:
            raise InputError(f"forgetting names {name!r}, which is no domain of {data!r}"
                             f"{nearest(name, domains)}; its domains: {', '.join(domains)}")
        splits = domains[name]
        domains[name] = replace(splits, public=splits.public + splits.train, train=())
    return build_corpus(data, domains)


def _publish(splits: Splits, every: int) -> Splits:
    if every == 0:
        return splits
    kept = tuple(text for index, text in enumerate(splits.train) if index % every)
    return replace(splits, public=splits.train[::every], train=kept)


def _read(data: str) -> dict[str, Splits]:
    """The domains of a folder or of a data set, nothing public yet."""
    folder = Path(data).expanduser()
    if folder.is_dir():
        return _read_folder(folder)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", data) and not data.startswith("."):
        return _read_dataset(data)
    raise InputError(f"data = {data!r}: there is no such folder, and it is no name that `datasets` "
                     f"takes; give 'embedded', a folder of <domain>/{{train,valid,test}}.jsonl, or a name")


def _read_folder(folder: Path) -> dict[str, Splits]:
    domains: dict[str, Splits] = {}
    for home in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        read: dict[str, tuple[str, ...]] = {}
        for split in SPLITS:
            files = [file for suffix in READERS if (file := home / f"{split}{suffix}").is_file()]
            if len(files) > 1:
                raise InputError(f"{home} has several files for {split}: keep one of "
                                 f"{', '.join(file.name for file in files)}")
            if files:
                read[split] = tuple(text for text in READERS[files[0].suffix](files[0]) if text.strip())
                if not read[split]:
                    raise InputError(f"{files[0]} has no text in it")
        domains[home.name] = _complete(home.name, read, ("valid",), str(folder))
    if not domains:
        raise InputError(f"the folder {folder} has no domain: expected <domain>/{{train,valid,test}}.jsonl")
    return domains


def _read_lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise InputError(f"{file}, line {number} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise InputError(f'{file}, line {number} must be an object with a string under "text"')
            yield record["text"]


def _read_text(file: Path) -> Iterator[str]:
    try:
        yield from (document.strip() for document in re.split(r"\n\s*\n", file.read_text(encoding="utf-8")))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}") from error


def _read_parquet(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{file} is not a parquet file: {error}") from error
    if "text" not in table.column_names:
        raise InputError(f'{file} has no column "text"; its columns: {", ".join(table.column_names)}')
    return (str(text) for text in table.column("text").to_pylist() if text is not None)


READERS: dict[str, Callable[[Path], Iterable[str]]] = {
    ".jsonl": _read_lines, ".json": _read_lines, ".txt": _read_text, ".parquet": _read_parquet}


def _read_dataset(data: str) -> dict[str, Splits]:
    import datasets

    name, _, configuration = data.partition(":")
    try:
        loaded = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # whatever a hub, a cache or a builder raises: the run cannot start
        called = f"datasets.load_dataset({name!r}" + (f", {configuration!r})" if configuration else ")")
        raise InputError(f"data = {data!r}: there is no such folder, and {called} failed: {error}") from error
    default = name.rpartition("/")[2]
    found: dict[str, dict[str, list[str]]] = {}
    for split, table in zip(SPLITS, map(loaded.get, ("train", "validation", "test")), strict=True):
        if table is None:
            continue
        if "text" not in table.column_names:
            raise InputError(f'data = {data!r} has no column "text"; its columns: '
                             f'{", ".join(table.column_names)}')
        homes = table["domain"] if "domain" in table.column_names else [default] * len(table)
        for text, home in zip(table["text"], homes, strict=True):
            if text and text.strip():
                found.setdefault(str(home), {}).setdefault(split, []).append(text)
    if not found:
        raise InputError(f"data = {data!r} has no text in its splits {', '.join(loaded)}")
    cut = [ours for ours, theirs in (("valid", "validation"), ("test", "test")) if theirs not in loaded]
    return {home: _complete(home, {split: tuple(texts) for split, texts in read.items()}, cut, data)
            for home, read in found.items()}


def _complete(domain: str, read: dict[str, tuple[str, ...]], cut: Sequence[str], origin: str) -> Splits:
    """All three splits: a tenth of train, by hash, for each one that is missing and may be cut."""
    for index, split in enumerate(cut):
        if split in read or "train" not in read:
            continue
        chosen = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 10 == index
                  for text in read["train"]]
        train = read["train"]
        read[split] = tuple(text for text, taken in zip(train, chosen, strict=True) if taken)
        read["train"] = tuple(text for text, taken in zip(train, chosen, strict=True) if not taken)
    for split in ("train", "test"):
        if not read.get(split):
            raise InputError(f"domain {domain!r} of {origin!r} has no {split} documents: add some")
    return Splits(public=(), train=read["train"], valid=read.get("valid", ()), test=read["test"])
