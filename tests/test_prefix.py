"""Shared prefixes: the tree of a client's sequences holds every token once where it is shared, and
never less than each sequence.

Against brute force over random vocabularies of two tokens, where sequences share a lot.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import prefix
from fedsim.prefix import common, rows_of, tree

ROWS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=1, max_size=9)


@settings(max_examples=300, deadline=None)
@given(ROWS, st.data())
def test_tree_rebuilds_every_sequence(values: list[list[int]], data: st.DataObject) -> None:
    rows = [np.array(v) for v in values]
    limits = [data.draw(st.integers(0, len(r) - 1)) for r in rows]
    members = sorted(data.draw(st.sets(st.sampled_from(range(len(rows))), min_size=1)))
    shared = common(rows, limits)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            n = 0
            while n < min(limits[i], limits[j]) and a[n] == b[n]:
                n += 1
            assert i == j or shared[i, j] == n
    branches = tree(shared, np.array([len(r) for r in rows]), members)
    leaves = []
    for at, branch in enumerate(branches):
        assert branch.parent < at and branch.begin < branch.end
        if not branch.leaf:
            assert branch.end - branch.begin >= prefix.LEAST
            children = [b for b in branches if b.parent == at]
            assert len(children) >= 2 and all(b.begin == branch.end for b in children)
            assert branch.end <= min(limits[b.sequence] for b in children)
            continue
        tokens, node = [], branch
        while True:
            tokens = rows[node.sequence][node.begin : node.end].tolist() + tokens
            if node.parent < 0:
                break
            node = branches[node.parent]
        assert node.begin == 0 and tokens == values[branch.sequence]
        leaves.append(branch.sequence)
    assert sorted(leaves) == members


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_tree_shares_everything_when_every_node_is_worth_it(values: list[list[int]]) -> None:
    """With nodes of any length, the rows are those of a trie: one for each distinct prefix below
    the limits, and each sequence's own tokens beyond."""
    least, prefix.LEAST = prefix.LEAST, 1
    try:
        rows = [np.array(v) for v in values]
        limits = [len(r) - 1 for r in rows]
        got = rows_of(
            tree(common(rows, limits), np.array([len(r) for r in rows]), range(len(rows)))
        )
    finally:
        prefix.LEAST = least
    distinct = {tuple(v[: n + 1]) for v in values for n in range(len(v) - 1)}
    assert got == len(distinct) + len(values)


def test_instructions_within_a_template() -> None:
    """A template of 20, two instructions of 10, inputs of 5: 20 + 2 x 10 + 4 x 5 rows of 140."""
    made = []
    for own in range(300, 340, 10):
        instruction = 100 if own < 320 else 150
        spans = (range(20), range(instruction, instruction + 10), range(own, own + 5))
        made.append(np.concatenate([np.arange(s.start, s.stop) for s in spans]))
    branches = tree(common(made, [32] * 4), np.full(4, 35), range(4))
    assert rows_of(branches) == 20 + 2 * 10 + 4 * 5
    assert [(b.begin, b.end, b.parent, b.leaf) for b in branches] == [
        (0, 20, -1, False), (20, 30, 0, False), (30, 35, 1, True), (30, 35, 1, True),
        (20, 30, 0, False), (30, 35, 4, True), (30, 35, 4, True),
    ]  # fmt: skip
