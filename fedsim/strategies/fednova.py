"""FedNova: updates are averaged per local step, so that who steps more does not weigh more.

    x <- x + (sum_k p_k a_k) sum_k p_k (x_k - x) / a_k        a_k = K_k local steps

a_k = K_k is the paper's for plain SGD at a constant rate, the same for all; it has others for
momentum, decaying rates and proximal clients. For AdamW, whose steps have about the size of the
rate, K_k is a heuristic. With equal steps it is FedAvg.

By hand: updates 2 in 1 step and 8 in 4 steps, equal n: 2 and 2 a step, 2.5 steps: x = 5. With 8 in
1 step and 2 in 4: 8 and 0.5 a step, 2.5 * 4.25 = 10.625.

Paper: Wang et al., arXiv:2007.07481.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedsim.core import ClientUpdates, RoundPlan
from fedsim.reduce import Reduce
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedNova(FedAvg):
    """FedAvg of updates per local step."""

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """The mean step, as often as clients stepped in the mean."""
        n = np.ones(len(plan)) if self.equal else plan.weights / plan.weights.max()
        sums = reduce.sums(plan, updates, lambda block: n[block.index] / plan.steps[block.index])
        p = n[sums.ok] / n[sums.ok].sum()
        steps = float((p * plan.steps[sums.ok]).sum())
        return sums.totals[0] * (steps / float(n[sums.ok].sum()))


STRATEGY = FedNova
