"""Segments: which packed rows belong to which sequence and which slot.

Built once per pass from host integers and shared by every layer, so that no operation has to
ask the device for a length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segments:
    """B sequences packed end to end; those of a slot are adjacent.

    Attributes:
        lengths: tokens of each sequence, each >= 1.
        slots: adapter slot of each sequence.
        parents: index of the earlier sequence whose tokens a sequence also sees before its own
            (a shared prefix; chains are followed), or -1. A parent lies in the same slot.
    """

    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    parents: tuple[int, ...]

    @classmethod
    def build(
        cls, lengths: Sequence[int], slots: Sequence[int], parents: Sequence[int] | None = None
    ) -> Segments:
        """Check and freeze. Raises ValueError naming the sequence that is at fault."""
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
        seen: set[int] = set()
        for i, (n, s, p) in enumerate(zip(lengths, slots, parents, strict=True)):
            if n < 1:
                raise ValueError(f"sequence {i}: got length {n}; expected >= 1. Leave it out.")
            if s < 0 or p < -1:
                raise ValueError(
                    f"sequence {i}: got slot {s}, parent {p}; expected slot >= 0, parent >= -1."
                )
            if s in seen and slots[i - 1] != s:
                raise ValueError(
                    f"sequence {i}: slot {s} appears in two places; expected the sequences of a "
                    "slot to be adjacent. Sort by slot before packing."
                )
            if p >= 0 and (p >= i or slots[p] != s):
                raise ValueError(
                    f"sequence {i}: got parent {p}; expected an earlier sequence of slot {s}."
                )
            seen.add(s)
        return cls(lengths, slots, parents)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(slot, first row, end row) of every slot in the pass, in packed order."""
        out: list[tuple[int, int, int]] = []
        row = 0
        for n, s in zip(self.lengths, self.slots, strict=True):
            if out and out[-1][0] == s:
                out[-1] = (s, out[-1][1], row + n)
            else:
                out.append((s, row, row + n))
            row += n
        return tuple(out)

    def chain(self, i: int) -> list[int]:
        """The ancestors of sequence i, oldest first, then i itself."""
        out = [i]
        while (i := self.parents[i]) >= 0:
            out.insert(0, i)
        return out
