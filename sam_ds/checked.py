"""Frozen value objects whose annotations are their checks: a range or a choice is written once."""

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from sam_ds.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """Base of the sections. A field that does not fit its annotation raises `InputError` on construction.

    Integers become floats and lists (or texts with commas) become tuples where the annotation says so, so
    that equal settings are equal values.
    """

    prefix: ClassVar[str]  # what a message puts before the field's name

    def __post_init__(self) -> None:
        for each in fields(self):
            value = checked(self.prefix + each.name, getattr(self, each.name), each.type)
            object.__setattr__(self, each.name, value)


@dataclass(frozen=True)
class Interval:
    """The values a number may take; `ends` is the usual notation: a round bracket leaves its end out."""

    low: float
    high: float = math.inf
    ends: str = "[]"

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        return above and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'>' if self.ends[0] == '(' else '>='} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


Count = Annotated[int, Interval(1)]
Natural = Annotated[int, Interval(0)]
Positive = Annotated[float, Interval(0, ends="(]")]
NonNegative = Annotated[float, Interval(0)]
Probability = Annotated[float, Interval(0, 1)]
Fraction = Annotated[float, Interval(0, 1, "(]")]  # more than nothing, at most all
Decay = Annotated[float, Interval(0, 1, "[)")]  # of a running mean


def checked(name: str, value: Any, hint: Any) -> Any:
    """The value as the annotation `hint` has it, or `InputError` with the name and what is expected."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = checked(name, value, arguments[0])
        if number not in arguments[1]:
            raise InputError(f"{name} must be {arguments[1]}, got {value!r}")
        return number
    if origin is Literal:
        if value not in arguments:
            hinted = nearest(value, arguments) if isinstance(value, str) else ""
            raise InputError(f"{name} must be one of {', '.join(arguments)}, got {value!r}{hinted}")
        return value
    if origin is tuple:
        return _texts(name, value)
    if origin is dict:
        return {key: checked(f"{name}.{key}", each, arguments[1]) for key, each in value.items()}
    if hint is float and type(value) is int:
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        expected = {int: "an integer", float: "a number", bool: "true or false", str: "text (in quotes)"}
        raise InputError(f"{name} must be {expected.get(hint, f'a {hint.__name__}')}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{name} must be finite, got {value!r}")
    if hint is str and not value.strip():
        raise InputError(f"{name} must not be empty")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    items = [item for item in value.split(",") if value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise InputError(f"{name} must be a list of texts, or one text with commas, got {value!r}")
    stripped = tuple(item.strip() for item in items)
    if not all(stripped) or any("," in item for item in stripped):
        raise InputError(f"{name} must have no empty item and no comma inside an item, got {value!r}")
    return stripped
