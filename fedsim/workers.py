"""Several processes train the clients of a round: one leads, the others follow.

Each holds the base, or a part of it (`sharded.py`), and trains its share of every lane. The leader
runs the simulation; a round's order - plan, rule, what has joined the base - goes out to all, and
the rows come back in the plan's order, so that the server meets the same updates in the same order
whatever the number of processes. Inside a round clients need nothing of each other, and nothing
else is sent but the weights of a sharded base. gloo carries all the rest, also between GPUs: a row
is small beside the visit that made it.

An error ends all processes. Those on other machines must see the run's folder, where clients' rows
lie.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedsim import rehearsal, seeds, strategies
from fedsim.client_memory import DiskMemory
from fedsim.config import Config
from fedsim.core import ClientUpdates, LocalRule, RoundPlan
from fedsim.errors import RunError
from fedsim.launch import meet, rank, size
from fedsim.local_terms import Starts
from fedsim.messages import Inbox, Order, header, part, unpacked
from fedsim.placement import placed, predicted
from fedsim.plan import WAITING
from fedsim.record import Meter
from fedsim.train import Trainer

_inboxes: list[Inbox] = []  # of the round


@contextmanager
def _talking(what: str) -> Iterator[None]:
    """gloo reports a lost peer as a RuntimeError among others."""
    try:
        yield
    except RuntimeError as failure:
        raise RunError(what, remedy="Go on with --resume, on any number of processes.") from failure


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
    """Who trains: the trainer alone, or with the other processes."""
    return trainer if size() == 1 else Leader(trainer)


class Leader:
    """Trains as `Trainer` does, with all processes."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self._shards = trainer, trainer.base.shards
        # Over a sharded base all processes make their passes together, so none may wait.
        self._most = sys.maxsize if self._shards else WAITING * trainer.bank.slots
        if self._shards:
            self._shards.asking = True
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
            passes = _passes(trainer, part(order, 0))
        self._base = base
        _inboxes[:] = [Inbox(process, order, self._most, trainer.base)
                       for process in range(1, size())]  # fmt: skip
        own = self._own(trainer.train(part(order, 0), rule, meter, memory, passes))
        starts = Starts(rule, plan, trainer.bank, trainer.config, memory)
        yield from self._in_order(order, own, starts, meter)
        next(own, None)  # the last pass is over, too
        for inbox in _inboxes:
            passes, rows, room = inbox.take()[0][1:4].tolist()
            meter.passes, meter.rows = meter.passes + int(passes), meter.rows + int(rows)
            meter.room += int(room)
        _inboxes.clear()

    def _own(self, trained: Iterator[ClientUpdates]) -> Iterator[ClientUpdates]:
        """The leader's own clients; while they train, the others gather shards by themselves."""
        if self._shards:
            self._shards.asking = False
        try:
            yield from trained
        except RunError:  # the connection may break before a thread has seen which one is gone
            time.sleep(1)
            for inbox in _inboxes:
                inbox.check()
            raise
        if self._shards:
            self._shards.asking = True

    def _in_order(
        self, order: Order, own: Iterator[ClientUpdates], starts: Starts, meter: Meter
    ) -> Iterator[ClientUpdates]:
        """While another's client is awaited, the leader trains its own."""
        mine: deque[ClientUpdates] = deque()
        device = self._trainer.base.device
        for index in map(int, np.concatenate(order.plan.lanes)):
            if not order.owner[index]:
                done = mine.popleft() if mine else next(own)
                yield replace(done, row=done.row.to(device, non_blocking=True))
                continue
            inbox = _inboxes[order.owner[index] - 1]
            while inbox.empty and len(mine) < self._most and (more := next(own, None)):
                mine.append(more)
            head, row = inbox.take()
            meter.took(tokens=int(head[1]), steps=int(order.plan.steps[index]))
            yield unpacked(head, row.to(device, non_blocking=True)[None], starts.of(index))


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
        shard = meet()
    key = seeds.run_key(config.run.seed)
    silent = config.evaluate.model_copy(update={"limit": 0})
    world = load_world(config.model_copy(update={"evaluate": silent}), key, shard)
    rule = strategies.load(config.server.strategy, config.server.options)
    rows = rehearsal.rows_kept(rule, config.most_clients)
    store, people = world.data.store, world.data.population
    trainer = Trainer(world.base, store, people, config, key, host=True, rows=rows)
    said: set[str] = set()
    box: list[Order | int | None] = [None]
    while True:
        with _talking(gone):
            dist.broadcast_object_list(box, src=0)
        if (order := box[0]) is None:
            return Path(config.run.out) / config.run.name
        if isinstance(order, int):
            assert world.base.shards is not None
            world.base.shards.lend(order)
            continue
        if order.base is not None:
            there = {k: v.to(world.base.device) for k, v in order.base.items()}
            world.base.correction.apply(there)
        meter, mine = Meter(), part(order, rank())
        with _talking(gone):
            passes = _passes(trainer, mine)
        for update in trainer.train(mine, order.rule, meter, order.memory, passes):
            with _talking(gone):
                dist.send(header(update), 0)
                dist.send(update.row[0], 0)
        for note in set(meter.notes) - said:
            said.add(note)
            print(f"process {rank()}: {note}", file=sys.stderr)
        end = [-1, meter.passes, meter.rows, meter.room, 0, 0]
        with _talking(gone):
            dist.send(torch.tensor(end, dtype=torch.float64), 0)


def _passes(trainer: Trainer, plan: RoundPlan) -> int:
    """How many each process makes, together with the others over a sharded base; else 0."""
    if trainer.base.shards is None:
        return 0
    most = torch.tensor(trainer.passes(plan))
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)
