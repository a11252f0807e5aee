"""Shared prefixes: tokens that sequences of one client begin with are computed once.

A prompt is a template, an instruction and an input; sequences that share all of the first and some
of the second form a tree. Each node is a packed sequence whose parent is the node before it. Exact:
rows attend to the same keys at the same positions, and labels never lie in a shared node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 8  # tokens; a shorter shared node costs more bookkeeping than it saves


@dataclass(frozen=True)
class Branch:
    """Tokens begin..end of one sequence, as a node of the tree."""

    sequence: int  # whose tokens these are
    begin: int
    end: int
    parent: int  # index of the branch before it, or -1
    leaf: bool  # the sequence ends here


def common_prefix(rows: Sequence[np.ndarray], limit: int) -> int:
    """Number of leading tokens, at most `limit`, that all rows share."""
    first = rows[0][:limit]
    n = len(first)
    for row in rows[1:]:
        differs = np.flatnonzero(first[:n] != row[:n])
        n = int(differs[0]) if len(differs) else n
    return n


def common(rows: Sequence[np.ndarray], limits: Sequence[int]) -> np.ndarray:
    """(n, n) number of leading tokens that two rows share, at most the limit of each."""
    n, width = len(rows), max(max(limits), 1)
    table = np.full((n, width), -1, dtype=np.int64)
    for i, (row, limit) in enumerate(zip(rows, limits, strict=True)):
        table[i, :limit] = row[:limit]
        table[i, limit:] = -2 - i  # equal to nobody's
    shared = np.empty((n, n), dtype=np.int64)
    for i in range(n):  # row by row: n x n x width at once would be gigabytes for a large batch
        differs = table != table[i]
        shared[i] = np.where(differs.any(1), differs.argmax(1), width)
    most = np.array(limits)
    capped: np.ndarray = np.minimum(shared, np.minimum.outer(most, most))
    return capped


def tree(shared: np.ndarray, lengths: np.ndarray, members: Sequence[int]) -> list[Branch]:
    """The tree of some sequences, parents first.

    Args:
        shared: (n, n) of `common`.
        lengths: (n,) of all sequences.
        members: those that are in the tree, ascending.
    """
    out: list[Branch] = []
    todo = [(list(members), 0, -1)]
    while todo:
        group, at, parent = todo.pop()
        first = group[0]
        if len(group) == 1:
            out.append(Branch(first, at, int(lengths[first]), parent, leaf=True))
            continue
        with_first = shared[first, group[1:]]
        end = int(with_first.min())
        if end - at >= LEAST:
            out.append(Branch(first, at, end, parent, leaf=False))
            at, parent = end, len(out) - 1
        # `shared` is an ultrametric: who shares more than `end` with one shares it with all.
        rest, groups = group, []
        while rest:
            alike = [m for m in rest if m == rest[0] or shared[rest[0], m] > end]
            groups.append((alike, at, parent))
            rest = [m for m in rest if m not in alike]
        todo += reversed(groups)
    return out


def rows_of(branches: Sequence[Branch]) -> int:
    """Packed rows of a tree."""
    return sum(b.end - b.begin for b in branches)
