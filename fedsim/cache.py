"""Keys and values of live sequences, and attention of one new row of each.

    s[i, j] = cap(scale q[i] . k[j])      o[i] = sum_j softmax(s[i])[j] v[j]

over the tokens j of row i's own sequence with 0 <= position[i] - j < window; the cap and the
sharing of key heads are those of packed attention.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.batch import on_device


class Cache:
    """Room for a number of sequences of limited length: two (slots, Hkv, length, D) a layer,
    made when a layer first writes."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._rows: Tensor | None = None  # which packed rows are kept; None: all
        self._slots = self._positions = torch.empty(0, dtype=torch.int64)  # where
        self._last = self._positions  # position of the last key that each new row sees
        self._order: Tensor | None = None  # packed row of each slot; None: as they come
        self._span = (0, 0)  # lowest and highest position of the new rows
        self._seen: dict[int, tuple[slice, Tensor]] = {}
        self.steps = False  # the next pass has one new row of each sequence, else whole prompts

    def fill(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """The next pass computes prompts; its packed rows (E,) are kept at (slot, position)."""
        self._rows, self._slots, self._positions = rows, slots, positions
        self.steps = False

    def extend(
        self, slots: np.ndarray, positions: np.ndarray, device: torch.device, *,
        unseen: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """The next pass has one row of each of the first slots, (n,) in packed order.

        Args:
            unseen: (n,) rows whose key nobody sees, themselves included.
        """
        last = positions if unseen is None else positions - unseen
        all_ = on_device(np.stack([slots, positions, np.argsort(slots), last]), device)
        self._rows, (self._slots, self._positions, order, self._last) = None, all_
        self._order = None if (slots == np.arange(len(slots))).all() else order
        self._span = int(last.min()), int(positions.max())
        self._seen.clear()
        self.steps = True

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write a layer's keys and values, (T, Hkv, D) of the pass."""
        if layer not in self._layers:  # zeros: an unseen value is multiplied by 0, so it is finite
            shape = (self.slots, k.shape[1], self.length, k.shape[2])
            self._layers[layer] = k.new_zeros(shape), v.new_zeros(shape)
        for store, x in zip(self._layers[layer], (k, v), strict=True):
            store[self._slots, :, self._positions] = x if self._rows is None else x[self._rows]

    def move(self, source: int, target: int, length: int) -> None:
        """A sequence of `length` tokens gets another slot, whose own is gone."""
        for layer in self._layers.values():
            for store in layer:
                store[target, :, :length] = store[source, :, :length]

    def attend(
        self, layer: int, q: Tensor, *, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """One row of each sequence, (n, Hq, D) in packed order, over all that it sees."""
        n, heads, size = q.shape
        span, seen = self._visible(window or 0)
        keys, values = (store[:n, :, span] for store in self._layers[layer])
        q = q if self._order is None else q.index_select(0, self._order)
        q = q.reshape(n, keys.shape[1], -1, size)
        if softcap is None:
            o = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, scale=scale)
        else:
            s = torch.tanh((q @ keys.mT).float() * (scale / softcap)) * softcap
            p = torch.softmax(s.masked_fill(~seen, -torch.inf), -1)
            o = p.to(values.dtype) @ values
        o = o.reshape(n, heads, size)
        return o if self._order is None else o.index_select(0, self._slots)

    def _visible(self, window: int) -> tuple[slice, Tensor]:
        """Positions that some row sees, and (n, 1, 1, positions) which of them each sees."""
        if window not in self._seen:
            low, high = self._span
            span = slice(max(0, low - window + 1) if window else 0, high + 1)
            at = self._last if self._order is None else self._last[self._order]
            distance = at[:, None] - torch.arange(span.start, span.stop, device=at.device)
            seen = (distance >= 0) & (distance < (window or self.length))
            self._seen[window] = span, seen[:, None, None]
        return self._seen[window]
