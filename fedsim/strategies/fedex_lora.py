"""FedEx-LoRA: A and B are averaged apart, and what that misses joins the base.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k,   W <- W + sum_k p_k s_k B_k A_k - s B A

Exact: W + s B A is then the old W and the mean of the products. The residual has rank sum_k r_k + R
at most; a client receives it beside A and B and is taken to have followed the rounds before.

By hand: s = 1, p = 1/2, A = (1, 3), B = (1, 3): B A = 4, the mean product 5, W grows by 1.

Paper: Singhal et al., arXiv:2410.09432.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.factors import Product, Stacked, joined
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class FedExLoRA(Strategy):
    """FedIT with its error in the base.

    Attributes:
        equal: every client counts the same.
        residual: of the residual only the largest singular parts, so many, are kept and sent, the
            paper's cheaper form; what that loses is kept as `truncation`. 0: all of it.
    """

    joins: ClassVar[bool] = True
    equal: bool = False
    residual: Annotated[int, Field(ge=0)] = 0

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From the global row over the base as it is now."""
        return LocalRule(server.row, base_down=int(server.memory.get("sent", 0)))

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """Means as FedIT's; the residual is of the row as it was rounded, so that it is exact."""
        mean, products = reduce.products(plan, updates, uniform if self.equal else None)
        row = (server.row.double() + mean).float()
        lost = whole = 0.0
        missed: dict[str, Product] = {}
        for module, (a, b) in reduce.layout.factors(row[None].double()).items():
            exact = products.pop(module)  # of dense ones, 8 bytes a weight
            missed[module] = exact.plus(-reduce.scale * b[0], a[0])
            if self.residual:
                parts = missed[module].svd(self.residual)
                missed[module] = Stacked(parts.u * parts.s, parts.vt)
                lost, whole = lost + parts.lost**2, whole + exact.norm() ** 2
        sent = torch.tensor(sum(product.numbers for product in missed.values()))
        kept = {"sent": sent}
        if self.residual:
            share = (lost / whole) ** 0.5 if whole else 0.0
            kept["truncation"] = torch.tensor(share, dtype=torch.float64)
        return server.after(plan, row, kept, joined(server.base, missed))


STRATEGY = FedExLoRA
