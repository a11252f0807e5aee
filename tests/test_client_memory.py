"""Rows of visited clients: read as they were when the round began, and never lost to a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedsim.client_memory import DiskMemory
from fedsim.errors import CheckpointError, RunError

P = 37


def row(number: int) -> Tensor:
    return torch.randn(P, generator=torch.Generator().manual_seed(number))


def test_written_in_a_round_read_from_the_next(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path / "clients", P)
    assert memory.read("row", 3) is None and memory.clients("row") == []
    memory.write("row", 3, row(1))
    assert memory.read("row", 3) is None
    memory.index()
    memory.write("row", 3, row(2))
    memory.write("control", 3, row(3))
    got = memory.read("row", 3)
    assert got is not None and torch.equal(got, row(1)) and memory.read("control", 3) is None
    memory.index()
    for name, number in (("row", 2), ("control", 3)):
        got = memory.read(name, 3)
        assert got is not None and torch.equal(got, row(number)), name
    assert memory.clients("row") == memory.clients("control") == [3]


def test_written_twice_in_a_round(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, P)
    memory.write("row", 1, row(1))
    memory.write("row", 1, row(2))
    memory.index()
    got = memory.read("row", 1)
    assert got is not None and torch.equal(got, row(2))


def test_a_kill_after_any_write(tmp_path: Path) -> None:
    """Six rounds of some of five clients; before each commit a second process goes on from the
    last index, and finds every row as the last commit left it."""
    memory, index, want = DiskMemory(tmp_path, P), {}, {}
    for round in range(6):
        visited = {c: row(10 * round + c) for c in range(5) if (c + round) % 3}
        for client, value in visited.items():
            memory.write("row", client, value)
            killed = DiskMemory(tmp_path, P, index)
            assert killed.clients("row") == sorted(want)
            for known, kept in want.items():
                got = killed.read("row", known)
                assert got is not None and torch.equal(got, kept)
        index = memory.index()
        want |= visited
        if round % 2:
            memory = DiskMemory(tmp_path, P, index)
    assert (tmp_path / "row.rows").stat().st_size <= 15 * P * 4  # places are used again


def test_the_checkpoint_before_stays_readable(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, P)
    memory.write("row", 0, row(0))
    before = memory.index()
    memory.write("row", 0, row(1))
    now = memory.index()
    memory.write("row", 0, row(2))  # of a round that a kill ends
    for index, number in ((before, 0), (now, 1)):
        got = DiskMemory(tmp_path, P, index).read("row", 0)
        assert got is not None and torch.equal(got, row(number))


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    memory = DiskMemory(tmp_path, P)
    memory.write("row", 7, row(0))
    index = memory.index()
    with (tmp_path / "row.rows").open("r+b") as stream:
        stream.truncate(P * 4 - 1)
    with pytest.raises(CheckpointError, match=r"lacks the row of client 7.*--fresh"):
        DiskMemory(tmp_path, P, index).read("row", 7)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"row\.rows cannot be written"):
        DiskMemory(tmp_path / "file", P).write("row", 0, row(0))
