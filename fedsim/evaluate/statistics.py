"""What a count of right answers says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def proportion(hits: Sequence[float]) -> tuple[float, float]:
    """Mean of a 0/1 list and its standard error sqrt(p (1 - p) / n)."""
    p = sum(hits) / len(hits)
    return p, math.sqrt(p * (1 - p) / len(hits))


def interval(value: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n: Wilson's score interval (doi:10.2307/2276774).

    It holds what it says for few questions as well, and lies within [0, 1]: 0 of 16 is 0 to 19 %,
    where value +- 1.96 stderr would be 0 to 0.
    """
    from scipy.stats import binomtest

    found = binomtest(round(value * n), n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def paired_difference(
    before: Sequence[float], after: Sequence[float]
) -> tuple[float, float, float]:
    """Change of a share over the same examples with its 95 % interval: (change, low, high).

    Of hits: Newcombe's hybrid score interval, method 10 (doi:10.1002/(SICI)1097-0258(19981130)17:22
    <2635::AID-SIM954>3.0.CO;2-C). With l, u Wilson's limits of each share p and phi their
    correlation over the pairs, corrected for continuity,

        low = d - sqrt((p2 - l2)^2 - 2 phi (p2 - l2) (u1 - p1) + (u1 - p1)^2),
        high = d + sqrt((u2 - p2)^2 - 2 phi (u2 - p2) (p1 - l1) + (p1 - l1)^2),   d = p2 - p1.

    Of shares, where each example has several adapters: the mean of n differences
    +- t sd / sqrt(n), cut at -1 and 1; of one example, all of it.
    """
    first, second = (np.asarray(x, dtype=float) for x in (before, after))
    n, change = len(first), float(second.mean() - first.mean())
    if not np.isin(np.concatenate([first, second]), (0.0, 1.0)).all():
        return change, *_of_shares(second - first)
    p1, p2 = float(first.mean()), float(second.mean())
    (l1, u1), (l2, u2) = interval(p1, n), interval(p2, n)
    phi = _correlation(first, second)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    return (
        change,
        max(change - reach(p2 - l2, u1 - p1), -1),
        min(change + reach(u2 - p2, p1 - l1), 1),
    )


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """phi of the pairs' table, its numerator n/2 nearer to zero where it is positive."""
    a, b = float((first * second).sum()), float((first * (1 - second)).sum())
    c, d = float(((1 - first) * second).sum()), float(((1 - first) * (1 - second)).sum())
    below = (a + b) * (c + d) * (a + c) * (b + d)
    if below == 0:
        return 0.0
    above = a * d - b * c
    above = max(above - len(first) / 2, 0.0) if above > 0 else above
    return above / math.sqrt(below)


def _of_shares(d: np.ndarray) -> tuple[float, float]:
    from scipy.stats import t

    if len(d) < 2:
        return -1.0, 1.0
    half = float(t.ppf(0.975, len(d) - 1)) * d.std(ddof=1) / math.sqrt(len(d))
    return max(float(d.mean() - half), -1.0), min(float(d.mean() + half), 1.0)


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
