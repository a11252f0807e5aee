"""Federated rules, one file each; `strategy = "name"` is module `name`, attribute STRATEGY."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fedsim.core import Strategy
from fedsim.errors import ConfigError, nearest


def known() -> list[str]:
    """Names of the rules that ship with fedsim."""
    return sorted(m.name for m in iter_modules(__path__))


def load(name: str) -> Strategy:
    """A rule by file name, or the user's own by dotted path `package.module`."""
    if "." not in name and name not in known():
        raise ConfigError("server.strategy", got=name, remedy=nearest(name, known()))
    module = import_module(name if "." in name else f"{__name__}.{name}")
    strategy: Strategy = module.STRATEGY
    return strategy
