"""Geometric median (RFA): the server moves to the point with the least distance to all updates.

    z = argmin sum_k p_k ||z - d_k||        z <- sum_k w_k d_k / sum_k w_k
                                            w_k = p_k / max(nu, ||z - d_k||), from z = sum_k p_k d_k

d_k = x_k - x. Attackers of a share a < 1/2 of the weights move z by at most 2 (1 - a) / (1 - 2a)
times the radius of the honest updates. What is left of an attacker's first pull falls to about
a / (1 - a) of it per iteration: near a = 1/2 raise `iterations`. `equal` keeps an attacker from
claiming weight.

By hand: updates 0, 0, 3: z = 1, w = 1, 1, 1/2, z = 1.5 / 2.5 = 0.6, and so on to 0.

Paper: Pillutla et al., arXiv:1912.13445, algorithm 2, which takes 3 iterations, as each is a round
of messages there; their code and its ports stop when the objective changes by a share of 1e-6,
which an attacker at distance L makes 1e-6 L.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import ClientUpdates, RoundPlan, Strategy
from fedsim.reduce import Reduce
from fedsim.strategies.median import columns


@dataclass(frozen=True)
class GeometricMedian(Strategy):
    """Smoothed Weiszfeld iterations in fp64; no state besides the row.

    Attributes:
        equal: every client counts the same, p_k = 1/m.
        nu: distances below it count as it.
        iterations: at most so many.
        tolerance: stop when a step is below this share of z.
    """

    equal: bool = False
    nu: Annotated[float, Field(gt=0)] = 1e-6
    iterations: Annotated[int, Field(ge=1)] = 100
    tolerance: Annotated[float, Field(ge=0)] = 1e-6

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """O(iterations M P) time and O(M P) memory."""
        found = reduce.rows(plan, updates)
        m = len(found.index)
        p = np.full(m, 1 / m) if self.equal else found.weights
        parts, weights = columns(found.delta), torch.from_numpy(p).to(found.delta.device)
        z = _mean(parts, weights)
        for _ in range(self.iterations):
            square = weights.new_zeros(m)
            for part, of in zip(parts, z.split(parts[0].shape[1]), strict=True):
                square += (part.double() - of).square().sum(1)
            before, z = z, _mean(parts, weights / square.sqrt().clamp_min(self.nu))
            if (z - before).norm() <= self.tolerance * z.norm():
                break
        return z


def _mean(parts: tuple[Tensor, ...], weights: Tensor) -> Tensor:
    """Weighted mean of the updates, (P,) fp64."""
    total = torch.cat([weights @ part.double() for part in parts])
    return total / weights.sum()


STRATEGY = GeometricMedian
