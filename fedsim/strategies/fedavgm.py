"""FedAvgM: the server moves with momentum.

    v <- beta v + d        x <- x + eta v        d = sum_k p_k (x_k - x), v = 0 at first

`nesterov` moves by eta (d + beta v) instead.

By hand: beta = 0.9, eta = 1, d = 1 in every round: v = 1, 1.9, 2.71, so x = 1, 2.9, 5.61; nesterov
x = 1.9, 4.61, 8.049.

Paper: Hsu et al., arXiv:1909.06335. Flower is the same, but its defaults (momentum 0,
rate 1), which FlowerTune's study left as they are, make it FedAvg: `beta = 0`. OpenFedLLM takes a
moving average, v <- beta v + (1 - beta) d with v = d in the first round: `ema = true`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import AdapterLayout, ClientMemory, ClientUpdates, RoundPlan, ServerState
from fedsim.errors import ConfigError
from fedsim.reduce import Reduce
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedAvgM(FedAvg):
    """FedAvg with server momentum.

    Attributes:
        beta: momentum; 0 with eta = 1 is FedAvg.
        eta: server rate.
        nesterov: look one step ahead.
        ema: v is a moving average instead of a decaying sum.
    """

    beta: Annotated[float, Field(ge=0, lt=1)] = 0.9
    eta: Annotated[float, Field(gt=0)] = 1.0
    nesterov: bool = False
    ema: bool = False

    def __post_init__(self) -> None:
        if self.nesterov and self.ema:
            raise ConfigError(
                "server.options: nesterov and ema of fedavgm are both on", expected="one of them",
                remedy="Leave out ema: OpenFedLLM, whose variant it is, has no nesterov.",
            )  # fmt: skip

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState:
        """At rest."""
        return ServerState(0, row, {"v": torch.zeros_like(row, dtype=torch.float64)})

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """One step of momentum along the mean update."""
        d = self.step(plan, updates, reduce).double()
        v = self.beta * server.memory["v"] + (1 - self.beta if self.ema else 1) * d
        if self.ema and server.round == 0:
            v = d
        step = d + self.beta * v if self.nesterov else v
        row = (server.row.double() + self.eta * step).float()
        return server.after(plan, row, {"v": v})


STRATEGY = FedAvgM
