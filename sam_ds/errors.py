"""The exception a user causes, bad input, reported before anything expensive starts; and the one that ends a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message gives the name, the value and what to do. The commands exit with code 2."""


class NotFinite(InputError):
    """What a model has computed is NaN or infinite. It ends a federation, as RunStopped."""


class RunStopped(RuntimeError):
    """The run cannot go on, for want of answers, a sound model or room on a disk: its last checkpoint is in place, and
    the message says what stopped it. The launcher exits with code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
