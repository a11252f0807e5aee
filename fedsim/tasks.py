"""What a task is: where its rows lie, how they are asked and graded. Plain Python throughout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Row = Mapping[str, Any]
CONVERTED = "refs/convert/parquet"  # the hub's own conversion of a set to Parquet


@dataclass(frozen=True)
class Program:
    """Code to run in the sandbox; it passes when it ends by itself with exit code 0.

    Attributes:
        seconds: wall time.
        build: wall time of its compiler.
        early: that may be before its last line, as `exit(0)` does.
    """

    language: Literal["python", "javascript", "cpp"]
    source: str
    seconds: float
    build: float = 30.0
    early: bool = False


Grades = Mapping[str, bool | Program]  # metric -> a hit, or the program that decides
MENDED = "official, mended"  # the metric beside "official" that leaves its script's accidents out


@dataclass(frozen=True)
class Item:
    """One question as the model reads it.

    Attributes:
        prompt: the whole text, templates included.
        gold: the right answer as the task writes it; "" where a program decides.
        choices: the answers that there are, gold among them; () where any text may be one.
        facts: what grading needs besides (tests, entry point).
    """

    prompt: str
    gold: str = ""
    choices: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """How answers are written.

    Attributes:
        max_new: most new tokens; 0: what max_length leaves, or without one, as many as the first
            gold of the batch has.
        max_length: most tokens of prompt and answer together, or None.
        batch: prompts of one call of the official script, which `max_new = 0` refers to.
        stop: the answer ends before the first of these.
        temperature: 0 is greedy; None: as the model's own generation_config says.
        padded: the official script pads each batch to its longest prompt, on the tokenizer's side.
        one_end: only the tokenizer's own EOS ends an answer there.
        special: special tokens stay in the text, where the tokenizer's EOS is one more stop text.
    """

    max_new: int
    max_length: int | None = None
    batch: int = 1
    stop: tuple[str, ...] = ()
    temperature: float | None = 0.0
    top_p: float = 1.0
    top_k: int = 0
    padded: bool = False
    one_end: bool = False
    special: bool = False


@dataclass(frozen=True)
class Form:
    """A task under one protocol.

    Attributes:
        item: row -> question.
        grade: (question, output, which ends before a stop text) -> metric -> hit. Never raises,
            whatever the output holds.
        metrics: the names that `grade` gives, the main one first. `MENDED` is graded by the same
            tokens without special ones, up to the model's first end, and of an unpadded prompt.
        decided: True once no continuation of an output can change its grades.
        likelihood: the most probable of `choices` is scored as well.
        shared_outputs: equal prompts are graded by the output of the last one, as the official
            script writes outputs back by prompt (flowertune.md 2.1).
        precision: "base": that of the run's base; "full": never quantised.
    """

    item: Callable[[Row], Item]
    grade: Callable[[Item, str], Grades]
    metrics: tuple[str, ...]
    generation: Generation
    decided: Callable[[Item, str], bool] | None = None
    likelihood: bool = False
    shared_outputs: bool = False
    precision: Literal["base", "full"] = "base"


@dataclass(frozen=True)
class DataSet:
    """Where one set of rows lies in each source, and how its rows are read.

    Attributes:
        name: in a directory the file <folder>/<name>.<split>.jsonl.gz, or .jsonl.
        hub: its id, or a folder or a file of JSON lines.
        configs: the hub's, joined in this order; () where a set has only its default one.
        revision: None is the newest. Sets whose own files are a loading script have `CONVERTED`.
        prepare: hub only: "" or "quarter", the evaluator's train_test_split(0.25, 42).
        read: a stored row -> the columns that the task or domain names; None: it has them.
    """

    name: str
    split: str
    hub: str = ""
    configs: tuple[str, ...] = ()
    revision: str | None = None
    prepare: str = ""
    read: Callable[[Row], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Task:
    """One evaluation set, in the form that each protocol gives it."""

    data: DataSet
    columns: tuple[str, ...]
    forms: Mapping[str, Form]  # by protocol: "flowertune", "fedsim"


def majority(items: Sequence[Item]) -> tuple[str, float]:
    """The most frequent right answer, and the share that always giving it would score."""
    ((gold, count),) = Counter(item.gold for item in items).most_common(1)
    return gold, count / len(items)


def chance(items: Sequence[Item]) -> float:
    """What a guess among `choices` scores on average; 0 for questions without choices."""
    return sum(1 / len(item.choices) for item in items if item.choices) / len(items)
