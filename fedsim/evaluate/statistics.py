"""What a count of right answers says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

_Z = 1.959963984540054  # two-sided 95 % of a normal


def proportion(hits: Sequence[float]) -> tuple[float, float]:
    """Mean of a 0/1 list and its standard error sqrt(p (1 - p) / n)."""
    p = sum(hits) / len(hits)
    return p, math.sqrt(p * (1 - p) / len(hits))


def paired_difference(
    before: Sequence[float], after: Sequence[float]
) -> tuple[float, float, float]:
    """Mean change over the same examples with its 95 % interval: (change, low, high).

    d_i = after_i - before_i;  mean +- 1.96 sd(d) / sqrt(n), the normal form of McNemar's test.
    """
    d = np.asarray(after, dtype=float) - np.asarray(before, dtype=float)
    half = _Z * d.std(ddof=1) / math.sqrt(len(d)) if len(d) > 1 else math.inf
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def interval(value: float, stderr: float) -> tuple[float, float]:
    """The 95 % interval of a mean: value +- 1.96 stderr."""
    return value - _Z * stderr, value + _Z * stderr


METRICS = {
    "likelihood": "the right choice is the most probable",
    "strict": "the answer is exactly the right one",
    "lenient": "the answer says the right one",
    "official": "graded by the leaderboard's rules, re-implemented",
    "official, mended": "the same without its scripts' accidents: no padding before the answer, no "
    "special tokens in it, and no end of a program before its tests",
}


def explain(metrics: Iterable[str]) -> str:
    """What the metrics mean, in one line."""
    return "; ".join(f"{m}: {METRICS[m]}" for m in dict.fromkeys(metrics) if m in METRICS)
