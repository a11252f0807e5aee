"""FedDyn: each client's objective is bent until its minimum and everyone's coincide.

    client k minimises  F_k(x) - <h_k, x> + alpha/2 ||x - x_k||^2;  h_k <- h_k - alpha (x_k' - x_k)
    server              h <- h - alpha/N sum_k (x_k' - x)    x <- mean_k x_k' - h / alpha

h_k, h = 0 at first; the mean is uniform over the round's clients. A client that fails keeps h_k. If
local training ends at its minimum, h_k is there the gradient of F_k. A few AdamW steps do not end
there: a heuristic, whose -h / alpha is momentum that only the pull alpha damps.

By hand: F(x) = (x - 1)^2 / 2, one client, N = 1, alpha = 1, x = 0: x' = 0.5, h_k = h = -0.5, and
x = 0.5 + 0.5 = 1, its minimum.

Paper: Acar et al., arXiv:2111.04263, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import (
    AdapterLayout,
    ClientMemory,
    ClientUpdates,
    LocalRule,
    RoundPlan,
    ServerState,
    Strategy,
)  # fmt: skip
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class FedDyn(Strategy):
    """Dynamic regularisation.

    Attributes:
        alpha: strength of the pull, 0.01 to 0.1 in the paper.
    """

    alpha: Annotated[float, Field(gt=0)] = 0.1

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState:
        """h = 0."""
        return ServerState(0, row, {"h": torch.zeros_like(row, dtype=torch.float64)})

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Pulled back to the global row, and along the client's own h_k."""
        return LocalRule(server.row, prox_mu=self.alpha, control="control")

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """h and x from the sum of updates; each h_k as its update passes."""
        sums = reduce.sums(plan, self._keep(plan, updates, memory), uniform)
        h = server.memory["h"] - self.alpha / plan.population * sums.totals[0]
        mean = sums.totals[0] / sums.weights[0]
        row = (server.row.double() + mean - h / self.alpha).float()
        return server.after(plan, row, {"h": h})

    def _keep(
        self, plan: RoundPlan, updates: Iterator[ClientUpdates], memory: ClientMemory
    ) -> Iterator[ClientUpdates]:
        for block in updates:
            for i in np.flatnonzero(block.ok):
                client = int(plan.client_ids[block.index[i]])
                before = memory.read("control", client)
                now = -self.alpha * block.delta[i]
                memory.write("control", client, now if before is None else now + before.to(now))
            yield block


STRATEGY = FedDyn
