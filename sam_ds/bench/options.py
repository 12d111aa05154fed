"""Options that many benchmarks share the rules of."""

from __future__ import annotations

import argparse
from typing import TypeVar

from sam_ds.errors import InputError

Number = TypeVar("Number", int, float)


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """How often each is measured; what takes it is `options.rounds`, 1 or more."""
    parser.add_argument("--rounds", type=int, default=5, help="calls of each, or cases; one more call warms up")


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Of what is drawn."""
    parser.add_argument("--seed", type=int, default=0)


def check_sizes(options: argparse.Namespace, *names: str) -> None:
    """Raises InputError for one that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, got {getattr(options, name)}")


def numbers(name: str, text: str, kind: type[Number]) -> list[Number]:
    """Of an option that lists some. Raises InputError for what is no number."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{name} must be numbers parted by commas, got {text!r}") from error
