"""FedYogi: FedAdam whose second moment changes by no more than the square of the update.

    v <- v - (1 - beta2) d^2 sign(v - d^2)        m and x as FedAdam

Where v < d^2 it grows, as Adam's does; where v > d^2 it falls slower, by d^2 instead of v - d^2.

By hand: tau = 1, eta = 1, d = 2: m = 0.2, v = 1 + 0.01 * 4 = 1.04, x = 0.2 / (sqrt(1.04) + 1) =
0.099020.

Paper: Reddi et al., arXiv:2003.00295, algorithm 2. `like` is other code: "flower" v = 0 at first
(its eta is 0.01); "openfedllm" uniform p_k always, m = d in the first round and v from m^2.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.strategies.fedadam import FedAdam


@dataclass(frozen=True)
class FedYogi(FedAdam):
    """FedAdam with an additive second moment."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Towards the square by a part of the square."""
        return v - (1 - self.beta2) * square * (v - square).sign()

    def rate(self, round: int) -> float:
        """Never corrected."""
        return self.eta


STRATEGY = FedYogi
