"""SCAFFOLD: control variates take out of each client's gradient what is its own.

    local gradient  g + c - c_k        c_k' = c_k - c + scale (x - x_k) / (K_k lr_k)    (option II)
    x <- x + eta mean_k (x_k - x)      c <- c + 1/N sum_k (c_k' - c_k)

c, c_k = 0 at first; all N clients count in c, so that c is the mean of all c_k. Clients that fail
keep theirs. Traffic is twice FedAvg's each way, as published.

With SGD, (x - x_k) / (K lr) is the mean gradient and scale is 1. With AdamW it is the mean step in
units of the rate, about 1 in every coordinate: at scale 1 the controls would drown the gradient.
What is left is a heuristic: `scale` is the gradient that such a step stands for, by default one of
norm 1 over all P numbers, 1 / sqrt(P).

By hand: N = 2, both train, c = 0, K lr = 0.5, scale = 1, updates -1 and -3: c_k = 2 and 6, c = 4,
x = -2.

Paper: Karimireddy et al., arXiv:1910.06378, algorithm 1. OpenFedLLM weighs x by examples, keeps
scale 1, and subtracts lr (c - c_k) behind AdamW's step instead of adding c - c_k to the gradient:
`equal = false`, `behind = true`.
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
    KINDS,
    AdapterLayout,
    ClientMemory,
    ClientUpdates,
    LocalRule,
    RoundPlan,
    ServerState,
)  # fmt: skip
from fedsim.reduce import Reduce
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """FedAvg with control variates.

    Attributes:
        equal: every client counts the same in x, as published.
        eta: server rate.
        scale: gradient that a mean step of the size of the rate stands for: 1 is the paper's, for
            SGD; 0 takes 1 / sqrt(P), for AdamW, or with `behind` 1.
        behind: c - c_k, times the rate, is taken from x behind the optimiser's step.
    """

    equal: bool = True
    eta: Annotated[float, Field(gt=0)] = 1.0
    scale: Annotated[float, Field(ge=0)] = 0.0
    behind: bool = False

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState:
        """c = 0; the numbers that a client has, P without gaps."""
        c = torch.zeros_like(row, dtype=torch.float64)
        numbers = torch.tensor([layout.numel()], device=row.device)
        return ServerState(0, row, {"c": c, "numbers": numbers})

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Corrected by c, and by the client's own c_k."""
        more = int(server.memory["numbers"])
        return LocalRule(
            server.row, more_down=more, more_up=more, correction=server.memory["c"].float(),
            control="control", behind=self.behind,
        )  # fmt: skip

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """x by the mean; each c_k as its update passes."""
        c = server.memory["c"].clone()
        mean = self.step(plan, self._keep(server, plan, updates, reduce, memory, c), reduce)
        row = (server.row.double() + self.eta * mean.double()).float()
        return server.after(plan, row, {**server.memory, "c": c})

    def _keep(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory, c: Tensor,
    ) -> Iterator[ClientUpdates]:  # fmt: skip
        """Write c_k', and move c by what was written: rounding never parts c from their mean."""
        used = server.memory["c"].float()
        scale = self.scale or (1.0 if self.behind else reduce.layout.numel() ** -0.5)
        for block in updates:
            # At rate 0, where a schedule may end, a client learns nothing of its gradient.
            for i in np.flatnonzero(block.ok):
                at = int(block.index[i])
                if not (travel := plan.travel(at)):
                    continue
                client, rank = int(plan.client_ids[at]), int(plan.rank[at])
                rate = scale / travel
                kept = memory.read("control", client)
                before = torch.zeros_like(used) if kept is None else kept.to(used)
                given = used
                if rank < reduce.layout.rank:
                    given = torch.where(reduce.layout.mask(KINDS, rank).to(used.device), used, 0)
                now = before - given - rate * block.delta[i]
                memory.write("control", client, now)
                c += (now.double() - before.double()) / plan.population
            yield block


STRATEGY = Scaffold
