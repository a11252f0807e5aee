"""An app's configuration as its code reads it: sections, keys, and variables named for them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class Unread(Exception):
    """A value that only running the code would give."""


class Absent(Unread):
    """A key that the app's configuration does not have."""


@dataclass(frozen=True)
class Section:
    """A part of the app's configuration; None: some part of it, nobody knows which."""

    path: str | None


CONFIG = {"cfg", "config", "conf"}


def plain(name: str) -> str:
    """A key as code spells it: `_` for `-`."""
    return name.replace("-", "_")


def words(name: str) -> set[str]:
    """The words of an identifier: model_cfg -> model, cfg."""
    return {w for w in re.split(r"[\W_]+", name.lower()) if w}


class Settings:
    """The app's configuration, by dotted keys with `_` for `-` and without `static.`"""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given

    def get(self, at: Section, name: str) -> Any:
        """A value, or a section of values. Raises Absent, or Unread where several would fit."""
        name = plain(name).removeprefix("static.")
        if name == "static" and not at.path:
            return at
        if at.path is not None:
            key = f"{at.path}.{name}" if at.path else name
            if key in self.given:
                return self.given[key]
            if any(k.startswith(f"{key}.") for k in self.given):
                return Section(key)
            raise Absent(f"the app has no key {key}")
        values = [v for k, v in self.given.items() if f".{k}".endswith(f".{name}")]
        if len(values) == 1:
            return values[0]
        return self.section(name)

    def section(self, name: str) -> Section:
        """The one section of this name. Raises Unread."""
        found = {m[1] for k in self.given if (m := re.match(rf"((?:.*\.)?{name})\.", k))}
        if len(found) != 1:
            raise Unread(name)
        return Section(found.pop())

    def named(self, name: str) -> Section:
        """What a variable is by its name alone: model_cfg is the section `model`."""
        if not words(name) & CONFIG:
            raise Unread(name)
        rest = re.sub(r"^_+|_+$", "", re.sub(r"(^|_)(cfg|config|conf|run)(?=_|$)", "", name))
        if not rest:
            return Section("" if name == "run_config" else None)
        return self.section(rest)
