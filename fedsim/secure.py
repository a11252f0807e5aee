"""Secure aggregation as the server meets it: fixed point, modular sums, a threshold.

    x in [-range, range] becomes round(x / unit) in Z_2^bits; unit is the smallest power of two at
    which the m clients of a round, each at the range, add up without a wrap

Each client adds masks that it shares with every other, one of a pair what the other subtracts:
they cancel to the bit modulo 2^bits (`tests/test_secure.py` draws them), so that none is drawn
here. What is left of the protocol is what it costs (`channel.py`), what it rounds, and when it
fails: the sum is off by m unit / 2 at most, and opens when `threshold` of the round's clients have
returned. A number beyond the range is an error and never wraps.

By hand: bits = 16, m = 4, range = 1: each may send 32767 // 4 = 8191, so unit = 2^-12, and 0.3
becomes 1229, off by 0.2 units.

Paper: Bonawitz et al., arXiv:1611.04482.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fedsim.channel import Channel, largest
from fedsim.core import ClientUpdates, RoundPlan
from fedsim.errors import ConfigError, RunError

Weigh = Callable[[ClientUpdates], np.ndarray]


@dataclass(frozen=True)
class Ring:
    """Z_2^bits, what a client's number may be, and the share of a round that must return."""

    bits: int
    range: float
    threshold: float

    @classmethod
    def of(cls, channel: Channel) -> Ring | None:
        """None without secure aggregation."""
        if not channel.secure:
            return None
        assert channel.bits and channel.range and channel.threshold
        return cls(channel.bits, channel.range, channel.threshold)

    def unit(self, clients: int) -> float:
        """What 1 stands for in a round of so many."""
        fraction, exponent = math.frexp(self.range / largest(self.bits, clients))
        return math.ldexp(1.0, exponent - (fraction == 0.5))

    def encode(self, x: Tensor, unit: float) -> Tensor:
        """x fp64 within the range -> its element, int64 in [0, 2^bits)."""
        return (x / unit).round().long() & ((1 << self.bits) - 1)

    def decode(self, element: Tensor, unit: float) -> Tensor:
        """An element as the number nearest to 0, fp64."""
        signed = torch.where(element >> (self.bits - 1) > 0, element - (1 << self.bits), element)
        return signed.double() * unit

    def needed(self, clients: int) -> int:
        """Of so many, how many must return."""
        return math.ceil(Fraction(str(self.threshold)) * clients)


class SecureSum:
    """Weighted sums of a round in the ring, in memory O(P) for each way of weighing."""

    def __init__(self, ring: Ring, plan: RoundPlan, vectors: int) -> None:
        self._ring, self._plan, self._unit = ring, plan, ring.unit(len(plan))
        self._sums: list[Tensor | None] = [None] * vectors

    def add(self, vector: int, at: int, weight: float, x: Tensor) -> None:
        """Take in w x of the client at a position of the plan, and w as one more number.

        Args:
            x: (P,) fp64.

        Raises:
            RunError: a number is beyond the range.
        """
        sent = torch.cat([weight * x, x.new_tensor([weight])])
        size = float(sent.abs().max())
        if not size <= self._ring.range:
            raise RunError(
                f"round {self._plan.round}: client {int(self._plan.client_ids[at])} has a number "
                "in its weighted update, or a weight",
                got=size, expected=f"at most channel.range = {self._ring.range}",
                remedy="Raise channel.range, and channel.bits with it, or lower train.lr_max.",
            )  # fmt: skip
        element, before = self._ring.encode(sent, self._unit), self._sums[vector]
        added = element if before is None else before + element
        self._sums[vector] = added & ((1 << self._ring.bits) - 1)

    def open(self, returned: int) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
        """The sums (P,) fp64 and their weights.

        Raises:
            RunError: fewer clients returned than the threshold asks for.
        """
        needed = self._ring.needed(len(self._plan))
        if returned < needed:
            raise RunError(
                f"round {self._plan.round}: {returned} of {len(self._plan)} clients returned, and "
                "the sum cannot be opened",
                expected=f"at least {needed}, channel.threshold = {self._ring.threshold}",
                remedy="Lower train.lr_max, or channel.threshold; clients.jsonl has each "
                "client's losses.",
            )  # fmt: skip
        opened = [self._ring.decode(s, self._unit) for s in self._sums if s is not None]
        return tuple(s[:-1] for s in opened), tuple(float(s[-1]) for s in opened)


def summed(
    ring: Ring, plan: RoundPlan, updates: Iterator[ClientUpdates], weigh: tuple[Weigh, ...],
    of: str,
) -> tuple[tuple[Tensor, ...], tuple[float, ...], np.ndarray]:  # fmt: skip
    """Totals, weights and who returned, as of `Reduce.sums`.

    Raises:
        RunError: a number beyond the range, or too few clients.
    """
    total, ok = SecureSum(ring, plan, len(weigh)), np.zeros(len(plan), dtype=bool)
    for block in updates:
        ok[block.index] = block.ok
        weights = [of_block(block) for of_block in weigh]
        for i in np.flatnonzero(block.ok):
            x = block.row[i].double()
            if of == "delta":
                x = x - (block.start if block.start.ndim == 1 else block.start[i])
            for vector, w in enumerate(weights):
                total.add(vector, int(block.index[i]), float(w[i]), x)
    totals, sums = total.open(int(ok.sum()))
    return totals, sums, ok


def refuse(what: str) -> ConfigError:
    """The error of a rule that looks at single updates."""
    return ConfigError(
        f"channel.secure: the rule reads {what} of single clients",
        expected="one that needs sums only, such as fedavg",
        remedy="Choose another server.strategy, or channel.secure = false.",
    )
