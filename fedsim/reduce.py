"""The one place where updates are combined: weights, failed clients, fixed order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import fedsim_kernels.reduce  # noqa: F401  registers the operation
from fedsim.batch import on_device
from fedsim.core import ClientUpdates, RoundPlan
from fedsim.errors import RunError


class Reduce:
    """Combines updates in the plan's order, in fp64, in memory O(P)."""

    def mean(self, plan: RoundPlan, updates: Iterator[ClientUpdates]) -> Tensor:
        """sum_k w_k delta_k / sum_k w_k over the clients that returned.

        What a client of a lower rank does not have, it leaves as it is: its delta is 0 there.

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
            weights = np.where(block.ok, plan.weights[block.index], 0.0)
            torch.ops.fedsim.weighted_rows(
                total, block.row, block.start, on_device(weights, total.device, torch.float64)
            )
            weight += float(weights.sum())
        if total is None or weight == 0:
            raise RunError(
                f"round {plan.round}: none of the {len(plan)} clients returned a finite update",
                remedy="Lower train.lr_max; clients.jsonl has each client's losses.",
            )
        return (total / weight).float()
