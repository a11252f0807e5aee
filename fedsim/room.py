"""Frozen weights that are made whole for each product, in memory that all linears share.

So a base is computed with that is held in few bits (`quantised.py`) or spread over processes
(`sharded.py`): each weight is whole once in the forward of a pass and once in its backward,
whoever's tokens fill the pass (with DoRA or recomputation once or twice more).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn


class Held(Protocol):
    """A weight (O, I) in another form; `dtype` and `device` are those of the whole."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def into(self, out: Tensor) -> None:
        """Write the whole weight to (O, I)."""
        ...


class Room:
    """Memory for one whole weight at a time."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def whole(self, parts: Sequence[Held]) -> Tensor:
        """Weights below each other, (O_1 + ... + O_n, I), until the next are made whole."""
        first, rows = parts[0], sum(p.shape[0] for p in parts)
        numbers, inputs = rows * first.shape[1], first.shape[1]
        if len(self._buffer) < numbers:
            self._buffer = torch.empty(numbers, dtype=first.dtype, device=first.device)
        out = self._buffer[:numbers].view(rows, inputs)
        for part, place in zip(parts, out.split([p.shape[0] for p in parts]), strict=True):
            part.into(place)
        return out


class HeldLinear(nn.Linear):
    """A linear whose weight is made whole when it is asked for."""

    def __init__(self, linear: nn.Linear, held: Held, room: Room) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.held, self.room, self.bias = held, room, linear.bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.room.whole([self.held])


def renewed(room: Room, parts: Sequence[Held]) -> Tensor:
    """A weight that the backward makes anew (`grouped_lora`): by then others were in its place."""
    weight = room.whole(parts)
    weight.renew = partial(room.whole, parts)  # type: ignore[attr-defined]
    return weight


def replace(model: nn.Module, name: str, held: Held, room: Room) -> None:
    """Put a held weight in the place of a linear's."""
    parent, _, leaf = name.rpartition(".")
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    setattr(model.get_submodule(parent), leaf, HeldLinear(linear, held, room))
