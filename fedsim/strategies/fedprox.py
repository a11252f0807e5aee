"""FedProx: clients are pulled back towards the row that they started from; averaged as FedAvg.

    client k minimises  F_k(x) + mu/2 ||x - x_k||^2, its gradient  g + mu (x - x_k)

The term joins the gradient before clipping and before AdamW's moments; `decoupled`, it acts behind
AdamW's step instead: x <- x - lr mu (x - x_k).

By hand: F(x) = (x - 1)^2 / 2, x_k = 0, mu = 1: x = 1 / (1 + mu) = 0.5.

Paper: Li et al., arXiv:1812.06127, algorithm 2. FlowerTune's study sends mu but no client reads it,
so that its FedProx is FedAvg: `mu = 0`. An example in Flower's documentation adds the norm, not
its square; OpenFedLLM adds the squares, as here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedsim.core import LocalRule, RoundPlan, ServerState
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg whose clients stay close.

    Attributes:
        mu: strength of the pull; papers use 0.001 to 1.
        decoupled: the pull is kept from AdamW.
    """

    mu: Annotated[float, Field(ge=0)] = 0.01
    decoupled: bool = False

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Every client starts from the global row and is pulled back to it."""
        return LocalRule(server.row, prox_mu=self.mu, behind=self.decoupled)


STRATEGY = FedProx
