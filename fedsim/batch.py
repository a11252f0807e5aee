"""One pass: sequences of several clients end to end, without padding or in whole tiles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedsim_kernels.segments import Segments


@dataclass(frozen=True)
class PackedBatch:
    """One pass: sequences of several clients, end to end, in chunks.

    Sequences of a slot are adjacent. `parent[b]` is the sequence whose tokens precede b's
    (a shared prefix), or -1; positions continue from it. Labels are ordered by slot and chunk,
    and every chunk has at least one. Padding, in strict mode, ends each chunk of rows and of
    labels; it belongs to no sequence and has weight 0.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    lengths: np.ndarray  # (B,) int64
    slot: np.ndarray  # (B,) int64
    sequence: np.ndarray  # (B,) int64, index within its client's step
    parent: np.ndarray  # (B,) int64
    starts: np.ndarray  # (B,) int64 first packed row
    chunk: np.ndarray  # (B,) int64, ascending from 0
    ranks: tuple[int, ...]  # of each slot, or () where all have R
    label_rows: Tensor  # (L,) int64 packed rows whose next token is a label
    targets: Tensor  # (L,) int64
    label_slot: Tensor  # (L,) int64
    label_weight: Tensor  # (L,) fp32, 1 / label tokens of the client's whole step
    label_spans: np.ndarray  # (chunks, 3) int64: slot, first label, labels without padding
    label_repeats: int  # most labels of one row; padding, whose gradient is 0, does not count

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def rows(self) -> int:
        """Packed rows that are no padding."""
        return int(self.lengths.sum())

    @cached_property
    def segments(self) -> Segments:
        """Where the packed rows' sequences, slots and chunks lie."""
        return Segments.build(
            self.lengths, self.slot, self.parent, starts=self.starts, chunks=self.chunk,
            ranks=self.ranks, rows=len(self),
        )  # fmt: skip

    @cached_property
    def label_segments(self) -> Segments:
        """The same for the label rows, taken out of the pass: one sequence a chunk."""
        slot, start, length = self.label_spans.T
        return Segments.build(
            length, slot, starts=start, chunks=np.arange(len(slot)), ranks=self.ranks,
            rows=len(self.label_rows),
        )  # fmt: skip

    def per_row(self, values: np.ndarray, padding: int) -> np.ndarray:
        """A number of each sequence (B,), for each packed row (T,) int64."""
        before = np.cumsum(self.lengths) - self.lengths
        rows = np.arange(self.lengths.sum()) + np.repeat(self.starts - before, self.lengths)
        out = np.full(len(self), padding, dtype=np.int64)
        out[rows] = np.repeat(values, self.lengths)
        return out


class Packer:
    """Fills one pass: chunks of sequences end to end, each with its slot, positions and labels.

    With a tile, the rows and the labels of each chunk are padded to whole tiles. A padding row is
    token 0 at position 0; a padding label is the chunk's first label row again, with weight 0.
    """

    def __init__(self, tile: int = 0) -> None:
        self._tile = tile
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._meta: list[tuple[int, ...]] = []  # slot, sequence, parent, start, length, chunk
        self._labels: list[tuple[np.ndarray, ...]] = []  # rows, targets, weights of a chunk
        self._spans: list[tuple[int, ...]] = []  # slot, first label, labels of a chunk
        self._open: list[tuple[np.ndarray, ...]] = []
        self._slot = -1
        self.tokens = 0

    def chunk(self, slot: int) -> None:
        """What follows is a new chunk of this slot."""
        self._close()
        self._slot = slot

    def sequence(self, ids: np.ndarray, sequence: int, position: int = 0, parent: int = -1) -> int:
        """Add tokens that start at `position`; returns the first packed row."""
        row = self.tokens
        self._ids.append(ids)
        self._positions.append(np.arange(position, position + len(ids)))
        self._meta.append((self._slot, sequence, parent, row, len(ids), len(self._spans)))
        self.tokens += len(ids)
        return row

    @property
    def last(self) -> int:
        """Index of the sequence added last."""
        return len(self._meta) - 1

    def labels(self, first: int, targets: np.ndarray, weight: float) -> None:
        """Rows first, first + 1, ... predict the targets."""
        n = len(targets)
        if n:
            self._open.append((np.arange(first, first + n), targets, np.full(n, weight)))

    def _close(self) -> None:
        if not self._meta or self._meta[-1][5] < len(self._spans):
            return
        if not self._open:  # no chunk is without a label row, so that no table is ever empty
            first = next(start for *_, start, _, chunk in self._meta if chunk == len(self._spans))
            self._open.append((np.array([first]), np.zeros(1, dtype=np.int64), np.zeros(1)))
        rows, targets, weights = (np.concatenate(part) for part in zip(*self._open, strict=True))
        begun = sum(len(part[0]) for part in self._labels)
        self._spans.append((self._slot, begun, len(rows)))
        if self._tile:
            zeros = np.zeros(-self.tokens % self._tile, dtype=np.int64)
            self._ids.append(zeros)
            self._positions.append(zeros)
            self.tokens += len(zeros)
            none = np.zeros(-len(rows) % self._tile, dtype=np.int64)
            rows = np.concatenate([rows, np.full_like(none, rows[0])])
            targets = np.concatenate([targets, none])
            weights = np.concatenate([weights, none])
        self._labels.append((rows, targets, weights))
        self._open = []

    def finish(self, device: torch.device, ranks: tuple[int, ...] = ()) -> PackedBatch:
        """The packed pass on its device."""
        self._close()
        slot, sequence, parent, start, length, chunk = np.array(self._meta, dtype=np.int64).T
        rows, targets, weights = (np.concatenate(p) for p in zip(*self._labels, strict=True))
        label_slot = np.concatenate(
            [np.full(len(p[0]), s) for p, (s, _, _) in zip(self._labels, self._spans, strict=True)]
        )
        return PackedBatch(
            input_ids=on_device(np.concatenate(self._ids), device),
            position_ids=on_device(np.concatenate(self._positions), device),
            lengths=length, slot=slot, sequence=sequence, parent=parent, starts=start,
            chunk=chunk, ranks=ranks,
            label_rows=on_device(rows, device), targets=on_device(targets, device),
            label_slot=on_device(label_slot, device),
            label_weight=on_device(weights, device, torch.float32),
            label_spans=np.array(self._spans, dtype=np.int64),
            label_repeats=int(np.unique(rows[weights > 0], return_counts=True)[1].max(initial=1)),
        )  # fmt: skip


def on_device(values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Host numbers as a tensor; a GPU takes them from pinned memory, when it comes to it."""
    tensor = torch.as_tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Reading:
    """A copy of device numbers, on its way to the host until it is asked for."""

    def __init__(self, values: Tensor) -> None:
        self._event = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._host = values

    def tensor(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
