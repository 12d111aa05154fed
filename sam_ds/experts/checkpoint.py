"""Models on disk and on the hub: any, whose loaders fail in many ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from sam_ds.errors import InputError


@contextmanager
def readable(model: str) -> Iterator[None]:
    """Whatever transformers raises inside for a folder or hub id that is no model becomes one line of InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"model {model!r} cannot be loaded: {line}") from error
