"""FFA-LoRA: A stays as it was drawn, the same for all; only B trains, travels and is averaged.

    B <- sum_k p_k B_k,   A = A_0

Exact, because sum_k p_k B_k A_0 = (sum_k p_k B_k) A_0, with half of the traffic; under noise there
is no product of two noises. By hand: A_0 = 2, B = (1, 3), p = 1/2: B A = 4, the mean of 2 and 6.

Paper: Sun et al., arXiv:2403.12313.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.core import LocalRule, RoundPlan, ServerState
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FFALoRA(FedAvg):
    """FedAvg with a frozen A. Magnitudes, where there are any, train as B does."""

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From the global row; A is known to everybody and never sent."""
        kinds = ("B", "mag")
        return LocalRule(server.row, trained=kinds, down=kinds, up=kinds)


STRATEGY = FFALoRA
