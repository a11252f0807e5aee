"""q-FedAvg: clients that fare worse count more, for accuracy that is even across clients.

    x <- x + sum_k F_k^q L d_k / sum_k (q F_k^(q-1) L^2 ||d_k||^2 + L F_k^q)        d_k = x_k - x

F_k is the client's loss at x, on its first step's examples, or 0 where these have no labels and
nothing is measured; L is 1/lr. q = 0 is the uniform mean.
L d_k stands for a gradient, which holds for one step of SGD. AdamW's steps are about lr in every
coordinate: ||L d_k||^2 is about the number of parameters, or more, and x hardly moves. `lipschitz`
gives another L: the smaller, the closer to the mean weighted by F_k^q.

By hand: q = 1, L = 1, updates 1 (F = 1) and 3 (F = 2): (1 + 6) / ((1 + 1) + (9 + 2)) = 7/13.

Paper: Li et al., arXiv:1905.10497, algorithm 2. The authors' code adds 1e-10 to F, as here, and
measures F on all of a client's examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.reduce import Reduce


@dataclass(frozen=True)
class QFedAvg(Strategy):
    """Fair aggregation; no state besides the row.

    Attributes:
        q: 0 is the uniform mean; larger is fairer.
        lipschitz: L; 0 takes 1/lr, of the largest rate in the round.
    """

    q: Annotated[float, Field(ge=0)] = 0.2
    lipschitz: Annotated[float, Field(ge=0)] = 0.0

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Every client starts from the global row, and sends its share of the denominator too."""
        return LocalRule(server.row, more_up=1)

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """Both sums as the updates come."""
        # A schedule may end at rate 0, where every update is 0 and any finite L gives 0.
        q, lip = self.q, self.lipschitz or 1 / max(float(plan.lr.max()), 1e-30)

        def unmeasured(block: ClientUpdates) -> np.ndarray:
            # Where privacy hides losses it hides tokens too, and the losses stay NaN.
            return np.asarray(np.isnan(block.loss_first) & np.isfinite(block.tokens))

        def loss(block: ClientUpdates) -> np.ndarray:
            known = np.where(unmeasured(block), 0.0, block.loss_first)
            return np.asarray(np.where(block.ok, known, 1.0) + 1e-10)

        def above(block: ClientUpdates) -> np.ndarray:
            return np.asarray(lip * loss(block) ** q)

        def below(block: ClientUpdates) -> np.ndarray:
            norm = torch.linalg.vector_norm(block.delta, dim=1, dtype=torch.float64).cpu().numpy()
            square = np.where(block.ok & ~unmeasured(block), lip * norm, 0.0) ** 2
            return np.asarray(q * loss(block) ** (q - 1) * square + above(block))

        sums = reduce.sums(plan, updates, above, below)
        return sums.totals[0] / sums.weights[1]


STRATEGY = QFedAvg
