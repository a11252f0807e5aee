"""What a domain is: how its rows become prompts, answers and tasks. Plain Python throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedsim import names

Row = Mapping[str, Any]

# FlowerTune's training text, split where the answer begins (flowertune.md 1.2).
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
    "\n### Instruction:\n{instruction}\n### Response:"
)
RESPONSE_MARK = "### Response:"


@dataclass(frozen=True)
class Example:
    """One question with its accepted answers: `choices[gold]` is right."""

    prompt: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class DataSet:
    """Where one set of rows lies in each source."""

    name: str  # in a directory: <domain>/<name>.<split>.jsonl.gz
    split: str
    hub: str = ""
    config: str | None = None
    revision: str | None = None
    prepare: str = ""  # hub only: "" or "quarter", the evaluator's train_test_split(0.25, 42)


@dataclass(frozen=True)
class Task:
    """One evaluation set: rows -> examples."""

    data: DataSet
    example: Callable[[Row], Example]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Domain:
    """A field of the leaderboard."""

    name: str
    train: tuple[DataSet, ...]  # the first is the default
    columns: tuple[str, ...]
    pair: Callable[[Row], tuple[str, str]]  # row -> (instruction, response)
    clients: int  # FlowerTune's fixed number
    folder: str  # below the data directory
    tasks: Mapping[str, Task] = field(default_factory=dict)
    embedded: str | None = None  # module that holds the project's own set
    embedded_tasks: Mapping[str, Task] = field(default_factory=dict)


def known() -> list[str]:
    """Names of the domains that ship with fedsim."""
    return names.known(__name__)


def load(name: str) -> Domain:
    """A domain by file name, or the user's own by dotted path. Raises ConfigError."""
    domain: Domain = names.load(__name__, name, "DOMAIN", "data.domain")
    return domain
