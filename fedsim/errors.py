"""Errors a user can act on: each names the value, what was expected, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FedSimError(Exception):
    """A failure with a remedy. `str(error)` is one paragraph: value, expectation, remedy."""

    def __init__(self, what: str, *, got: Any = None, expected: str = "", remedy: str = "") -> None:
        parts = [what if got is None else f"{what}: got {got!r}"]
        if expected:
            parts.append(f"expected {expected}")
        text = "; ".join(parts) + "."
        super().__init__(f"{text} {remedy}".strip())


class ConfigError(FedSimError):
    """The configuration asks for something that does not exist or does not fit together."""


class DataError(FedSimError):
    """Data are missing, unreadable, or not in the expected columns."""


class ModelError(FedSimError):
    """A base model or adapter cannot be loaded, or would not be computed correctly."""


class CheckpointError(FedSimError):
    """A run on disk cannot be continued from what lies there."""


class RunError(FedSimError):
    """A run that was under way cannot go on; everything finished is on disk."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the closest known one, or the whole list."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names)}."
