"""What a domain is: how its rows become training texts, and by which tasks it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fedsim import names
from fedsim.tasks import DataSet, Form, Generation, Grades, Item, Program, Row, Task

__all__ = [
    "PROMPT", "RESPONSE_MARK", "DataSet", "Domain", "Form", "Generation", "Grades", "Item",
    "Program", "Row", "Task", "joined", "known", "load",
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
    """A field of the leaderboard; `pairs` and the forms of tasks are keyed by protocol."""

    name: str
    train: tuple[DataSet, ...]  # the first is the default
    columns: tuple[str, ...]
    pairs: Mapping[str, Callable[[Row], tuple[str, str]]]  # row -> (instruction, response)
    clients: int  # FlowerTune's fixed number
    folder: str  # below the data directory
    tasks: Mapping[str, Task] = field(default_factory=dict)
    embedded: str | None = None  # module that holds the project's own set
    embedded_tasks: Mapping[str, Task] = field(default_factory=dict)


def joined(row: Row) -> tuple[str, str]:
    """Instruction and, where there is one, input; the response."""
    instruction, given = str(row["instruction"]), str(row["input"])
    return f"{instruction} {given}" if given else instruction, str(row["output"])


def spaced(row: Row) -> tuple[str, str]:
    """Instruction, a space and input, as FlowerTune's benchmark joins them in every domain."""
    return f"{row['instruction']} {row['input']}", str(row["output"])


def known() -> list[str]:
    """Names of the domains that ship with fedsim."""
    return names.known(__name__)


def load(name: str) -> Domain:
    """A domain by file name, or the user's own by dotted path. Raises ConfigError."""
    domain: Domain = names.load(__name__, name, "DOMAIN", "data.domain")
    return domain
