"""LoRA-FAIR: A is averaged, and B is corrected until B A is near the mean of the products.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k + dB,   G = 1/s sum_k p_k s_k B_k A_k
    ridge:   dB = argmin ||G - (B + dB) A||^2 + lambda ||dB||^2 = (G - B A) A^T (A A^T + lambda)^-1
    cosine:  dB = argmin 1 - cos(G, (B + dB) A) + lambda ||dB||, by gradient descent, as published

Each module by itself, in fp64; both need G A^T (O, R) and A A^T (R, R) only. `ridge` is our
default: it is the minimum itself. By hand: A = 2, B = 1, G = 6, lambda = 0: dB = (6 - 2) 2 / 4 = 2,
and B A = 6.

Paper: Bian et al., arXiv:2411.14961, on vision models; lambda 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import ClientMemory, ClientUpdates, RoundPlan, ServerState, Strategy
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class LoRAFair(Strategy):
    """FedIT with a corrected B.

    Attributes:
        equal: every client counts the same.
        distance: what is made small.
        penalty: lambda.
        steps, rate: of `cosine`'s descent.
    """

    equal: bool = False
    distance: Literal["ridge", "cosine"] = "ridge"
    penalty: Annotated[float, Field(gt=0)] = 0.01
    steps: Annotated[int, Field(ge=1)] = 100
    rate: Annotated[float, Field(gt=0)] = 0.01

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """The means, then dB of each module."""
        mean, products = reduce.products(plan, updates, uniform if self.equal else None)
        row = server.row.double() + mean
        for module, (a, b) in reduce.layout.factors(row[None]).items():
            h = products[module].times(a[0].T) / reduce.scale
            gram = a[0] @ a[0].T
            if self.distance == "ridge":
                ridge = gram + self.penalty * torch.eye(len(gram)).to(gram)
                b[0] += torch.linalg.solve(ridge, (h - b[0] @ gram).T).T
            else:
                b[0] += self._descent(b[0].clone(), h, gram, products[module].norm() / reduce.scale)
        return server.after(plan, row.float())

    def _descent(self, b: Tensor, h: Tensor, gram: Tensor, size: float) -> Tensor:
        """dB that makes 1 - cos + lambda ||dB|| smallest on the way; 0 where G or B A is 0.

        Args:
            b: (O, R). h: G A^T (O, R). gram: A A^T. size: ||G||.
        """
        best = d = torch.zeros_like(b)
        least = torch.inf
        for _ in range(self.steps + 1):
            image = (b + d) @ gram
            inner, length = (h * (b + d)).sum(), (image * (b + d)).sum().clamp(min=0).sqrt()
            if not size or not length:
                return best
            loss = float(1 - inner / (size * length) + self.penalty * d.norm())
            if loss < least:
                best, least = d, loss
            slope = (inner / length**2 * image - h) / (size * length)
            if d.any():
                slope = slope + self.penalty * d / d.norm()
            d = d - self.rate * slope
        return best


STRATEGY = LoRAFair
