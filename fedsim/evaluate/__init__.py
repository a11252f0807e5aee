"""From tasks to scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fedsim import seeds
from fedsim.config import Config
from fedsim.core import Score
from fedsim.data import sources
from fedsim.domains import PROMPT, Domain, Example
from fedsim.evaluate.choices import Question, answer, question
from fedsim.model import Base
from fedsim.plan import pass_budget

METRICS = ("likelihood", "exact")
_Z = 1.959963984540054  # two-sided 95 % of a normal


@dataclass(frozen=True)
class Suite:
    """The questions of every task of a run, tokenised once."""

    domain: str
    questions: dict[str, list[Question]]
    examples: dict[str, list[Example]]
    origins: dict[str, str]
    digests: dict[str, str]

    def __len__(self) -> int:
        return sum(len(q) for q in self.questions.values())


def suite(config: Config, domain: Domain, tokenizer: Any, key: int) -> Suite:
    """Load and tokenise the configured tasks; `evaluate.limit` takes a counted random subset."""
    out = Suite(domain.name, {}, {}, {}, {})
    for name, task in sources.tasks(config.data, domain, config.evaluate.tasks).items():
        rows = sources.load(config.data, domain, task.data, task.columns)
        picked = np.arange(len(rows))
        if config.evaluate.limit is not None:
            order = seeds.permutation(key, seeds.Purpose.SUBSET, len(rows))
            picked = np.sort(order[: config.evaluate.limit])
        examples = [task.example(rows.rows[i]) for i in picked]
        out.examples[name] = examples
        out.questions[name] = [
            question(tokenizer, PROMPT.format(instruction=e.prompt), e.choices) for e in examples
        ]
        out.origins[name], out.digests[name] = rows.origin, rows.digest
    return out


def evaluate(
    base: Base, tests: Suite, row: Tensor, config: Config, round: int
) -> tuple[list[Score], dict[str, list[dict[str, Any]]]]:
    """Answer every question under one adapter row.

    Two metrics from one pass: `likelihood`, the choice with the highest log-probability is the
    right one; `exact`, greedy decoding would begin with exactly the right choice.

    Returns:
        Scores, and for each task one record an example: prompt, gold, output, grades.
    """
    scores: list[Score] = []
    records: dict[str, list[dict[str, Any]]] = {}
    for task, questions in tests.questions.items():
        answers = answer(base, row, config.adapter.scale(), questions,
                         pass_budget(config, base.device))  # fmt: skip
        lines = []
        for i, (example, got) in enumerate(zip(tests.examples[task], answers, strict=True)):
            lines.append(
                {
                    "round": round, "task": task, "index": i, "prompt": example.prompt,
                    "gold": example.choices[example.gold],
                    "output": example.choices[int(np.argmax(got.logprob))],
                    "logprob": [float(f"{v:.5g}") for v in got.logprob],
                    "likelihood": int(np.argmax(got.logprob)) == example.gold,
                    "exact": bool(got.greedy[example.gold]),
                }
            )  # fmt: skip
        records[task] = lines
        for metric in METRICS:
            value, stderr = proportion([bool(line[metric]) for line in lines])
            scores.append(
                Score(
                    round=round, domain=tests.domain, task=task, metric=metric, value=value,
                    n=len(lines), stderr=stderr, precision=base.precision, protocol="fedsim",
                    source=tests.origins[task], file=f"eval/{task}.jsonl",
                )
            )  # fmt: skip
    return scores, records


def proportion(hits: Sequence[bool]) -> tuple[float, float]:
    """Mean of a 0/1 list and its standard error sqrt(p (1 - p) / n)."""
    p = sum(hits) / len(hits)
    return p, math.sqrt(p * (1 - p) / len(hits))


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Mean change over the same examples with its 95 % interval: (change, low, high).

    d_i = after_i - before_i;  mean +- 1.96 sd(d) / sqrt(n), the normal form of McNemar's test.
    """
    d = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    half = _Z * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)
