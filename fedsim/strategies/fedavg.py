"""FedAvg: the server moves by the weighted mean of the clients' updates.

    x <- x + sum_k p_k (x_k - x)        p_k = n_k / sum of n over the clients that returned

With LoRA rows this averages A and B apart, as FedIT does (arXiv:2305.05644).

By hand: x = 0, updates 1 (n = 1) and 4 (n = 2) give 1/3 * 1 + 2/3 * 4 = 3.

Paper: McMahan et al., arXiv:1602.05629, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fedsim.core import ClientUpdates, RoundPlan, Strategy
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class FedAvg(Strategy):
    """Weighted mean of the updates; no state besides the row.

    Attributes:
        equal: every client counts the same, p_k = 1/m.
    """

    equal: bool = False

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """sum_k p_k delta_k, as the updates come."""
        return reduce.mean(plan, updates, uniform if self.equal else None)


STRATEGY = FedAvg
