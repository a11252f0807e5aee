"""Options of what is chosen by name: the fields of a dataclass, checked as they are annotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from fedsim.errors import ConfigError, nearest


def make(kind: type[Any], given: Mapping[str, Any], key: str, name: str) -> Any:
    """An instance of a dataclass from options that a user gave.

    Args:
        key: of the options in a configuration. name: of what was chosen; both for errors.

    Raises:
        ConfigError: an option is unknown, of another type or impossible.
    """
    own, types, made = [f.name for f in fields(kind)], get_type_hints(kind, include_extras=True), {}
    for option, value in given.items():
        if option not in own:
            remedy = nearest(option, own) if own else f"{name} has none."
            raise ConfigError(f"{key}: unknown key {option!r} of {name}", remedy=remedy)
        try:
            made[option] = TypeAdapter(types[option]).validate_python(value, strict=True)
        except ValidationError as failure:
            message = failure.errors()[0]["msg"]
            raise ConfigError(
                f"{key}.{option} of {name}", got=value,
                expected=message[0].lower() + message[1:],
                remedy=f"The default is {getattr(kind, option, 'none')}.",
            ) from failure  # fmt: skip
    return kind(**made)
