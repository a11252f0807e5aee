"""Choices that depend on a key alone, so that every machine writes the same rows."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def draw(*key: object) -> int:
    """A 64-bit number that depends on the key alone."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


def shuffled(items: Iterable[T], *key: object) -> list[T]:
    """The items in an order that depends on the key and their number."""
    there = list(items)
    return [there[i] for i in sorted(range(len(there)), key=lambda i: draw(*key, i))]
