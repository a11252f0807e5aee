"""FlexLoRA: the clients' products are averaged, and the mean is cut into factors again.

    G = sum_k p_k s_k B_k A_k = U S V^T,    s B = U_R S_R,    A = V_R^T

Exact up to what rank R leaves out, whose share ||G - G_R|| / ||G|| is kept as `truncation`.
Clients may have any ranks: one of rank r gets the first r rows and columns, B multiplied by
s_R / s_r, which is G cut to rank r. By hand: s = 1, p = 1/2, one number each, A = (1, 3), B =
(1, 3): G = (1 + 9) / 2 = 5, A = 1, B = 5.

G is never formed while the stacked rank is below half of the smaller side (`factors.py`). Beyond
G's own rank B is 0 and the server's A stays, so that those rows can still be trained.

Paper: Bai et al., arXiv:2402.11505. Its code has no s and gives the whole spectrum to B, as here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.reduce import Reduce, uniform


@dataclass(frozen=True)
class FlexLoRA(Strategy):
    """The mean of products by SVD.

    Attributes:
        equal: every client counts the same.
        balanced: both factors get the root of the spectrum, instead of B the whole.
    """

    rewrites: ClassVar[bool] = True
    equal: bool = False
    balanced: bool = False

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From the global product, cut to the client's rank."""
        return LocalRule(server.row, same_product=True)

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """Each module's mean product in factors; magnitudes, where there are any, by their mean."""
        mean, products = reduce.products(plan, updates, uniform if self.equal else None)
        row, lost, whole = server.row.double() + mean, 0.0, 0.0
        before = reduce.layout.factors(server.row[None])
        for module, (a, b) in reduce.layout.factors(row[None]).items():
            parts = products[module].svd(reduce.layout.rank)
            r, root = len(parts.s), parts.s.sqrt()
            of_a = root if self.balanced else torch.ones_like(root)
            a[0] = before[module][0][0]
            a[0, :r] = of_a[:, None] * parts.vt
            b.zero_()
            b[0, :, :r] = parts.u * (parts.s / of_a / reduce.scale)
            lost += parts.lost**2
            whole += parts.lost**2 + float(parts.s.square().sum())
        share = torch.tensor((lost / whole) ** 0.5 if whole else 0.0, dtype=torch.float64)
        return server.after(plan, row.float(), {"truncation": share})


STRATEGY = FlexLoRA
