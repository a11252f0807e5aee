"""Trimmed mean: of each number the lowest and the highest are dropped, and the rest is averaged.

    x_j <- x_j + mean of (x_k - x)_j without the floor(beta m) lowest and as many highest

The coordinate median is what is left at the largest cut. Every client counts the same. As many
attackers as are dropped at one end move no number out of the range of the honest clients'.

By hand: updates 0, 1, 2, 6, 100 with beta = 0.2 drop 0 and 100: (1 + 2 + 6) / 3 = 3.

Paper: Yin et al., arXiv:1803.01498, algorithm 1, option II. Flower and SciPy multiply in floats, so
that 0.29 of 100 clients are 28 and not 29.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated

from pydantic import Field

from fedsim.strategies.median import Median


@dataclass(frozen=True)
class TrimmedMean(Median):
    """Mean without the ends; no state besides the row.

    Attributes:
        beta: share of the clients that is dropped at either end, at least that of attackers.
    """

    beta: Annotated[float, Field(ge=0, lt=0.5)] = 0.2

    def cut(self, m: int) -> int:
        """floor(beta m), of beta as it was written."""
        return math.floor(Fraction(str(self.beta)) * m)


STRATEGY = TrimmedMean
