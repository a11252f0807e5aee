"""HetLoRA: clients of different ranks; the norm of a client's product is its weight.

    A <- sum_k w_k A_k / sum_k w_k,   B likewise,   w_k = ||B_k A_k||

with zeros where a client's rank ends. A client's loss has the penalty
lambda sum over modules ||B[:, g:r]|| ||A[g:r]||, g = floor(gamma r); where the sum is smaller after
a visit than before it, its rank is g from then on, and its tail counts no more. Ranks never grow.
As in the paper, scales s_k take no part: A and B are averaged as they are. Under secure sums a
client would have to weigh and prune itself, and its rank is known.

Rows of A that no client of the round has stay as they are: with zeros in both factors they could
never be trained again. By hand: products of norm 1 and 3, A = 2 and 6: A = (2 + 18) / 4 = 5.

Paper: Cho et al., arXiv:2401.06432; lambda and gamma here are not from its tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import floor, hypot
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import (
    KINDS,
    ClientMemory,
    ClientUpdates,
    LocalRule,
    RoundPlan,
    ServerState,
    Strategy,
)
from fedsim.factors import Stacked
from fedsim.reduce import Reduce


@dataclass(frozen=True)
class HetLoRA(Strategy):
    """Weighted by the norms of products, with ranks that are pruned.

    Attributes:
        penalty: lambda. gamma: the share of its rank that a client is asked to live with.
        smallest: no client's rank falls below it.
    """

    prunes: ClassVar[bool] = True
    penalty: Annotated[float, Field(ge=0)] = 1e-3
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99
    smallest: Annotated[int, Field(ge=1)] = 1

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """From the global row, cut to the client's rank, which `ranks` of the memory lowers."""
        return LocalRule(
            server.row, tail_weight=self.penalty, tail_from=self.gamma, tail_least=self.smallest
        )  # fmt: skip

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """Rows, not updates, are averaged; ranks (N,) int64, 0 where a client's is as it was."""
        none = torch.zeros(plan.population, dtype=torch.int64)
        ranks = server.memory.get("ranks", none).clone()
        norms, sent_ranks = np.zeros(len(plan)), plan.rank.copy()

        def sent() -> Iterator[ClientUpdates]:
            for block in updates:
                row = block.row.clone()
                for i in np.flatnonzero(block.ok):
                    at = int(block.index[i])
                    start = block.start if block.start.ndim == 1 else block.start[i]
                    rank = self._rank(int(plan.rank[at]), row[i], start, reduce)
                    if rank < plan.rank[at]:
                        ranks[int(plan.client_ids[at])] = sent_ranks[at] = rank
                        row[i] = torch.where(
                            reduce.layout.mask(KINDS, rank).to(row.device), row[i], 0
                        )
                    norms[at] = norm(row[i], reduce, slice(None))
                yield replace(block, row=row)

        tiny = np.finfo(float).tiny  # where all products are 0, all count the same
        sums = reduce.sums(plan, sent(), lambda block: norms[block.index] + tiny, of="row")
        had = reduce.layout.mask(KINDS, int(sent_ranks[sums.ok].max())).to(server.row.device)
        row = torch.where(had, (sums.totals[0] / sums.weights[0]).float(), server.row)
        return server.after(plan, row, {"ranks": ranks})

    def _rank(self, rank: int, row: Tensor, start: Tensor, reduce: Reduce) -> int:
        """Of a client from now on."""
        lower = max(floor(self.gamma * rank), self.smallest)
        tail = slice(lower, rank)
        if lower >= rank or norm(row, reduce, tail, apart=True) >= norm(
            start, reduce, tail, apart=True
        ):
            return rank
        return lower


def norm(row: Tensor, reduce: Reduce, part: slice, *, apart: bool = False) -> float:
    """||B A|| over all modules, of some rows of A and columns of B; `apart`: sum ||B|| ||A||."""
    pairs = [(b[0, :, part].double(), a[0, part].double())
             for a, b in reduce.layout.factors(row[None]).values()]  # fmt: skip
    if apart:
        return sum(float(b.norm() * a.norm()) for b, a in pairs)
    return hypot(*(Stacked(b, a).norm() for b, a in pairs))


STRATEGY = HetLoRA
