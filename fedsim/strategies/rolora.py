"""RoLoRA: one round trains and averages B with A frozen, the next A with B frozen.

    odd rounds:  B <- sum_k p_k B_k        even rounds:  A <- sum_k p_k A_k

Each round's mean is exact, as in FFA-LoRA, and both factors learn; half of the traffic: down comes
what the last round changed, up goes what this one trains. By hand: A = 2; round 1, B = (1, 3):
B = 2; round 2, A = (2, 4): A = 3, B A = 6, the mean of 4 and 8.

Papers: Chen et al., arXiv:2409.02346; arXiv:2502.01755.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedsim.core import LocalRule, RoundPlan, ServerState
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class RoLoRA(FedAvg):
    """FedAvg of one factor at a time. Magnitudes, where there are any, train with B.

    Attributes:
        first: the factor of the first round. At B = 0 the gradient of A is 0, hence B.
    """

    first: Literal["A", "B"] = "B"

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From the global row; one factor trains."""
        parts = (("B", "mag"), ("A",))
        turn = (plan.round + (self.first == "B")) % 2
        return LocalRule(server.row, trained=parts[turn], down=parts[1 - turn], up=parts[turn])


STRATEGY = RoLoRA
