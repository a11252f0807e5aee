"""Tile tables: the work lists of the Triton kernels that walk ragged segments.

Built on the host once per pass from the segments; a kernel's grid is the length of its list, so
nothing asks the device for a size. Positions count from the start of a span or sequence, never
from the start of the pass, so a row's sums do not depend on what it is packed with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedsim_kernels.segments import Segments

ROWS = 64  # rows of a tile at most: one 64-row matrix instruction of sm_90
PIECE = 512  # rows of a gradient piece at most: 8 tiles in sequence, still 32 pieces in 16,384 rows


class Tiles(NamedTuple):
    """All int32, C-contiguous; what `Segments.tables` holds after spans and sequences.

    Attributes:
        rows: (n, 4) slot (-1: padding), first row, end row, rank (0: all) of a row tile.
        pieces: (n, 5) slot, first row, end row, rank, index of its partial sum, or -1 where the
            piece is its slot's only one and goes straight into the arena.
        ends: (p,) of each partial sum: 1 where it is the last of its span.
        sums: (n, 4) slot, first and end partial sum, rank of each slot of several pieces.
        sequences: (n, 4) sequence (-1: padding), first row, end row, position of the first row.
        begins: (B + 1,) where a sequence's list in `descendants` begins.
        descendants: (d,) sequences that see a sequence's keys, itself first, in packed order.
    """

    rows: Tensor
    pieces: Tensor
    ends: Tensor
    sums: Tensor
    sequences: Tensor
    begins: Tensor
    descendants: Tensor


def tile_tables(segments: Segments) -> list[Tensor]:
    """The tables of a pass, on the host, in the order of `Tiles`."""
    gaps = [(-1, a, b, 0) for a, b in _gaps(segments)]
    rows = [
        (slot, a, b, segments.rank(slot))
        for slot, start, end in segments.spans
        for a, b in _cut(start, end, ROWS)
    ]
    sequences = [
        (i, a, b, before + a - start)
        for i, (start, length, _, before) in enumerate(segments.sequence_table.tolist())
        for a, b in _cut(start, start + length, ROWS)
    ]
    below: list[list[int]] = [[] for _ in segments.lengths]
    for i in range(len(segments.lengths)):
        for ancestor in segments.chain(i):
            below[ancestor].append(i)
    begins = [0]
    for found in below:
        begins.append(begins[-1] + len(found))
    return list(
        Tiles(
            _table(rows + gaps, 4),
            *_pieces(segments),
            _table(sequences + gaps, 4),
            torch.tensor(begins, dtype=torch.int32),
            torch.tensor([i for found in below for i in found], dtype=torch.int32),
        )
    )


def _pieces(segments: Segments) -> tuple[Tensor, Tensor, Tensor]:
    """`pieces`, `ends` and `sums`; the spans of a slot are adjacent."""
    of_slot: dict[int, list[tuple[int, int, int]]] = {}
    for slot, start, end in segments.spans:
        cuts = [(a, b, int(b == end)) for a, b in _cut(start, end, PIECE)]
        of_slot.setdefault(slot, []).extend(cuts)
    pieces: list[tuple[int, ...]] = []
    sums: list[tuple[int, ...]] = []
    ends: list[int] = []
    for slot, cuts in of_slot.items():
        rank, first = segments.rank(slot), len(ends)
        if len(cuts) == 1:
            pieces.append((slot, *cuts[0][:2], rank, -1))
            continue
        for a, b, last in cuts:
            pieces.append((slot, a, b, rank, len(ends)))
            ends.append(last)
        sums.append((slot, first, len(ends), rank))
    return _table(pieces, 5), torch.tensor(ends, dtype=torch.int32), _table(sums, 4)


@cache
def column_parts(
    columns: tuple[int, ...], widths: tuple[int, ...], block: int, device: torch.device
) -> Tensor:
    """(n, 4) int32: module, first column, first row of B, number of columns of each part.

    The parts of a site's modules, `block` columns at most, or whole modules when it is 0. Kept
    for the process: a model has a handful of site shapes.
    """
    rows: list[tuple[int, ...]] = []
    first = 0
    for module, (column, width) in enumerate(zip(columns, widths, strict=True)):
        for a, b in _cut(0, width, block or width):
            rows.append((module, column + a, first + a, b - a))
        first += width
    return _table(rows, 4).to(device)


def _gaps(segments: Segments) -> Iterator[tuple[int, int]]:
    """(first, end) of tiles of rows that belong to nobody."""
    free = 0
    for first, end in [*(span[1:] for span in segments.spans), (segments.rows,) * 2]:
        yield from _cut(free, first, ROWS)
        free = end


def _cut(first: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(first, end, size):
        yield a, min(a + size, end)


def _table(rows: Sequence[tuple[int, ...]], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).view(-1, width)
