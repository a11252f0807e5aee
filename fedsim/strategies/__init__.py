"""Federated rules, one file each; `strategy = "name"` is module `name`, attribute STRATEGY."""

from __future__ import annotations

from fedsim import names
from fedsim.core import Strategy


def known() -> list[str]:
    """Names of the rules that ship with fedsim."""
    return names.known(__name__)


def load(name: str) -> Strategy:
    """A rule by file name, or the user's own by dotted path. Raises ConfigError."""
    strategy: Strategy = names.load(__name__, name, "STRATEGY", "server.strategy")
    return strategy
