"""Nested tables, dotted keys and TOML: the three forms in which a configuration travels."""

import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from sam_ds.errors import InputError

Scalar = bool | int | float | str


def merge(
    document: dict[str, Any], table: Mapping[str, Any], prefix: str = "", replace: bool = False
) -> None:
    """Put the keys of a table, dotted or nested, into a nested document in place, with `_` for `-`.

    Raises `InputError` when a key is there already (unless `replace`) or a value stands where a table
    belongs.
    """
    for key, value in table.items():
        head, _, rest = key.replace("-", "_").partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, Mapping):
            inner = document.setdefault(head, {})
            if not isinstance(inner, dict):
                raise InputError(f"{prefix}{head} is set to {inner!r}: it can have no {', '.join(value)}")
            merge(inner, value, f"{prefix}{head}.", replace)
        elif head in document and not replace:
            raise InputError(f"{prefix}{head} is given twice (- and _ are the same in a key)")
        else:
            document[head] = value


def leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no table, with its dotted key, in order."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is none."""
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text


def dump(flat: Mapping[str, Scalar]) -> str:
    """TOML text of dotted keys; keys of one table must stand together, keys of no table first."""
    lines, current = [], ""
    for key, value in flat.items():
        table, _, name = key.rpartition(".")
        if table != current:
            lines += ["", f"[{table}]"]
            current = table
        lines.append(f"{name} = {_value_text(value)}")
    return "\n".join(lines) + "\n"


def _value_text(value: Scalar) -> str:
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that TOML wants DEL escaped too.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
