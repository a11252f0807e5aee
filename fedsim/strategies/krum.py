"""Krum: the server takes the update that lies closest to its neighbours.

    x <- x + d_k,  k = argmin s_k        s_k = sum of ||d_k - d_j||^2 over the m - f - 2 nearest j

d_k = x_k - x; f attackers are tolerated where m >= 2f + 3 clients returned. Below 3 clients nobody
can be told from an attacker: f is 0, and the smaller client id wins, as in every tie. Distances are
those of updates in fp64: of rows in fp32 they would be lost to rounding.

By hand: updates 0, 1, 2, 4, 100, f = 1, two neighbours: s = 5, 2, 5, 13, 18820: x moves by 1.

Paper: Blanchard et al., arXiv:1703.02757, section 4. Flower's `select_multikrum` takes ||a||^2 +
||b||^2 - 2ab of whole fp32 rows, and asks for no m >= 2f + 3; `max(1, m - f - 2)` neighbours, as
here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.core import ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.errors import ConfigError, FedSimError, RunError
from fedsim.reduce import Reduce, Rows
from fedsim.strategies.median import columns


@dataclass(frozen=True)
class Krum(Strategy):
    """One client's update; no state besides the row.

    Attributes:
        f: attackers that a round may hold; the default, none, is as many as the clients that
            returned allow.
    """

    f: Annotated[int, Field(ge=0)] | None = None
    times: ClassVar[int] = 2  # m is at least times f + 3

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Every client starts from the global row, where the round is large enough for f."""
        self.attackers(plan, len(plan), ConfigError)
        return super().rule(server, plan)

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """Judge a round by those that returned; memory O(M P)."""
        found = reduce.rows(plan, updates)
        f = self.attackers(plan, len(found.index), RunError)
        return self.combine(found, plan.client_ids[found.index], f, plan.round)

    def attackers(self, plan: RoundPlan, m: int, error: type[FedSimError]) -> int:
        """f of m clients."""
        if self.f is None:
            return max(0, (m - 3) // self.times)
        least = self.times * self.f + 3
        if m < least:
            raise error(
                f"round {plan.round}: f = {self.f} attackers among m = {m} clients",
                expected=f"m to be at least {self.times} f + 3 = {least}",
                remedy="Lower server.options.f, or raise server.fraction.",
            )
        return self.f

    def combine(self, found: Rows, ids: np.ndarray, f: int, round: int) -> Tensor:
        """The step from all updates, (P,)."""
        return found.delta[ranking(squared_distances(found.delta), ids, f)[0]]


def squared_distances(delta: Tensor) -> np.ndarray:
    """||d_k - d_j||^2 of all pairs: (m, m) float64, symmetric to the bit."""
    gram = delta.new_zeros(len(delta), len(delta), dtype=torch.float64)
    for part in columns(delta):
        gram += part.double() @ part.double().T
    g = gram.cpu().numpy()
    g = (g + g.T) / 2
    norms = np.diagonal(g)
    out: np.ndarray = np.maximum(norms[:, None] + norms - 2 * g, 0)
    return out


def ranking(distances: np.ndarray, ids: np.ndarray, f: int) -> np.ndarray:
    """Clients by ascending score, ties by id: (m,) positions."""
    m = len(ids)
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    # Bulyan's last rounds have m < f + 3: the nearest client still says more than none.
    neighbours = min(max(1, m - f - 2), m - 1)
    return np.lexsort((ids, np.sort(others, axis=1)[:, :neighbours].sum(axis=1)))


STRATEGY = Krum
