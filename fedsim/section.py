"""What every section of a configuration is, and values that need more than a type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Names = Annotated[  # a list, or one text with commas, as `--set adapter.targets=a,b` gives it
    tuple[str, ...], Field(strict=False),
    BeforeValidator(lambda v: [n.strip() for n in v.split(",")] if isinstance(v, str) else v),
]  # fmt: skip
Recompute = Annotated[
    Literal["never", "auto", "always"],
    BeforeValidator(lambda v: ("never", "always")[v] if isinstance(v, bool) else v),
]


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
