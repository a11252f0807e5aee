"""The one place where updates are combined: weights, failed clients, fixed order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedsim.core import ClientUpdates, RoundPlan
from fedsim.errors import RunError


class Reduce:
    """Combines updates in the plan's order, in fp64, in memory O(P)."""

    def mean(self, plan: RoundPlan, updates: Iterator[ClientUpdates]) -> Tensor:
        """sum_k w_k delta_k / sum_k w_k over the clients that returned.

        Returns:
            (P,) fp32 on the device of the updates.

        Raises:
            RunError: no client of the round returned a finite update.
        """
        total: Tensor | None = None
        weight = 0.0
        for block in updates:
            if total is None:
                total = torch.zeros_like(block.start, dtype=torch.float64)
            for i, index in enumerate(block.index):
                if block.ok[i]:
                    w = float(plan.weights[index])
                    total.add_(block.row[i].double() - block.start.double(), alpha=w)
                    weight += w
        if total is None or weight == 0:
            raise RunError(
                f"round {plan.round}: none of the {len(plan)} clients returned a finite update",
                remedy="Lower train.lr_max; clients.jsonl has each client's losses.",
            )
        return (total / weight).float()
