"""Segments: what operations read of a packing, and what cannot be packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedsim_kernels.segments import Segments


def test_end_to_end() -> None:
    segments = Segments.build([2, 3, 1, 4], [5, 5, 0, 0], [-1, 0, -1, -1])
    assert (segments.tokens, segments.rows) == (10, 10)
    assert segments.starts == (0, 2, 5, 6)
    assert segments.spans == ((5, 0, 5), (0, 5, 10))
    assert segments.span_table.tolist() == [[5, 0, 5, 0], [0, 5, 10, 0]]
    assert segments.sequence_table.tolist() == [
        [0, 2, -1, 0], [2, 3, 0, 2], [5, 1, -1, 0], [6, 4, -1, 0]
    ]  # fmt: skip


def test_chains_of_parents() -> None:
    segments = Segments.build([6, 4, 3, 2], [0] * 4, [-1, 0, 1, 0])
    assert [segments.chain(i) for i in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 3]]
    assert segments.sequence_table[:, 3].tolist() == [0, 6, 10, 6]


def test_chunks_padding_and_ranks() -> None:
    """Two chunks of slot 0, one of slot 2; each starts at a multiple of 8 rows."""
    segments = Segments.build(
        [5, 3, 7, 2], [0, 0, 0, 2], starts=[0, 5, 8, 16], chunks=[0, 0, 1, 0], ranks=[4, 8, 2],
        rows=24,
    )  # fmt: skip
    assert (segments.tokens, segments.rows) == (17, 24)
    assert segments.spans == ((0, 0, 8), (0, 8, 15), (2, 16, 18))
    assert segments.span_table.tolist() == [[0, 0, 8, 4], [0, 8, 15, 4], [2, 16, 18, 2]]
    assert segments.sequence_table[:, :2].tolist() == [[0, 5], [5, 3], [8, 7], [16, 2]]


def test_tables_are_made_once() -> None:
    segments, cpu = Segments.build([2, 3], [0, 1]), torch.device("cpu")
    tables = segments.tables(cpu)
    assert segments.tables(cpu) is tables and len(tables) == 2
    assert all(t.dtype == torch.int32 and t.shape[1] == 4 for t in tables)


@pytest.mark.parametrize(
    ("arguments", "placed", "message"),
    [
        (([1, 2], [0]), {}, "2 lengths, 1 slots, 2 parents; expected equal counts"),
        (([1], [0], [-1, -1]), {}, "1 lengths, 1 slots, 2 parents"),
        (([1.5], [0]), {}, r"got lengths \[1.5\]; expected whole numbers"),
        (([2, 0], [0, 1]), {}, "sequence 1: got length 0; expected >= 1"),
        (([2, -3], [0, 1]), {}, "sequence 1: got length -3"),
        (([2], [-1]), {}, "sequence 0: got slot -1, parent -1; expected >= 0"),
        (([2], [0], [-2]), {}, "sequence 0: got slot 0, parent -2; expected .* >= -1"),
        (([1, 1, 1], [0, 1, 0]), {}, "sequence 2: slot 0 appears in two places"),
        (([1, 1], [0, 0], [-1, 1]), {}, "sequence 1: got parent 1; expected an earlier sequence"),
        (([1, 1], [0, 0], [1, -1]), {}, "sequence 0: got parent 1"),
        (([1, 1], [0, 1], [-1, 0]), {}, "sequence 1: got parent 0; .* of slot 1"),
        (([1, 1], [0, 0], [-1, 0]), {"chunks": [0, 1]}, "sequence 1: got parent 0; .* same chunk"),
        (([1, 1, 1], [0, 0, 0]), {"chunks": [0, 1, 0]}, "sequence 2: chunk 0 appears in two"),
        (([3, 1], [0, 1]), {"starts": [0, 2]}, "sequence 1: got first row 2; expected 3, or more"),
        (([3, 1], [0, 0]), {"starts": [0, 4]}, "sequence 1: got first row 4; expected 3, or more"),
        (([3, 1], [0, 1]), {"starts": [-1, 4]}, "sequence 0: got first row -1; expected 0"),
        (([3, 1], [0, 1]), {"rows": 3}, "got 3 rows; expected at least 4"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], placed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.build(*arguments, **placed)
