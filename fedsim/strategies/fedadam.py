"""FedAdam: the server takes Adam's step along the mean update, without bias correction.

    m <- beta1 m + (1 - beta1) d        v <- beta2 v + (1 - beta2) d^2
    x <- x + eta m / (sqrt(v) + tau)

d = sum_k p_k (x_k - x); m = 0 and v = tau^2 at first. A coordinate that moves by d in every round
comes to move by eta d / (d + tau). With d = tau = 1e-3, about ten AdamW steps at rate 1e-4, eta =
2e-3 is FedAvg's own step; 0.1, a common default, is fifty times it.

By hand: tau = 1, eta = 1, d = 1: m = 0.1, v = 0.99 + 0.01 = 1, x = 0.1 / (1 + 1) = 0.05.

Paper: Reddi et al., arXiv:2003.00295, algorithm 2. `like` is other code: "flower" v = 0 at first,
in round t the rate eta sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)), where Adam has t (eta is 0.1);
"openfedllm" uniform p_k always, m = d in the first round and v from m^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedsim.strategies.fedadagrad import FedAdagrad


@dataclass(frozen=True)
class FedAdam(FedAdagrad):
    """FedAdagrad that forgets.

    Attributes:
        beta2: memory of the second moment.
    """

    eta: Annotated[float, Field(gt=0)] = 2e-3
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """A moving average of squares."""
        return self.beta2 * v + (1 - self.beta2) * square

    def rate(self, round: int) -> float:
        """eta, with Flower's correction where asked for."""
        if self.like != "flower":
            return self.eta
        t = round + 1
        return float(self.eta * (1 - self.beta2**t) ** 0.5 / (1 - self.beta1**t))


STRATEGY = FedAdam
