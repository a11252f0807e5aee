"""The slots: K adapters in training as the rows of one matrix, with moments and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim import seeds
from fedsim.core import AdapterLayout
from fedsim_kernels.adamw import adamw_ref

Factors = dict[str, tuple[Tensor, Tensor]]


def initial_row(layout: AdapterLayout, key: int) -> Tensor:
    """A fresh adapter, (P,) fp32: A uniform in +-1/sqrt(I), B zero, so that B A = 0.

    The distribution is PEFT's: Kaiming uniform with a = sqrt(5).
    """
    row = torch.zeros(1, layout.size)
    for number, piece in enumerate(layout.pieces):
        if piece.kind == "A":
            u = seeds.uniform(key, seeds.Purpose.INIT, piece.size, module=number)
            bound = piece.shape[1] ** -0.5
            layout.view(row, piece).copy_(((2 * u - 1) * bound).view(1, *piece.shape))
    return row[0]


class AdapterBank:
    """fp32 rows, gradients and Adam moments of K slots.

    Attributes:
        rows, grads: (K, P) fp32.
        factors, grad_factors: module -> views (A (K, R, I), B (K, O, R)) of each.
    """

    def __init__(self, layout: AdapterLayout, slots: int, device: torch.device) -> None:
        self.slots = slots
        shape = (slots, layout.size)
        self.rows = torch.zeros(shape, device=device)
        self.grads = torch.zeros(shape, device=device)
        self._m = torch.zeros(shape, device=device)
        self._v = torch.zeros(shape, device=device)
        self.factors: Factors = layout.factors(self.rows)
        self.grad_factors: Factors = layout.factors(self.grads)

    def load(self, row: Tensor) -> None:
        """Start every slot from one row, with fresh moments."""
        self.rows.copy_(row.expand_as(self.rows))
        self._m.zero_()
        self._v.zero_()

    def step(
        self,
        *,
        lr: Tensor,
        step: Tensor,
        active: Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_norm: float,
    ) -> Tensor:
        """One AdamW step of the active slots; returns their gradient norms (K,)."""
        norms: Tensor = adamw_ref(
            self.rows, self.grads, self._m, self._v, lr=lr, step=step, active=active,
            betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm,
        )  # fmt: skip
        return norms
