"""Plans: who trains in a round, on which examples, and which passes their steps share."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.config import Config
from fedsim.core import Population, RoundPlan
from fedsim.dp_sgd import drawn
from fedsim.schedule import Schedule

WAITING = 4  # finished clients for each slot that may wait for one that comes before them


def pass_budget(config: Config, device: torch.device) -> int:
    """Most packed tokens in one pass: `train.budget_tokens`, or what suits the device.

    A GPU wants many tokens to fill it. A CPU wants activations that stay in its cache: a step of
    6,800 tokens (SmolLM2-135M, 2 cores) took 16 to 21 s in one pass, 12.5 to 13.5 s in four.
    """
    fitting = 16384 if device.type == "cuda" else 2048
    return config.train.budget_tokens or max(fitting, config.largest_chunk)


def cosine_lr(round: int, rounds: int, lr_max: float, lr_min: float) -> float:
    """lr_min + (lr_max - lr_min) (1 + cos(pi round / rounds)) / 2, for round 1..rounds."""
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * round / rounds))


def sampled(
    config: Config, clients: int, round: int, key: int, pruned: Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The clients of a round and their ranks: (M,) int64 each.

    So many are drawn without replacement; under privacy of clients each takes part by itself, with
    the probability `server.fraction`, so that a round may have any number of them.

    A client keeps its rank in all rounds, one of `adapter.ranks`, each as probable as it is
    frequent there, until a rule has lowered it: `pruned` (N,), 0 where none has. Clients are
    ordered by rank, up to the next power of two, then by number.
    """
    if config.privacy.of_clients:
        words = seeds.first_words(key, seeds.Purpose.SAMPLING, np.arange(clients), round)
        ids = np.flatnonzero(words < int(config.server.fraction * 2**32)).astype(np.int64)
    else:
        order = seeds.permutation(key, seeds.Purpose.SAMPLING, clients, round=round)
        ids = np.sort(order[: config.per_round]).astype(np.int64)
    ranks = np.array(config.adapter.ranks or [config.adapter.rank])
    words = seeds.first_words(key, seeds.Purpose.RANK, ids)
    rank = ranks[words * len(ranks) >> 32]
    if pruned is not None:
        lower = pruned.cpu().numpy()[ids]
        rank = np.where(lower > 0, lower, rank)
    order = np.argsort(_bucket(rank), kind="stable")
    return ids[order], rank[order]


def _bucket(rank: np.ndarray) -> np.ndarray:
    """ceil(log2(rank)): clients of one bucket share passes, so none pays for a far larger rank."""
    return np.array([(int(r) - 1).bit_length() for r in rank])


def plan_round(
    config: Config, population: Population, round: int, key: int, pruned: Tensor | None = None
) -> RoundPlan:
    """Sample the round's clients and write down their work; a lane for each bucket of ranks.

    Args:
        pruned: (N,) int64 ranks that a rule has lowered, 0 elsewhere (`ServerState.memory`).
    """
    ids, rank = sampled(config, len(population), round, key, pruned)
    m, train = len(ids), config.train
    lr = cosine_lr(round, config.server.rounds, train.lr_max, train.lr_min)
    return RoundPlan(
        round=round,
        client_ids=ids,
        # A client that weighs more than others could change more than the clip.
        weights=np.ones(m) if config.privacy.of_clients else population.sizes[ids].astype(float),
        rank=rank,
        scale=np.array([config.adapter.scale(int(r)) for r in rank]),
        steps=np.full(m, train.steps),
        lr=np.full(m, lr),
        version=np.full(m, round - 1),
        lanes=tuple(np.split(np.arange(m), np.flatnonzero(np.diff(_bucket(rank))) + 1)),
        population=len(population),
        schedule=Schedule(train.schedule, train.warmup),
    )


def step_examples(
    config: Config, owned: np.ndarray, key: int, client: int, round: int, step: int
) -> np.ndarray:
    """The examples of one local step of one visit.

    A client goes through its examples in a shuffled order, epoch after epoch; the last batch of
    an epoch may be short. Under `flowertune` every visit repeats the same order, so a client of
    the default app sees the same 160 examples each time; under `fedsim` each visit has its own.
    Under privacy of examples each joins by itself.
    """
    if config.privacy.of_examples:
        return np.asarray(owned[drawn(config.train.batch, len(owned), key, client, round, step)])
    batches = -(-len(owned) // config.train.batch)
    epoch, batch = divmod(step, batches)
    visit = 0 if config.run.protocol == "flowertune" else round
    order = seeds.permutation(
        key, seeds.Purpose.ORDER, len(owned), client=client, round=visit, step=epoch
    )
    return np.asarray(owned[order[batch * config.train.batch :][: config.train.batch]])


@dataclass(frozen=True)
class Load:
    """Packed rows of one local step.

    Attributes:
        units: rows of each unit by itself; a pass takes whole units.
        shared: rows of units first..end together, where they have rows in common.
    """

    units: tuple[int, ...]
    shared: Callable[[int, int], int] | None = field(default=None, compare=False)

    def rows(self, first: int, end: int) -> int:
        """Packed rows of units first..end in one pass."""
        if self.shared is not None and end > first:
            return self.shared(first, end)
        return sum(self.units[first:end])


@dataclass(frozen=True)
class Part:
    """What one client adds to one pass: units first..end of one of its steps."""

    slot: int
    client: int  # position in the lane
    step: int
    first: int
    end: int
    completes: bool  # these are the last units of the step


@dataclass(frozen=True)
class Shift:
    """One pass, and who comes before it and goes after it."""

    enter: tuple[tuple[int, int], ...]  # (slot, position in the lane)
    parts: tuple[Part, ...]  # by slot
    leave: tuple[tuple[int, int], ...]  # (slot, position in the lane)
    rows: int


@dataclass
class _Resident:
    """A client in its slot; `load` is that of its present step."""

    client: int
    load: Load
    step: int = 0
    unit: int = 0

    def rows(self, end: int | None = None) -> int:
        return self.load.rows(self.unit, len(self.load.units) if end is None else end)

    def repeated(self, end: int) -> int:
        """Rows that are computed twice when the step is split here."""
        rest = self.load.rows(end, len(self.load.units))
        return self.rows(end) + rest - self.rows()


def schedule(
    steps: Sequence[int], load: Callable[[int, int], Load], slots: int, budget: int
) -> Iterator[Shift]:
    """Work a lane off: passes of at most `budget` rows, filled from up to `slots` clients.

    A client whose steps are done leaves, and the next one has its slot from the following pass
    on. Next is the one with most steps among the 4 K clients from the first unfinished one on:
    the longest should not be last, and no more than 4 K finished ones ever wait for their turn.

    Args:
        steps: optimiser steps of each client of the lane, each >= 1.
        load: of a client's step; asked once for each, when it begins.

    Yields:
        Every step of every client, in units, each once and in order. A pass holds at most one
        step of a client and exceeds the budget only when it is a single unit that does.
    """
    lane = _Lane(list(steps), load, slots, budget)
    while lane.unfinished < len(steps):
        enter = lane.admit()
        parts = lane.fill()
        leave = [(p.slot, p.client) for p in parts if p.completes and lane.left[p.client] == 1]
        rows = sum(lane.residents[p.slot].rows(p.end) for p in parts)
        yield Shift(tuple(enter), tuple(parts), tuple(leave), rows)
        lane.advance(parts)


class _Lane:
    """The state of a schedule."""

    def __init__(
        self, left: list[int], load: Callable[[int, int], Load], slots: int, budget: int
    ) -> None:
        self.left, self.budget = left, budget  # steps that each client has to go
        self.unfinished = 0  # the first client that is not done
        self.residents: dict[int, _Resident] = {}
        self._load, self._slots = load, slots
        self._queue = list(range(len(left)))
        self._rows = self._begun = 0  # of the steps begun so far: their mean predicts the others

    def _begin(self, client: int, step: int) -> Load:
        load = self._load(client, step)
        self._rows += load.rows(0, len(load.units))
        self._begun += 1
        return load

    def admit(self) -> list[tuple[int, int]]:
        """Give free slots to waiting clients: (slot, client)."""
        out = []
        end = self.unfinished + WAITING * self._slots
        for slot in range(self._slots):
            waiting = list(takewhile(lambda c: c < end, self._queue))
            if slot in self.residents or not waiting:
                continue
            client = max(waiting, key=lambda c: (self.left[c], -c))
            self._queue.remove(client)
            self.residents[slot] = _Resident(client, self._begin(client, 0))
            out.append((slot, client))
        return out

    def _order(self, slot: int) -> tuple[int, int]:
        """Whose step comes first: of a client that would otherwise be the last to end; then of the
        first of the lane, so that its slot is free soon. When nobody waits for a slot, of those
        with most steps to go, so that all end together."""
        client = self.residents[slot].client
        left = self.left[client]
        if not self._queue:
            return -left, client
        # Passes to go, by the mean step, of this client alone and of the whole lane, x budget.
        alone = left * max(self.budget * self._begun, self._rows)
        whole = (sum(self.left) * self._rows) - self.budget * self._begun
        return int(alone < whole), client

    def fill(self) -> list[Part]:
        """Whole steps while they fit; then a part of one, where it is worth a split."""
        room, ends, rest = self.budget, {}, []
        for slot in sorted(self.residents, key=self._order):
            resident = self.residents[slot]
            if resident.rows() <= room:
                ends[slot] = len(resident.load.units)
            elif not ends:
                ends[slot] = max(self._fitting(resident, room), resident.unit + 1)
            else:
                rest.append(slot)
                continue
            room -= resident.rows(ends[slot])
        for slot in rest:
            resident = self.residents[slot]
            end = self._fitting(resident, room)
            rows, twice = resident.rows(end), resident.repeated(end)
            # A gap of 1/32 of the budget is not worth another part, nor is a part of which more
            # than a fifth is computed again with the rest.
            if 32 * (rows - twice) >= self.budget and rows >= 5 * twice:
                ends[slot] = end
                room -= rows
        return [self._part(slot, ends[slot]) for slot in sorted(ends)]

    def _fitting(self, resident: _Resident, room: int) -> int:
        """The end of the units that fit; none may."""
        ends = range(resident.unit, len(resident.load.units) + 1)
        return ends[max(0, bisect_right(ends, room, key=resident.rows) - 1)]

    def _part(self, slot: int, end: int) -> Part:
        r = self.residents[slot]
        return Part(slot, r.client, r.step, r.unit, end, end == len(r.load.units))

    def advance(self, parts: Sequence[Part]) -> None:
        """The pass is done: go on to the next units, steps and clients."""
        for part in parts:
            resident = self.residents[part.slot]
            resident.unit = part.end
            if not part.completes:
                continue
            self.left[part.client] -= 1
            if self.left[part.client]:
                resident.step, resident.unit = resident.step + 1, 0
                resident.load = self._begin(resident.client, resident.step)
            else:
                del self.residents[part.slot]
        while self.unfinished < len(self.left) and not self.left[self.unfinished]:
            self.unfinished += 1
