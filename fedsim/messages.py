"""What processes send each other in a round: an order to all, and rows to the leader."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from queue import Queue
from threading import Thread

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedsim.client_memory import DiskMemory
from fedsim.core import ClientUpdates, LocalRule, RoundPlan
from fedsim.errors import RunError
from fedsim.model import Base


@dataclass(frozen=True)
class Order:
    """What a process needs for its part of a round; all on the CPU."""

    plan: RoundPlan
    owner: np.ndarray  # (M,) int64, the process of each client
    rule: LocalRule
    base: Mapping[str, Tensor] | None  # None: as it was
    memory: DiskMemory | None


def part(order: Order, process: int) -> RoundPlan:
    """The plan with what one process has of every lane."""
    lanes = (lane[order.owner[lane] == process] for lane in order.plan.lanes)
    return replace(order.plan, lanes=tuple(lane for lane in lanes if len(lane)))


def header(update: ClientUpdates) -> Tensor:
    """(6,) fp64: position, tokens, losses, ok, seconds; integers below 2^53 are exact."""
    of = (update.index, update.tokens, update.loss_first, update.loss_last, update.ok)
    return torch.tensor([*(float(v[0]) for v in of), update.seconds], dtype=torch.float64)


def unpacked(head: Tensor, row: Tensor, start: Tensor) -> ClientUpdates:
    index, tokens, first, last, ok, seconds = (np.array([v]) for v in head.tolist())
    return ClientUpdates(
        index=index.astype(np.int64), row=row, start=start, tokens=tokens.astype(np.int64),
        loss_first=first, loss_last=last, ok=ok != 0, seconds=float(seconds[0]),
    )  # fmt: skip


class Inbox:
    """What one follower sends in a round, taken in by a thread of its own.

    Args:
        most: rows that may lie here; then the follower waits.
    """

    def __init__(self, process: int, order: Order, most: int, base: Base) -> None:
        self._process, self._order = process, order
        # Over a sharded base nothing may wait for a GPU that waits for the other process.
        self._pinned = base.device.type == "cuda" and base.shards is None
        self._numbers = base.layout.size
        lanes = part(order, process).lanes
        self._left = deque(map(int, chain.from_iterable(lanes)))
        self._queue: Queue[tuple[Tensor, Tensor] | None] = Queue(most)
        self._failure: RuntimeError | None = None
        self.failed = math.inf  # when, by the monotonic clock
        Thread(target=self._receive, daemon=True).start()

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    def take(self) -> tuple[Tensor, Tensor]:
        """The next head and row; waits for them. Raises RunError where the process is gone."""
        found = self._queue.get()
        if found is None:
            self.check()
        assert found is not None
        if self._left:
            self._left.popleft()
        return found

    def check(self) -> None:
        """Raises RunError where the process is gone."""
        if self._failure is None:
            return
        plan, left = self._order.plan, list(self._left)
        clients = ", ".join(str(plan.client_ids[i]) for i in left[:8])
        raise RunError(
            f"round {plan.round}: process {self._process} is gone, with "
            + (f"clients {clients}{' ...' * (len(left) > 8)} to go" if left else "none to go"),
            remedy="Its own message may stand above. Finished rounds are on disk: go on with "
            "--resume, on any number of processes.",
        ) from self._failure

    def _receive(self) -> None:
        try:
            while True:
                head = torch.empty(6, dtype=torch.float64)
                dist.recv(head, self._process)
                # Pinned, so that the leader's copy to its GPU waits for nothing.
                numbers = self._numbers if head[0] >= 0 else 0
                row = torch.empty(numbers, pin_memory=self._pinned)
                if numbers:
                    dist.recv(row, self._process)
                self._queue.put((head, row))
                if not numbers:
                    return
        except RuntimeError as failure:
            self._failure, self.failed = failure, time.monotonic()
            self._queue.put(None)
