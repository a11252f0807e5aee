"""FedAdagrad: the server takes Adagrad's step along the mean update.

    m <- beta1 m + (1 - beta1) d    v <- v + d^2    x <- x + eta m / (sqrt(v) + tau)

d = sum_k p_k (x_k - x); m = 0, v = tau^2 at first. FedAdam and FedYogi have the same m and x.
A coordinate whose d is tau in each round moves by eta / (sqrt(1 + t) + 1) in round t. With tau =
1e-3, about ten AdamW steps at rate 1e-4, eta = 1e-2 begins at four times that and is down to
FedAvg's own step after 80 rounds. m and v are fp64: a finite update has a finite square.

By hand: tau = 1, eta = 1, d = 1: v = 1 + 1, x = 1 / (sqrt(2) + 1) = 0.414214.

Paper: Reddi et al., arXiv:2003.00295, algorithm 2, whose p_k is 1/m: `equal`. `like` is other code:
"flower" v = 0 at first (its eta is 0.1); "openfedllm" uniform p_k always, m = d in the first round
and v from m^2, with beta1 = 0 the same as the paper; its trainer refuses the rule by a misspelling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import AdapterLayout, ClientMemory, ClientUpdates, RoundPlan, ServerState
from fedsim.reduce import Reduce, uniform
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedAdagrad(FedAvg):
    """FedAvg's mean as the gradient of a server optimiser with one rate a coordinate.

    Attributes:
        eta: server rate.
        beta1: momentum.
        tau: how adaptive: coordinates that move by much less than this keep a common rate.
        like: whose second moment and weights.
    """

    eta: Annotated[float, Field(gt=0)] = 1e-2
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tau: Annotated[float, Field(gt=0)] = 1e-3
    like: Literal["paper", "flower", "openfedllm"] = "paper"

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState:
        """m = 0 and v = tau^2, or 0."""
        m = torch.zeros_like(row, dtype=torch.float64)
        v = torch.full_like(m, 0.0 if self.like == "flower" else self.tau**2)
        return ServerState(0, row, {"m": m, "v": v})

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """d, FedAvg's step."""
        equal = self.equal or self.like == "openfedllm"
        return reduce.mean(plan, updates, uniform if equal else None)

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """The next v."""
        return v + square

    def rate(self, round: int) -> float:
        """What m / (sqrt(v) + tau) is multiplied by."""
        return self.eta

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """One step of the optimiser."""
        d = self.step(plan, updates, reduce).double()
        m = self.beta1 * server.memory["m"] + (1 - self.beta1) * d
        if self.like == "openfedllm" and server.round == 0:
            m = d
        v = self.second(server.memory["v"], (m if self.like == "openfedllm" else d).square())
        step = self.rate(plan.round) * m / (v.sqrt() + self.tau)
        row = (server.row.double() + step).float()
        return server.after(plan, row, {"m": m, "v": v})


STRATEGY = FedAdagrad
