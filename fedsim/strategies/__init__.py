"""Federated rules, one file each; `strategy = "name"` is module `name`, attribute STRATEGY."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, cast

from fedsim import names
from fedsim import options as options_
from fedsim.core import Strategy
from fedsim.errors import ConfigError


def known() -> list[str]:
    """Names of the rules that ship with fedsim."""
    return names.known(__name__)


def describe(name: str) -> tuple[str, dict[str, Any]]:
    """A rule's first line, and its options with their defaults."""
    rule = load(name)
    about = (import_module(type(rule).__module__).__doc__ or "").partition("\n")[0]
    return about, {f.name: getattr(rule, f.name) for f in fields(cast(Any, rule))}


def load(name: str, options: Mapping[str, Any] | None = None) -> Strategy:
    """A rule by file name, or the user's own by dotted path, with its options.

    Raises:
        ConfigError: there is no such rule, or an option is unknown, of another type or impossible.
    """
    rule: Any = names.load(__name__, name, "STRATEGY", "server.strategy")
    if not (isinstance(rule, type) and is_dataclass(rule) and issubclass(rule, Strategy)):
        raise ConfigError(
            "server.strategy", got=name,
            expected="STRATEGY to be a dataclass that inherits from fedsim.core.Strategy",
            remedy="Decorate the class with @dataclass(frozen=True); its fields are the options.",
        )  # fmt: skip
    if rule.step is Strategy.step and rule.aggregate is Strategy.aggregate:
        raise ConfigError(
            "server.strategy", got=name, expected="a rule with a `step` or an `aggregate`",
            remedy="Write one of them; docs/write-a-strategy.md shows how.",
        )  # fmt: skip
    return cast(Strategy, options_.make(rule, options or {}, "server.options", name))
