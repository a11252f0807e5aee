"""Clients in the slots of a device: what has come out of each so far, and what it leaves with."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import Reading
from fedsim.core import ClientUpdates


class State:
    """What has come out of each slot's client, on the device, (K,) each.

    Attributes:
        loss: of the present step, as far as it was passed, NaN once it is over and had no labels.
        first: of the first step.
        ok: False from the first loss or gradient on that was not finite. A sick client keeps its
            slot until its steps are over: finding out earlier would stop the device.
        heeds: losses; under privacy of examples nothing that the server sees may hang on them.
    """

    def __init__(self, slots: int, device: torch.device, *, heeds: bool) -> None:
        self.heeds = heeds
        self.loss = torch.zeros(slots, dtype=torch.float64, device=device)
        self.first = torch.zeros_like(self.loss)
        self.ok = torch.ones(slots, dtype=torch.bool, device=device)

    def add(
        self, loss: Tensor, *, enters: Tensor, begins: Tensor, first: Tensor, completes: Tensor,
        unlabelled: Tensor,
    ) -> None:  # fmt: skip
        """Take in one pass; the flags are (K,) bool, `unlabelled` where a step completes whose
        examples have no labels: it has measured nothing, and nothing is wrong with its client."""
        self.loss = torch.where(begins, loss, self.loss + loss)
        self.ok = self.ok | enters
        if self.heeds:
            self.ok &= ~completes | torch.isfinite(self.loss)
        self.loss = torch.where(unlabelled, float("nan"), self.loss)
        self.first = torch.where(first, self.loss, self.first)

    def read(self) -> Reading:
        """(3, K) first loss, last loss, ok."""
        return Reading(torch.stack([self.first, self.loss, self.ok.double()]))


@dataclass
class Visit:
    """A client in its slot."""

    index: int  # in the plan
    start: Tensor  # (P,)
    began: float
    tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """A client that left its slot."""

    visit: Visit
    slot: int
    row: Tensor | Reading  # (P,)
    figures: Reading

    def update(self) -> ClientUpdates:
        """Its update; waits until the device has come to its end."""
        first, last, ok = self.figures.tensor()[:, self.slot].tolist()
        row = self.row.tensor() if isinstance(self.row, Reading) else self.row
        return ClientUpdates(
            index=np.array([self.visit.index]),
            row=row[None],
            start=self.visit.start,
            tokens=np.array([self.visit.tokens]),
            loss_first=np.array([first]),
            loss_last=np.array([last]),
            ok=np.array([ok != 0]),
            seconds=time.perf_counter() - self.visit.began,
        )
