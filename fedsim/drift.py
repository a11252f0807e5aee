"""How far averaging A and B apart is from averaging their products, round by round."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedsim.core import AdapterLayout, ClientUpdates, RoundPlan

_BYTES = 1 << 29  # of rows kept: 32 clients of 4 M numbers; a larger round is not measured


class Drift:
    """Keeps a round's rows as they pass, where they are few, for the error E of their mean."""

    def __init__(self, layout: AdapterLayout, scale: float, plan: RoundPlan) -> None:
        self._layout, self._scale, self._plan = layout, scale, plan
        self._rows: list[Tensor] = []
        self._index: list[int] = []
        self._fits = len(plan) * layout.size * 4 <= _BYTES

    def see(self, update: ClientUpdates) -> ClientUpdates:
        """Note an update, and pass it on."""
        if self._fits:
            healthy = np.flatnonzero(update.ok)
            self._rows += [update.row[i] for i in healthy]
            self._index += update.index[healthy].tolist()
        return update

    def relative(self) -> float | None:
        """||E|| / ||sum_k p_k s_k B_k A_k||; None where the rows were too many."""
        from fedsim.aggregation_error import relative_error

        if not self._rows:
            return None
        weights = self._plan.weights[self._index]
        return relative_error(
            torch.stack(self._rows), (weights / weights.sum()).tolist(),
            self._plan.scale[self._index].tolist(), self._scale, self._layout,
        )  # fmt: skip
