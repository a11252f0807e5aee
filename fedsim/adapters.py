"""The slots: K adapters in training as the rows of one matrix, with moments and gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import fedsim_kernels.adamw  # noqa: F401  registers the operation
from fedsim import seeds
from fedsim.core import KINDS, AdapterLayout


def initial_row(layout: AdapterLayout, key: int, round: int = 0) -> Tensor:
    """A fresh adapter, (P,) fp32: A uniform in +-1/sqrt(I), B zero, so that B A = 0.

    The distribution is PEFT's: Kaiming uniform with a = sqrt(5). Each round has its own.
    """
    row = torch.zeros(1, layout.size)
    for number, piece in enumerate(layout.pieces):
        if piece.kind == "A":
            u = seeds.uniform(key, seeds.Purpose.INIT, piece.size, round=round, module=number)
            bound = piece.shape[1] ** -0.5
            layout.view(row, piece).copy_(((2 * u - 1) * bound).view(1, *piece.shape))
    return row[0]


class AdapterBank:
    """fp32 rows, gradients and Adam moments of K slots: 16 bytes a number and slot.

    Attributes:
        layout: of the rows.
        rows, grads: (K, P) fp32.
        factors, grad_factors: views of each, site by site.
    """

    def __init__(
        self, layout: AdapterLayout, slots: int, device: torch.device, *, lora_plus: float = 1.0
    ) -> None:
        """`lora_plus`: the learning rate of B over that of A (arXiv:2402.12354)."""
        self.slots, self.layout = slots, layout
        shape = (slots, layout.size)
        self.rows = torch.zeros(shape, device=device)
        self.grads = torch.zeros(shape, device=device)
        self._m = torch.zeros(shape, device=device)
        self._v = torch.zeros(shape, device=device)
        self.factors = layout.site_views(self.rows)
        self.grad_factors = layout.site_views(self.grads)
        self._rank = layout.rank
        self._numbers = rank_numbers(layout).to(device)
        self._lora_plus = lora_plus
        self._lr_scale: Tensor | None = None
        self.rates({})

    def rates(self, of: Mapping[str, float]) -> None:
        """Kinds of pieces train at so many times the client's rate from now on, 1 where not named;
        at 0, where gradients are 0 too, they keep their values: no step and no decay.

        Raises:
            ValueError: a kind that no layout has.
        """
        if unknown := set(of) - set(KINDS):
            raise ValueError(f"rates of {sorted(unknown)}; expected kinds among {list(KINDS)}")
        of = {"B": 1.0, **of}
        of["B"] *= self._lora_plus
        self._lr_scale = None
        if any(rate != 1 for rate in of.values()):
            scale = torch.ones(self.layout.size)
            for kind, rate in of.items():
                scale[self.layout.mask((kind,))] = rate
            self._lr_scale = scale.to(self.rows.device)

    def cut(self, row: Tensor, rank: int) -> Tensor:
        """The row (P,) of a client of this rank: exactly zero beyond it."""
        if rank == self._rank:
            return row
        return torch.where(self._numbers < rank, row, 0)

    def load(self, slot: int, row: Tensor) -> None:
        """Start one slot from a row (P,), with fresh moments; no other slot is touched."""
        self.rows[slot].copy_(row)
        self._m[slot].zero_()
        self._v[slot].zero_()

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
        norms: Tensor = torch.ops.fedsim.adamw(
            self.rows, self.grads, self._m, self._v, lr, step, active, self._lr_scale,
            *betas, eps, weight_decay, max_norm,
        )  # fmt: skip
        return norms


def rank_numbers(layout: AdapterLayout) -> Tensor:
    """Which row of A or column of B each of the P numbers belongs to, from 0: (P,) int16."""
    numbers = torch.zeros(1, layout.size, dtype=torch.int16)
    of = torch.arange(layout.rank, dtype=torch.int16)
    for piece in layout.pieces:
        if piece.kind in ("A", "B"):
            layout.view(numbers, piece).copy_(of[:, None] if piece.kind == "A" else of)
    return numbers[0]
