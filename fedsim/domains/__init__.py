"""What a domain is: how its rows become training texts, and by which tasks it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from reprlib import repr  # short: a row may hold anything

from fedsim import names
from fedsim.tasks import DataSet, Form, Generation, Grades, Item, Program, Row, Task

__all__ = [
    "PROMPT",
    "RESPONSE_MARK",
    "DataSet",
    "Domain",
    "Form",
    "Generation",
    "Grades",
    "Item",
    "Program",
    "Row",
    "Task",
    "cell",
    "joined",
    "known",
    "load",
]  # fmt: skip

# FlowerTune's training text, split where the answer begins (flowertune.md 1.2).
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n### Instruction:\n{instruction}\n### Response:"
)
RESPONSE_MARK = "### Response:"


@dataclass(frozen=True)
class Domain:
    """A field of the leaderboard; `pairs` and the forms of tasks are keyed by protocol.

    Attributes:
        train: the first is the default.
        columns: what every training row has. optional: what it may have besides.
        pairs: row -> (instruction, response); reads its columns with `cell`.
        clients: FlowerTune's fixed number.
        folder: below the data directory.
        embedded: module that holds the project's own set.
    """

    name: str
    train: tuple[DataSet, ...]
    columns: tuple[str, ...]
    pairs: Mapping[str, Callable[[Row], tuple[str, str]]]
    clients: int
    folder: str
    tasks: Mapping[str, Task] = field(default_factory=dict)
    embedded: str | None = None
    embedded_tasks: Mapping[str, Task] = field(default_factory=dict)
    optional: tuple[str, ...] = ()


def cell(row: Row, column: str) -> str:
    """A column as text: a number, true or false as JSON writes it, "" where there is nothing.

    Raises:
        TypeError: it is a list or an object; which of its texts is meant nobody can know.
    """
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    raise TypeError(f"column {column!r}: got {repr(value)}; expected a text or a number")


def joined(row: Row) -> tuple[str, str]:
    """Instruction and, where there is one, input; the response."""
    instruction, given = cell(row, "instruction"), cell(row, "input")
    return f"{instruction} {given}" if given else instruction, cell(row, "output")


def spaced(row: Row) -> tuple[str, str]:
    """Instruction, a space and input, as FlowerTune's benchmark joins them in every domain."""
    return f"{cell(row, 'instruction')} {cell(row, 'input')}", cell(row, "output")


def known() -> list[str]:
    """Names of the domains that ship with fedsim."""
    return names.known(__name__)


def load(name: str) -> Domain:
    """A domain by file name, or the user's own by dotted path. Raises ConfigError."""
    domain: Domain = names.load(__name__, name, "DOMAIN", "data.domain")
    return domain
