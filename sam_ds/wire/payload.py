"""An update as named blobs: which tensor each one is, and what a receiver refuses.

A *unit* is one tensor of an update: a tensor of one expert of one layer, or a shared one. It is what is
sampled, sent, weighted and aggregated. Its name is the key of the blob on the wire:

    expert / layer / expert / tensor      expert/3/7/up
    shared / name                         shared/layers.3.gate.wg

Numbers are decimal without leading zeros, at most five digits; names are segments of ASCII letters,
digits, `_` and inner `-`, joined by single `.` or (shared only) `/`. So a unit has one name, and no name
is a path out of anywhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.blas import sdot
from torch import Tensor

from sam_ds.errors import InputError
from sam_ds.wire.codec import CodecError, decode_body, encode, read_header
from sam_ds.wire.device import encode_tensor

STYPE = "sam-ds.codec.v3"
"""Serialisation type of a bundle (`bundle.py`) of blobs (`header.py`) in a Flower `Array`."""

LARGEST = 1e30
"""In size, of a number of an update: times 1 / p and summed over any round, float32 still holds it."""

_MAX_NAME = 255
_SEGMENT = "[A-Za-z0-9_][A-Za-z0-9_-]*"
_NUMBER = "0|[1-9][0-9]{0,4}"
_TENSOR = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*")
_SHARED = re.compile(rf"{_SEGMENT}(?:[./]{_SEGMENT})*")
_EXPERT_NAME = re.compile(rf"expert/({_NUMBER})/({_NUMBER})/({_TENSOR.pattern})")


class _Ordered:
    """Experts by layer, expert and tensor; then the shared ones by name."""

    __slots__ = ()

    def __lt__(self, other: Unit) -> bool:
        return _order(self) < _order(other)


@dataclass(frozen=True, slots=True)
class ExpertUnit(_Ordered):
    """A tensor of one expert: `ExpertUnit(3, 7, "up")`."""

    layer: int
    expert: int
    tensor: str

    def __post_init__(self) -> None:
        if not (0 <= self.layer <= 99_999 and 0 <= self.expert <= 99_999):
            raise InputError(f"layer {self.layer}, expert {self.expert}: must be in 0..99999")
        _check_name("tensor", self.tensor, _TENSOR)


@dataclass(frozen=True, slots=True)
class SharedUnit(_Ordered):
    """A tensor that every client holds: gate, assembler, norm, counter: `SharedUnit("layers.3.gate.wg")`."""

    name: str

    def __post_init__(self) -> None:
        _check_name("name", self.name, _SHARED)


Unit: TypeAlias = ExpertUnit | SharedUnit


class RejectedUpdate(ValueError):
    """An update that must not be folded.

    `reason` is one of "unknown-unit", "missing-unit", "wrong-shape", "wrong-round", "not-finite", "corrupt"; where
    messages are exchanged there are more (`federation/exchange.py`, `federation/registration.py`).
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason, self.message = reason, message


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteCount:
    """Bytes of an update counted three ways: the arrays, the blobs, the serialised message."""

    raw: int = 0
    encoded: int = 0
    message: int = 0

    def __add__(self, other: ByteCount) -> ByteCount:
        return ByteCount(
            raw=self.raw + other.raw,
            encoded=self.encoded + other.encoded,
            message=self.message + other.message,
        )


def unit_name(unit: Unit) -> str:
    """The name on the wire."""
    if isinstance(unit, ExpertUnit):
        return f"expert/{unit.layer}/{unit.expert}/{unit.tensor}"
    return f"shared/{unit.name}"


@lru_cache(maxsize=1 << 14)
def parse_unit(name: str) -> Unit:
    """The unit of a name: the inverse of `unit_name`. Every reply has the same names, so these are kept.

    Raises:
        InputError: the name is not one that `unit_name` gives.
    """
    if len(name) <= _MAX_NAME:
        if match := _EXPERT_NAME.fullmatch(name):
            return ExpertUnit(int(match[1]), int(match[2]), match[3])
        if name.startswith("shared/"):
            return SharedUnit(name.removeprefix("shared/"))
    raise InputError(f"unit name {name[:80]!r}: expected expert/LAYER/EXPERT/TENSOR or shared/NAME")


def encode_units(
    units: Mapping[Unit, NDArray[Any] | Tensor],
    *,
    values: str = "raw",
    base_round: int = 0,
    compress: bool = False,
    rng: np.random.Generator | None = None,
) -> dict[str, bytes]:
    """One blob per unit, by name, in the order of the units (so that `rng` gives the same bytes for the
    same units). A tensor is encoded where it lies (`device.py`).

    Raises:
        InputError: as `codec.encode`, with the unit's name.
    """
    blobs = {}
    for unit in sorted(units):
        value = units[unit]
        try:
            if isinstance(value, np.ndarray):
                blob = encode(value, values=values, base_round=base_round, compress=compress, rng=rng)
            else:
                blob = encode_tensor(value, values=values, base_round=base_round, compress=compress, rng=rng)
            blobs[unit_name(unit)] = blob
        except InputError as error:
            raise InputError(f"{unit_name(unit)}: {error}") from None
    return blobs


def decode_units(
    blobs: Mapping[str, bytes | memoryview],
    *,
    expected: Mapping[Unit, tuple[int, ...]] | None = None,
    base_round: int | None = None,
    max_bytes: int = 2**31,
    copy: bool = True,
) -> dict[Unit, NDArray[Any]]:
    """The arrays of an update, by unit, or none of them.

    Args:
        blobs: what `encode_units` gave.
        expected: the shape of every unit that must be there, and of no other; None accepts any.
        base_round: the round that every blob must start from; None accepts any.
        max_bytes: the largest sum of decoded arrays.
        copy: without, an array may be a read-only view of its blob.

    Raises:
        RejectedUpdate: with the `reason`; shapes and rounds are looked at before an array is allocated.
    """
    units = {_parse(name): blob for name, blob in blobs.items()}
    if expected is not None:
        for unit in units.keys() - expected.keys():
            raise RejectedUpdate("unknown-unit", f"{unit_name(unit)} was not asked for")
        for unit in expected.keys() - units.keys():
            raise RejectedUpdate("missing-unit", f"{unit_name(unit)} was asked for")
    arrays: dict[Unit, NDArray[Any]] = {}
    left = max_bytes
    for unit, blob in units.items():
        name = unit_name(unit)
        try:
            header = read_header(blob)
            if base_round is not None and header.base_round != base_round:
                raise RejectedUpdate("wrong-round", f"{name} is of {header.base_round}, not {base_round}")
            if expected is not None and header.shape != expected[unit]:
                raise RejectedUpdate("wrong-shape", f"{name} is {header.shape}, not {expected[unit]}")
            array = decode_body(header, max_bytes=left, copy=copy)
        except CodecError as error:
            raise RejectedUpdate("corrupt", f"{name}: {error}") from None
        if array.dtype.kind == "f" and not _small(array):
            raise RejectedUpdate("not-finite", f"{name} holds NaN, or numbers above {LARGEST:g}")
        left -= array.nbytes
        arrays[unit] = array
    return arrays


def _small(array: NDArray[Any]) -> bool:
    """Whether all values are at most `LARGEST`, and numbers."""
    flat = array.reshape(-1)
    if array.dtype == np.float32:
        # One pass at the speed of memory; it is finite only where no value is above 1.9e19. BLAS warns of nothing.
        if len(flat) and math.isfinite(sdot(flat, flat)):
            return True
    # Both are NaN if any value is: no array of bools is made.
    return -LARGEST <= float(array.min(initial=0)) and float(array.max(initial=0)) <= LARGEST


def _parse(name: str) -> Unit:
    try:
        return parse_unit(name)
    except InputError as error:
        raise RejectedUpdate("unknown-unit", str(error)) from None


def _order(unit: Any) -> tuple[int, int, int, str]:
    if isinstance(unit, ExpertUnit):
        return 0, unit.layer, unit.expert, unit.tensor
    return 1, 0, 0, unit.name


def _check_name(field: str, value: str, grammar: re.Pattern[str]) -> None:
    # 20 characters are left for "expert/99999/99999/", so that every unit has a name that can be parsed.
    if len(value) > _MAX_NAME - 20 or not grammar.fullmatch(value):
        raise InputError(f"{field} is {value[:80]!r}: use ASCII letters, digits, _, - in dotted segments")
