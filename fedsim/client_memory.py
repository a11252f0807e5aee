"""Rows that clients keep between visits, on disk: only those of clients that were visited.

One flat file a kind of row, `<name>.rows`, whose places hold P fp32 numbers each; which place is
whose is part of the checkpoint. A row that is written takes a place that the present checkpoint
does not refer to, so that a kill at any moment leaves it readable; nor does the one before it, as
long as it is of the same process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.checkpoint import write_failed
from fedsim.errors import CheckpointError

Places = dict[str, dict[int, int]]  # kind -> client -> place


class DiskMemory:
    """The client memory of one run.

    Args:
        folder: made when the first row is written.
        size: P.
        index: that of the checkpoint to go on from (`index`).
    """

    def __init__(self, folder: Path, size: int, index: Mapping[str, Tensor] | None = None) -> None:
        self._folder, self._size = folder, size
        self._now: Places = {}
        for name, table in (index or {}).items():
            self._now[name] = {int(client): int(place) for client, place in table.tolist()}
        self._before: Places = {k: dict(v) for k, v in self._now.items()}
        self._staged: Places = {}
        self._free: dict[str, list[int]] = {}  # the end of the file, then free places before it
        self._touched: set[str] = set()

    def read(self, name: str, client: int) -> Tensor | None:
        """(P,) fp32 as it was when the round began, or None before the client's first.

        Raises:
            CheckpointError: the file lacks the row.
        """
        place = self._now.get(name, {}).get(client)
        if place is None:
            return None
        count, path = self._size * 4, self._file(name)
        try:
            with path.open("rb") as stream:
                stream.seek(place * count)
                data = bytearray(stream.read(count))
        except OSError:
            data = bytearray()
        if len(data) != count:
            raise CheckpointError(
                f"{path} lacks the row of client {client}", expected="the file of this run",
                remedy="Start the run again with --fresh.",
            )  # fmt: skip
        return torch.frombuffer(data, dtype=torch.float32)

    def write(self, name: str, client: int, row: Tensor) -> None:
        """Keep a row (P,); `read` gives it from the next round on.

        Raises:
            RunError: the disk is full or not writable.
        """
        staged = self._staged.setdefault(name, {})
        if client not in staged:
            staged[client] = self._place(name)
        place = staged[client]
        path = self._file(name)
        values: np.ndarray = row.detach().float().cpu().contiguous().numpy()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "w+b") as stream:
                stream.seek(place * self._size * 4)
                stream.write(values.tobytes())
        except OSError as failure:
            raise write_failed(path, failure) from failure
        self._touched.add(name)

    def _place(self, name: str) -> int:
        """A place that no checkpoint refers to, and nobody in this round."""
        if name not in self._free:
            used = {p for part in (self._now, self._before) for p in part.get(name, {}).values()}
            end = max(used, default=-1) + 1
            self._free[name] = [end, *sorted({*range(end)} - used, reverse=True)]
        free = self._free[name]
        if len(free) > 1:
            return free.pop()
        free[0] += 1
        return free[0] - 1

    def of(self, clients: Sequence[int]) -> DiskMemory:
        """The same files, to read the rows of these clients in this round."""
        some = DiskMemory(self._folder.absolute(), self._size)
        some._now = {name: {int(c): places[int(c)] for c in clients if int(c) in places}
                     for name, places in self._now.items()}  # fmt: skip
        return some

    def clients(self, name: str) -> list[int]:
        """Those that have such a row, ascending."""
        return sorted(self._now.get(name, {}))

    def index(self) -> dict[str, Tensor]:
        """Kind -> (visited, 2) int64 client and place, for the checkpoint; the rows are on disk
        when this returns, and what was written can be read."""
        for name in sorted(self._touched):
            with self._file(name).open("rb") as stream:
                os.fsync(stream.fileno())
        self._touched.clear()
        self._before = self._now
        self._now = {
            name: {**self._now.get(name, {}), **self._staged.get(name, {})}
            for name in {**self._now, **self._staged}
        }
        self._staged, self._free = {}, {}
        return {
            name: torch.tensor(sorted(table.items()), dtype=torch.int64).reshape(-1, 2)
            for name, table in self._now.items()
        }

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.rows"
