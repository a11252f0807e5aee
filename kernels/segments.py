"""Segments: which packed rows belong to which sequence, slot and chunk.

Built once per pass from host integers and shared by every layer, so that no operation has to
ask the device for a length. Operations read them as small int32 tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedsim_kernels.dispatch import chosen


@dataclass(frozen=True)
class Segments:
    """B sequences in packed rows; those of a slot are adjacent.

    Attributes:
        lengths: tokens of each sequence, each >= 1.
        slots: adapter slot of each sequence.
        parents: index of the earlier sequence whose tokens a sequence also sees before its own
            (a shared prefix; chains are followed), or -1. A parent lies in the same chunk.
        starts: first row of each sequence. Rows between sequences are padding: they belong to
            nobody, and operations leave zeros there.
        chunks: of each sequence; gradients are summed over one chunk at a time, in order. In
            `fast` mode a slot is one chunk.
        ranks: of each slot, or () when all slots use every row of A.
        rows: packed rows T, padding included.
    """

    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    parents: tuple[int, ...]
    starts: tuple[int, ...]
    chunks: tuple[int, ...]
    ranks: tuple[int, ...]
    rows: int

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        slots: Sequence[int],
        parents: Sequence[int] | None = None,
        *,
        starts: Sequence[int] | None = None,
        chunks: Sequence[int] | None = None,
        ranks: Sequence[int] = (),
        rows: int | None = None,
    ) -> Segments:
        """Check and freeze; by default sequences lie end to end and a slot is one chunk. Raises
        ValueError naming the sequence that is at fault."""
        if any(int(n) != n for n in lengths):
            raise ValueError(f"segments: got lengths {list(lengths)}; expected whole numbers.")
        lengths = tuple(int(n) for n in lengths)
        slots = tuple(int(s) for s in slots)
        parents = tuple(int(p) for p in parents) if parents is not None else (-1,) * len(lengths)
        if not len(lengths) == len(slots) == len(parents):
            raise ValueError(
                f"segments: got {len(lengths)} lengths, {len(slots)} slots, {len(parents)} "
                "parents; expected equal counts. Give one of each per sequence."
            )
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        begin = tuple(int(s) for s in starts) if starts is not None else (0, *ends)[: len(ends)]
        group = tuple(int(c) for c in chunks) if chunks is not None else slots
        seen: set[int] = set()
        done: set[tuple[int, int]] = set()  # (slot, chunk)
        free = 0
        for i, (n, s, p) in enumerate(zip(lengths, slots, parents, strict=True)):
            if n < 1:
                raise ValueError(f"sequence {i}: got length {n}; expected >= 1. Leave it out.")
            if s < 0 or p < -1:
                raise ValueError(f"sequence {i}: got slot {s}, parent {p}; expected >= 0, >= -1.")
            if s in seen and slots[i - 1] != s:
                raise ValueError(
                    f"sequence {i}: slot {s} appears in two places; expected the sequences of a "
                    "slot to be adjacent. Sort by slot before packing."
                )
            new_chunk = i == 0 or (group[i], s) != (group[i - 1], slots[i - 1])
            if new_chunk and (s, group[i]) in done:
                raise ValueError(f"sequence {i}: chunk {group[i]} appears in two places.")
            if p >= 0 and (p >= i or slots[p] != s or group[p] != group[i]):
                raise ValueError(
                    f"sequence {i}: got parent {p}; expected an earlier sequence of slot {s} "
                    "in the same chunk."
                )
            if begin[i] < free or (not new_chunk and begin[i] != free):
                raise ValueError(
                    f"sequence {i}: got first row {begin[i]}; expected {free}, or more where a "
                    "chunk begins."
                )
            free = begin[i] + n
            seen.add(s)
            done.add((s, group[i]))
        total = free if rows is None else int(rows)
        if total < free:
            raise ValueError(f"segments: got {total} rows; expected at least {free}.")
        return cls(lengths, slots, parents, begin, group, tuple(int(r) for r in ranks), total)

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first row, end row) of every chunk, in packed order."""
        out: list[tuple[int, int, int]] = []
        for i, (n, s, start) in enumerate(zip(self.lengths, self.slots, self.starts, strict=True)):
            if i and self.chunks[i - 1] == self.chunks[i] and self.slots[i - 1] == s:
                out[-1] = (s, out[-1][1], start + n)
            else:
                out.append((s, start, start + n))
        return tuple(out)

    def chain(self, i: int) -> list[int]:
        """The ancestors of sequence i, oldest first, then i itself."""
        out = [i]
        while (i := self.parents[i]) >= 0:
            out.insert(0, i)
        return out

    def rank(self, slot: int) -> int:
        """Rows of A that the slot uses, or 0 for all of them."""
        return self.ranks[slot] if self.ranks else 0

    @cached_property
    def span_table(self) -> Tensor:
        """(S, 4) int32 on the host: slot, first row, end row, rank (0: all)."""
        rows = [(s, a, b, self.rank(s)) for s, a, b in self.spans]
        return torch.tensor(rows, dtype=torch.int32).view(-1, 4)

    @cached_property
    def sequence_table(self) -> Tensor:
        """(B, 4) int32 on the host: first row, length, parent, tokens of all ancestors."""
        before: list[int] = []
        for p in self.parents:
            before.append(before[p] + self.lengths[p] if p >= 0 else 0)
        rows = list(zip(self.starts, self.lengths, self.parents, before, strict=True))
        return torch.tensor(rows, dtype=torch.int32).view(-1, 4)

    def tables(self, device: torch.device) -> list[Tensor]:
        """What operations read: [spans, sequences], and for Triton the tile tables after them."""
        key = (str(device), chosen(device) == "triton")
        if key not in self._tables:
            self._tables[key] = self._build(device)
        return self._tables[key]

    @cached_property
    def _tables(self) -> dict[tuple[str, bool], list[Tensor]]:
        return {}

    def _build(self, device: torch.device) -> list[Tensor]:
        out = [self.span_table, self.sequence_table]
        if chosen(device) == "triton":
            from fedsim_kernels.cuda.tiles import tile_tables

            out += tile_tables(self)
        if device.type == "cuda":
            # One transfer from pinned memory each; nothing later in the pass waits for the host.
            out = [t.pin_memory().to(device, non_blocking=True) for t in out]
        return out
