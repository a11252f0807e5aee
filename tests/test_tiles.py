"""Tile tables, the work lists of the Triton kernels, against the segments.

Proved here: tiles hold every row once, padding included, and cross no span; positions and
descendants follow the chains of parents; gradient pieces follow the spans in order, and their
partial sums end where spans do. A second.
"""

from __future__ import annotations

import pytest
import torch

from fedsim_kernels.cuda.tiles import PIECE, ROWS, Tiles, column_parts, tile_tables
from fedsim_kernels.spec import CASES, Case

LONG = Case("long", (1100, 3, 520, 64), (0, 0, 2, 2), (-1, 0, -1, 2), starts=(0, 1100, 1152, 1672),
            chunks=(0, 0, 1, 1), total=1800, ranks=(4, 4, 2))  # fmt: skip
NAMES = ("one-token", "slots-in-any-order", "tile-edges", "chunks-with-prefix", "prefix-chain")
PACKINGS = [*(c for c in CASES if c.name in NAMES), LONG]
each_packing = pytest.mark.parametrize("case", PACKINGS, ids=lambda c: c.name)


@each_packing
def test_tiles_hold_every_row_once(case: Case) -> None:
    segments = case.segments
    work = Tiles(*tile_tables(segments))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in work)
    slot, sequence = torch.full((2, case.rows), -2)
    position = torch.zeros(case.rows, dtype=torch.int64)
    for s, a, b, rank in work.rows.tolist():
        assert 0 < b - a <= ROWS and (slot[a:b] == -2).all()
        assert rank == (segments.rank(s) if s >= 0 else 0)
        slot[a:b] = s
    for i, a, b, at in work.sequences.tolist():
        assert 0 < b - a <= ROWS and (sequence[a:b] == -2).all()
        sequence[a:b], position[a:b] = i, torch.arange(at, at + b - a)
    assert torch.equal(slot, case.slot_of_row())
    for i, n in enumerate(case.lengths):
        before = sum(case.lengths[j] for j in segments.chain(i)[:-1])
        rows = slice(segments.starts[i], segments.starts[i] + n)
        assert (sequence[rows] == i).all()
        assert torch.equal(position[rows], torch.arange(before, before + n))
        seen_by = work.descendants[work.begins[i] : work.begins[i + 1]].tolist()
        everyone = range(len(case.lengths))
        assert seen_by == [j for j in everyone if i in segments.chain(j)]
    assert ((sequence < 0) == (slot < 0)).all()


@each_packing
def test_pieces_follow_the_spans(case: Case) -> None:
    """Cut every 512 rows of a span, in order; partial sums end where spans do."""
    segments = case.segments
    work = Tiles(*tile_tables(segments))
    pieces = work.pieces.tolist()
    wanted = [
        (s, a, min(a + PIECE, end))
        for s, start, end in segments.spans
        for a in range(start, end, PIECE)
    ]
    assert [tuple(p[:3]) for p in pieces] == wanted
    ends = {end for _, _, end in segments.spans}
    partial = [p for p in pieces if p[4] >= 0]
    assert [p[4] for p in partial] == list(range(len(work.ends)))
    assert work.ends.tolist() == [int(p[2] in ends) for p in partial]
    summed = {s: (first, end) for s, first, end, _ in work.sums.tolist()}
    for s in {p[0] for p in pieces}:
        mine = [p[4] for p in pieces if p[0] == s]
        if len(mine) == 1:
            assert mine == [-1] and s not in summed
        else:
            assert mine == list(range(*summed[s]))


def test_parts_of_modules() -> None:
    cpu = torch.device("cpu")
    blocks, whole = (column_parts((10, 0), (70, 5), block, cpu).tolist() for block in (64, 0))
    assert blocks == [[0, 10, 0, 64], [0, 74, 64, 6], [1, 0, 70, 5]]
    assert whole == [[0, 10, 0, 70], [1, 0, 70, 5]]
