"""The one place where updates are combined: weights, failed clients, fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import fedsim_kernels.reduce  # noqa: F401  registers the operation
from fedsim import release as privately
from fedsim import secure
from fedsim.adapters import initial_row
from fedsim.batch import on_device
from fedsim.core import AdapterLayout, ClientUpdates, RoundPlan, ServerState
from fedsim.errors import RunError
from fedsim.factors import Product, Products
from fedsim.release import Release
from fedsim.secure import Ring, summed

Weigh = Callable[[ClientUpdates], np.ndarray]


@dataclass(frozen=True)
class Sums:
    """Weighted sums over the clients that returned.

    Attributes:
        totals: (P,) fp64 for each way of weighing. weights: their sums of weights.
        ok: (M,) bool, who returned a finite update.
    """

    totals: tuple[Tensor, ...]
    weights: tuple[float, ...]
    ok: np.ndarray


@dataclass(frozen=True)
class Rows:
    """The updates of all clients that returned, in the plan's order."""

    index: np.ndarray  # (m,) int64 positions in the plan
    weights: np.ndarray  # (m,) float64, of the plan, their sum is 1
    delta: Tensor  # (m, P) fp32
    row: Tensor  # (m, P) fp32


class Reduce:
    """Combines updates in the plan's order, in fp64, in memory O(P).

    Attributes:
        layout: of the rows.
        scale: s of the server's adapter, whose part in a module's weight is s B A.
        ring: of secure aggregation: sums are all that can be asked for. None: there is none.
        release: of differential privacy: one sum is all that can be asked for.
        vectors: ways of weighing that were summed last.
    """

    def __init__(
        self, layout: AdapterLayout, scale: float, key: int, ring: Ring | None = None,
        release: Release | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.scale, self._key = layout, scale, key
        self.ring, self.release = ring, release
        self.vectors = 0

    def fresh(self, round: int) -> Tensor:
        """A new adapter (P,) fp32 for the clients after a round: A drawn, B zero."""
        return initial_row(self.layout, self._key, round)

    def mean(
        self, plan: RoundPlan, updates: Iterator[ClientUpdates], weigh: Weigh | None = None
    ) -> Tensor:
        """sum_k w_k delta_k / sum_k w_k over the clients that returned.

        What a client of a lower rank does not have, it leaves as it is: its delta is 0 there.

        Args:
            weigh: (k,) weights of a block; without it the plan's.

        Returns:
            (P,) fp32 on the device of the updates.

        Raises:
            RunError: no client of the round returned a finite update.
        """
        most = float(plan.weights.max()) if self.ring else 1.0  # in the ring weights are <= 1
        sums = self.sums(plan, updates, weigh or weights_of(plan, most))
        return (sums.totals[0] / sums.weights[0]).float()

    def sums(
        self, plan: RoundPlan, updates: Iterator[ClientUpdates], *weigh: Weigh,
        of: Literal["delta", "row"] = "delta",
    ) -> Sums:  # fmt: skip
        """sum_k w_k delta_k, or of the rows themselves, for several ways of weighing at once.

        Raises:
            RunError: no client returned a finite update of a positive weight; in the ring, a number
                is beyond its range, or fewer returned than its threshold.
        """
        self.vectors = len(weigh)
        if self.release:
            total, expected = self.release.sum(plan, updates, weigh, of)
            return Sums((total,), (expected,), np.ones(len(plan), dtype=bool))
        if self.ring:
            sums = Sums(*summed(self.ring, plan, updates, weigh, of))
            if any(w == 0 for w in sums.weights):
                raise _nobody(plan)
            return sums
        totals: list[Tensor] = []
        weights = [0.0] * len(weigh)
        ok = np.zeros(len(plan), dtype=bool)
        for block in updates:
            if not totals:
                p = block.row.shape[1]
                totals = [block.row.new_zeros(p, dtype=torch.float64) for _ in weigh]
            ok[block.index] = block.ok
            for i, of_block in enumerate(weigh):
                w = np.where(block.ok, of_block(block), 0.0)
                _add(totals[i], block, w, of)
                weights[i] += float(w.sum())
        if not totals or any(w == 0 for w in weights):
            raise _nobody(plan)
        return Sums(tuple(totals), tuple(weights), ok)

    def products(
        self, plan: RoundPlan, updates: Iterator[ClientUpdates], weigh: Weigh | None = None
    ) -> tuple[Tensor, dict[str, Product]]:
        """The mean update, and sum_k p_k s_k B_k A_k of each module, exactly.

        Args:
            weigh: as of `mean`.

        Returns:
            (P,) fp64, and the products by module.

        Raises:
            RunError: no client returned a finite update.
            ConfigError: only sums can be asked for.
        """
        self._only_sums("products B A")
        weigh, products = weigh or weights_of(plan), Products(self.layout)

        def seen() -> Iterator[ClientUpdates]:
            for block in updates:
                weights = weigh(block) * plan.scale[block.index]
                for i in np.flatnonzero(block.ok):
                    rank = int(plan.rank[block.index[i]])
                    products.add(block.row[i], rank, float(weights[i]))
                yield block

        sums = self.sums(plan, seen(), weigh)
        return sums.totals[0] / sums.weights[0], products.over(sums.weights[0])

    def after(self, server: ServerState) -> ServerState:
        """The server behind its round, with what the next round's privacy needs to know."""
        return self.release.after(server) if self.release else server

    def _only_sums(self, what: str) -> None:
        """Raises ConfigError where single clients must not be looked at."""
        if self.release:
            raise privately.refuse(f"{what} of single clients")
        if self.ring:
            raise secure.refuse(what)

    def rows(self, plan: RoundPlan, updates: Iterator[ClientUpdates]) -> Rows:
        """Every update, for rules that need all of them: memory O(M P).

        Raises:
            RunError: no client returned a finite update.
            ConfigError: only sums can be asked for.
        """
        self._only_sums("updates")
        index, rows, deltas = [], [], []
        for block in updates:
            for i in np.flatnonzero(block.ok):
                index.append(int(block.index[i]))
                rows.append(block.row[i])
                deltas.append(block.delta[i])
        if not index:
            raise _nobody(plan)
        weights = plan.weights[index]
        return Rows(
            np.array(index), weights / weights.sum(), torch.stack(deltas), torch.stack(rows)
        )


def weights_of(plan: RoundPlan, unit: float = 1.0) -> Weigh:
    """The plan's weights, n_k examples, over a unit."""
    return lambda block: plan.weights[block.index] / unit


def uniform(block: ClientUpdates) -> np.ndarray:
    """Every client counts the same."""
    return np.ones(len(block.index))


def _add(total: Tensor, block: ClientUpdates, weights: np.ndarray, of: str) -> None:
    """total += sum_k w_k (row_k - start_k), or of the rows."""
    w = on_device(weights, total.device, torch.float64)
    if of == "row" or block.start.ndim == 1:
        start = None if of == "row" else block.start
        torch.ops.fedsim.weighted_rows(total, block.row, start, w)
        return
    for i in range(len(weights)):
        one = slice(i, i + 1)
        torch.ops.fedsim.weighted_rows(total, block.row[one], block.start[i], w[one])


def _nobody(plan: RoundPlan) -> RunError:
    return RunError(
        f"round {plan.round}: none of the {len(plan)} clients returned a finite update",
        remedy="Lower train.lr_max; clients.jsonl has each client's losses.",
    )
