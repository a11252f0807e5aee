"""A name in a configuration -> what it stands for. There is no registry: names are modules."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fedsim.errors import ConfigError, nearest


def known(package: str) -> list[str]:
    """Names of the modules that ship in a package."""
    return sorted(m.name for m in iter_modules(import_module(package).__path__))


def load(package: str, name: str, attribute: str, key: str) -> Any:
    """`attribute` of the module `name` in `package`, or of the user's own `dotted.path`.

    Args:
        key: the configuration key, for the error.

    Raises:
        ConfigError: there is no such module, or it lacks the attribute.
    """
    if "." not in name and name not in known(package):
        raise ConfigError(key, got=name, remedy=nearest(name, known(package)))
    path = name if "." in name else f"{package}.{name}"
    try:
        return getattr(import_module(path), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as failure:
        raise ConfigError(
            key,
            got=name,
            expected=f"a module on the import path with an attribute {attribute} ({failure})",
        ) from failure
