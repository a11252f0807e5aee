"""What every section of a configuration is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict (a string is never taken for a number), closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def with_defaults(values: Any, key: str, options: Mapping[str, Mapping[str, Any]]) -> Any:
    """A section's values over the defaults that go with what `key` chooses; what is no mapping, or
    chooses nothing known, is left to the validation."""
    if not isinstance(values, Mapping):
        return values
    chosen = values.get(key)
    return {**(options.get(chosen, {}) if isinstance(chosen, str) else {}), **values}
