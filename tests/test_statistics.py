"""Intervals of shares and of paired changes: by hand, against Tango's score interval, by coverage.

Tango's interval (doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B) is solved
here from its definition; Newcombe's hybrid needs no search and lies near it. About 8 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsim import evaluate

Z = float(norm.ppf(0.975))


def pairs(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Hits before and after, of a table's four cells."""
    cells = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second
    before, after = zip(*(cells + [(False, False)] * neither), strict=True)
    return list(before), list(after)


def tango(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """The changes d at which |second - first - n d| = 1.96 of its standard error under d, where
    the share of `first` is the most likely one under d."""
    n = both + first + second + neither
    middle = (second - first) / n

    def excess(d: float) -> float:
        # The most likely share q of `first`: 2 n q^2 - b q - first d (1 - d) = 0.
        b = first * (1 - 3 * d) + second * (1 - d) - 2 * (both + neither) * d
        q = (b + math.sqrt(b * b + 8 * n * first * d * (1 - d))) / (4 * n)
        return (second - first - n * d) / math.sqrt(max(n * (2 * q + d * (1 - d)), 1e-300))

    low = brentq(lambda d: excess(d) - Z, -1 + 1e-12, middle) if middle > -1 else -1.0
    high = brentq(lambda d: excess(d) + Z, middle, 1 - 1e-12) if middle < 1 else 1.0
    return float(low), float(high)


def test_a_share_by_hand() -> None:
    """Wilson: (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)."""
    for hits, n in ((0, 16), (1, 16), (3, 4), (240, 240), (89, 240)):
        p, grown = hits / n, 1 + Z * Z / n
        half = Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
        low, high = evaluate.interval(p, n)
        assert low == pytest.approx((p + Z * Z / (2 * n) - half) / grown, abs=1e-12)
        assert high == pytest.approx((p + Z * Z / (2 * n) + half) / grown, abs=1e-12)
    assert [round(100 * x, 1) for x in evaluate.interval(0, 16)] == [0.0, 19.4]
    assert [round(100 * x, 1) for x in evaluate.interval(1 / 16, 16)] == [1.1, 28.3]


def test_a_change_by_hand() -> None:
    """Of 50 pairs 20 hit twice, 12 only before, 2 only after, 16 never: d = -0.2.

    p1 = 0.64 in (0.5014, 0.7586), p2 = 0.44 in (0.3116, 0.5769), by Wilson;
    phi = (20 x 16 - 12 x 2 - 25) / sqrt(32 x 18 x 22 x 28) = 271 / 595.7 = 0.4550;
    low = -0.2 - sqrt(0.1284^2 - 2 phi 0.1284 x 0.1186 + 0.1186^2) = -0.3292,
    high = -0.2 + sqrt(0.1369^2 - 2 phi 0.1369 x 0.1386 + 0.1386^2) = -0.0562.
    """
    change, low, high = evaluate.paired_difference(*pairs(20, 12, 2, 16))
    assert (change, round(low, 3), round(high, 3)) == (pytest.approx(-0.2), -0.329, -0.056)


@pytest.mark.parametrize(
    ("n", "step", "most", "mean"), [(12, 1, 0.15, 0.022), (30, 3, 0.07, 0.013)]
)
def test_near_tango(n: int, step: int, most: float, mean: float) -> None:
    """Limits over all tables of so many pairs: the two methods differ most where nearly all pairs
    changed in one direction."""
    apart = []
    for both, first, second in product(range(0, n + 1, step), repeat=3):
        if (neither := n - both - first - second) < 0 or first + second == 0:
            continue
        _, low, high = evaluate.paired_difference(*pairs(both, first, second, neither))
        their_low, their_high = tango(both, first, second, neither)
        apart += [abs(low - their_low), abs(high - their_high)]
    assert max(apart) <= most and np.mean(apart) <= mean


def test_limits_are_of_shares_and_mirror() -> None:
    for cells in product(range(0, 7, 2), repeat=4):
        if not sum(cells):
            continue
        before, after = pairs(*cells)
        change, low, high = evaluate.paired_difference(before, after)
        assert -1 <= low <= change <= high <= 1 and low < high
        back = evaluate.paired_difference(after, before)
        assert back == pytest.approx((-change, -high, -low), abs=1e-12)


def test_one_pair_and_no_change() -> None:
    """What few examples leave open stays open: 0 of 2 changed is not "no change"."""
    change, low, high = evaluate.paired_difference([False], [True])
    assert change == 1 and -1 <= low < 0.1 and high == 1
    change, low, high = evaluate.paired_difference([True, False] * 25, [True, False] * 25)
    assert change == 0 and low == pytest.approx(-high) and 0.01 < high < 0.1
    assert evaluate.paired_difference([0.5], [1.0]) == (0.5, -1.0, 1.0)
    shares = evaluate.paired_difference([0.5, 0.0, 1.0, 0.5], [1.0, 0.5, 0.5, 0.5])
    assert shares[0] == 0.125 and -1 <= shares[1] < 0 < shares[2] <= 1


def _coverage(interval: Callable[..., tuple[float, float]], n: int, p: tuple[float, ...]) -> float:
    """Exact probability that the interval of n pairs holds the change, over all tables."""
    held = 0.0
    for a, b, c in product(range(n + 1), repeat=3):
        if (d := n - a - b - c) < 0:
            continue
        log = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in (a, b, c, d))
        chance = math.exp(log + sum(k * math.log(q) for k, q in zip((a, b, c, d), p, strict=True)))
        low, high = interval(a, b, c, d)
        held += chance * (low <= p[2] - p[1] <= high)
    return held


@pytest.mark.parametrize(
    "p", [(0.4, 0.1, 0.2, 0.3), (0.05, 0.05, 0.5, 0.4), (0.7, 0.05, 0.2, 0.05)]
)
def test_it_holds_what_it_says(p: tuple[float, ...]) -> None:
    """95 % of the intervals of 16 pairs hold the change; the normal form holds 85 to 93 % there."""
    held = _coverage(lambda *t: evaluate.paired_difference(*pairs(*t))[1:], 16, p)
    assert 0.93 <= held <= 0.995


def test_a_proportion_by_hand() -> None:
    """3 of 4: p = 0.75, sqrt(0.75 x 0.25 / 4) = 0.2165."""
    p, error = evaluate.proportion([True, True, False, True])
    assert p == 0.75 and error == pytest.approx(0.21650635, abs=1e-8)
    assert evaluate.proportion([True]) == (1.0, 0.0) and evaluate.proportion([False]) == (0.0, 0.0)


def test_the_interval_of_many_pairs() -> None:
    """Of 2000 intervals of 400 pairs, 95 % hold the true change of 0.1: 1900 +- 4.5 x 9.75."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        before = generator.random(400) < 0.4
        after = np.where(before, generator.random(400) < 0.85, generator.random(400) < 0.2667)
        _, low, high = evaluate.paired_difference(before.tolist(), after.tolist())
        held += low <= 0.4 * 0.85 + 0.6 * 0.2667 - 0.4 <= high
    assert abs(held - 1900) < 44
