"""Coordinate median: the server moves by the median of the clients' updates, number by number.

    x_j <- x_j + median_k (x_k - x)_j        an even m averages the middle two

Every client counts the same, and its rank does not matter: a number that it lacks it leaves as it
is, a vote for 0. Fewer than m/2 attackers move no number out of the range of the honest clients'.

By hand: updates 1, 2, 10 give 2; 1, 2, 4, 10 give 3.

Paper: Yin et al., arXiv:1803.01498, algorithm 1, option I. Flower takes the median of the
rows themselves: the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.core import ClientUpdates, RoundPlan, Strategy
from fedsim.reduce import Reduce

_NUMBERS = 1 << 22  # of all clients together, worked on at once


def columns(delta: Tensor) -> tuple[Tensor, ...]:
    """(m, P) in parts of a few columns, so that fp64 copies stay small."""
    parts: tuple[Tensor, ...] = delta.split(max(1, _NUMBERS // len(delta)), dim=1)
    return parts


@dataclass(frozen=True)
class Median(Strategy):
    """Coordinate median; no state besides the row."""

    def cut(self, m: int) -> int:
        """How many of m are dropped at either end."""
        return (m - 1) // 2

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """The mean of what is left of each number; memory O(M P)."""
        delta = reduce.rows(plan, updates).delta
        m, cut = len(delta), self.cut(len(delta))
        parts = [p.sort(dim=0).values[cut : m - cut].double().mean(0) for p in columns(delta)]
        return torch.cat(parts)


STRATEGY = Median
