"""From tasks to scores.

suite: rows -> questions      backend: questions -> answers      scores: answers -> scores
"""

from __future__ import annotations

from fedsim.evaluate.scores import Records, Subject, comparable, evaluate
from fedsim.evaluate.statistics import explain, interval, paired_difference, proportion
from fedsim.evaluate.suite import Questions, Suite, items, suite

__all__ = [
    "Questions", "Records", "Subject", "Suite", "comparable", "evaluate", "explain", "interval",
    "items", "paired_difference", "proportion", "suite",
]  # fmt: skip
