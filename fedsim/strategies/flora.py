"""FLoRA: the clients' factors are stacked, and what they make together joins the base.

    W <- W + sum_k p_k s_k B_k A_k,    A drawn anew, B = 0

Exact, at any ranks. A client receives the last round's stack, of rank sum_k r_k, or the whole
matrix where that is kept, and magnitudes; A is drawn from the seed. It is taken to have followed
the rounds before. The base's part is kept as factors while their rank is below half of a module's
smaller side, then as one dense fp32 matrix; a quantised base is not quantised again.

By hand: s = 2, p = (1/4, 3/4), B A = 1 and 5: W grows by 2 (1/4 + 15/4) = 8, the next adapter is 0.

Paper: Wang et al., arXiv:2409.05976. Its code merges without s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.factors import joined
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class FLoRA(Strategy):
    """The sum of products, in the base.

    Attributes:
        equal: every client counts the same.
    """

    rewrites: ClassVar[bool] = True
    joins: ClassVar[bool] = True
    equal: bool = False

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From a fresh adapter over the base as it is now."""
        stacked = int(server.memory.get("stacked", 0))
        return LocalRule(server.row, down=("mag",), base_down=stacked)

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """The stack into the base; magnitudes, where there are any, by their mean."""
        mean, products = reduce.products(plan, updates, uniform if self.equal else None)
        fresh = reduce.fresh(plan.round).to(server.row)
        mag = reduce.layout.mask(("mag",)).to(mean.device)
        row = torch.where(mag, (server.row.double() + mean).float(), fresh)
        stacked = torch.tensor(sum(product.numbers for product in products.values()))
        return server.after(plan, row, {"stacked": stacked}, joined(server.base, products))


STRATEGY = FLoRA
