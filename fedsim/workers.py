"""Several processes train the clients of a round: one leads, the others follow.

Each holds the base and trains its share of every lane. The leader runs the simulation; a round's
order - plan, rule, what has joined the base - goes out to all, and the rows come back in the plan's
order, so that the server meets the same updates in the same order whatever the number of
processes. Inside a round clients need nothing of each other, and nothing else is sent. gloo carries
all of it, also between GPUs: a row is small beside the visit that made it.

An error ends all processes. Those on other machines must see the run's folder, where clients' rows
lie.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from queue import Queue
from threading import Thread
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedsim import seeds
from fedsim.client_memory import DiskMemory
from fedsim.config import Config
from fedsim.core import ClientUpdates, LocalRule, RoundPlan
from fedsim.errors import RunError
from fedsim.launch import join, rank, size
from fedsim.local_terms import Starts
from fedsim.model import Base
from fedsim.placement import placed, predicted
from fedsim.plan import WAITING
from fedsim.record import Meter
from fedsim.train import Trainer

_inboxes: list[Inbox] = []  # of the round


@dataclass(frozen=True)
class Order:
    """What a process needs for its part of a round; all on the CPU."""

    plan: RoundPlan
    owner: np.ndarray  # (M,) int64, the process of each client
    rule: LocalRule
    base: Mapping[str, Tensor] | None  # None: as it was
    memory: DiskMemory | None


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """gloo reports a lost peer as a RuntimeError among others."""
    try:
        yield
    except RuntimeError as failure:
        raise RunError(what, remedy="Go on with --resume, on any number of processes.") from failure


def part(order: Order, process: int) -> RoundPlan:
    """The plan with what one process has of every lane."""
    lanes = (lane[order.owner[lane] == process] for lane in order.plan.lanes)
    return replace(order.plan, lanes=tuple(lane for lane in lanes if len(lane)))


@contextmanager
def leading() -> Iterator[None]:
    """Inside, `team` may take the other processes on; at the end they are sent home."""

    def stopped(signum: int, frame: FrameType | None) -> None:
        time.sleep(1)  # the connection may break after the launcher has seen the process end
        for inbox in sorted(_inboxes, key=lambda inbox: inbox.failed):  # others follow the first
            inbox.check()
        sys.exit(128 + signum)

    if size() == 1:
        yield
        return
    # A launcher that has lost a process ends the others so; this one says whom and what it lost.
    before = signal.signal(signal.SIGTERM, stopped)
    try:
        yield
        with suppress(RuntimeError):  # whoever is gone by now need not be sent home
            dist.broadcast_object_list([None], src=0)
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends, and with its own status
        raise
    signal.signal(signal.SIGTERM, before)


def team(trainer: Trainer) -> Trainer | Leader:
    """Who trains: the trainer alone, or with the processes that wait for it to have loaded."""
    if size() == 1:
        return trainer
    join()
    dist.barrier()  # what loading leaves in the caches is whole now
    return Leader(trainer)


class Leader:
    """Trains as `Trainer` does, with all processes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._most = WAITING * trainer.bank.slots
        self._base: Mapping[str, Tensor] | None = None  # what the others have

    def train(
        self, plan: RoundPlan, rule: LocalRule, meter: Meter, memory: DiskMemory | None = None
    ) -> Iterator[ClientUpdates]:
        """Every client of the plan, in the plan's order, one update each.

        Raises:
            RunError: a process is gone.
        """
        trainer, base = self._trainer, self._trainer.base.correction.base
        news = None if base is self._base else {k: v.cpu() for k, v in base.items()}
        batch = trainer.config.train.batch
        owner = placed(predicted(plan, trainer.population, trainer.store, batch), size())
        needs = rule.personal or rule.control
        keeps = memory.of(plan.client_ids.tolist()) if memory and needs else None
        order = Order(plan, owner, _on_cpu(rule), news, keeps)
        with _talking(f"round {plan.round}: a process was gone when the round began"):
            dist.broadcast_object_list([order], src=0)
        self._base = base
        _inboxes[:] = [Inbox(process, order, self._most, trainer.base)
                       for process in range(1, size())]  # fmt: skip
        own = trainer.train(part(order, 0), rule, meter, memory)
        starts = Starts(rule, plan, trainer.bank, trainer.config, memory)
        yield from self._in_order(order, own, starts, meter)
        next(own, None)  # the last pass is over, too
        for inbox in _inboxes:
            passes, rows, room = inbox.take()[0][1:4].tolist()
            meter.passes, meter.rows = meter.passes + int(passes), meter.rows + int(rows)
            meter.room += int(room)
        _inboxes.clear()

    def _in_order(
        self, order: Order, own: Iterator[ClientUpdates], starts: Starts, meter: Meter
    ) -> Iterator[ClientUpdates]:
        """While another's client is awaited, the leader trains its own."""
        mine: deque[ClientUpdates] = deque()
        device = self._trainer.base.device
        for index in map(int, np.concatenate(order.plan.lanes)):
            if not order.owner[index]:
                yield mine.popleft() if mine else next(own)
                continue
            inbox = _inboxes[order.owner[index] - 1]
            while inbox.empty and len(mine) < self._most and (more := next(own, None)):
                mine.append(more)
            head, row = inbox.take()
            meter.took(tokens=int(head[1]), steps=int(order.plan.steps[index]))
            yield _update(head, row.to(device, non_blocking=True)[None], starts.of(index))


class Inbox:
    """What one follower sends in a round, taken in by a thread of its own.

    Args:
        most: rows that may lie here; then the follower waits.
    """

    def __init__(self, process: int, order: Order, most: int, base: Base) -> None:
        self._process, self._order = process, order
        self._numbers, self._pinned = base.layout.size, base.device.type == "cuda"
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


def _update(head: Tensor, row: Tensor, start: Tensor) -> ClientUpdates:
    index, tokens, first, last, ok, seconds = (np.array([v]) for v in head.tolist())
    return ClientUpdates(
        index=index.astype(np.int64), row=row, start=start, tokens=tokens.astype(np.int64),
        loss_first=first, loss_last=last, ok=ok != 0, seconds=float(seconds[0]),
    )  # fmt: skip


def _on_cpu(rule: LocalRule) -> LocalRule:
    """The same rule, to be sent."""
    correction = None if rule.correction is None else rule.correction.cpu()
    return replace(rule, start=rule.start.cpu(), correction=correction)


def follow(config: Config) -> Path:
    """Train what the leader orders, until it has no more; returns the run's folder.

    Raises:
        RunError: the leader is gone.
    """
    from fedsim.world import load_world

    gone = "the leading process is gone"
    with _talking(gone):
        join()
        dist.barrier()  # the leader has loaded, and left it in the caches
    key = seeds.run_key(config.run.seed)
    silent = config.evaluate.model_copy(update={"limit": 0})
    world = load_world(config.model_copy(update={"evaluate": silent}), key)
    trainer = Trainer(world.base, world.data.store, world.data.population, config, key, host=True)
    box: list[Order | None] = [None]
    while True:
        with _talking(gone):
            dist.broadcast_object_list(box, src=0)
        if (order := box[0]) is None:
            return Path(config.run.out) / config.run.name
        if order.base is not None:
            there = {k: v.to(world.base.device) for k, v in order.base.items()}
            world.base.correction.apply(there)
        meter = Meter()
        for update in trainer.train(part(order, rank()), order.rule, meter, order.memory):
            with _talking(gone):
                dist.send(_head(update), 0)
                dist.send(update.row[0], 0)
        end = [-1, meter.passes, meter.rows, meter.room, 0, 0]
        with _talking(gone):
            dist.send(torch.tensor(end, dtype=torch.float64), 0)


def _head(update: ClientUpdates) -> Tensor:
    """(6,) fp64: position, tokens, losses, ok, seconds; integers below 2^53 are exact."""
    of = (update.index, update.tokens, update.loss_first, update.loss_last, update.ok)
    return torch.tensor([*(float(v[0]) for v in of), update.seconds], dtype=torch.float64)
