"""From local steps to passes: what a step costs, which units share a pass, and their packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from fedsim.batch import PackedBatch, Packer
from fedsim.config import Config, Train
from fedsim.core import Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.plan import Load, Part, Shift, schedule, step_examples
from fedsim.prefix import common, rows_of, tree

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Step:
    """One local step of one client, cut into units that a pass takes whole.

    Attributes:
        examples, lengths: (n,) int64 of its sequences, in order.
        shared: (n, n) leading tokens that two sequences have in common and a chunk computes once;
            zero where nothing is shared.
        units: first and end sequence of each unit: a sequence in fast mode, a chunk in strict.
        load: packed rows of each unit.
        weights: (n,) 1 / label tokens of the whole step, so that passes add up to the step's mean;
            where every example has a loss of its own, 1 / its own.
        labels: (n,) int64, label tokens of each; a step without any measures nothing.
    """

    examples: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray
    units: tuple[tuple[int, int], ...]
    load: Load
    weights: np.ndarray
    labels: np.ndarray

    def sequences(self, part: Part) -> range:
        """Those of one part."""
        if part.first == part.end:
            return range(0)
        return range(self.units[part.first][0], self.units[part.end - 1][1])

    def tokens(self, part: Part) -> int:
        """Of one part's sequences, each counted whole."""
        return int(self.lengths[self.sequences(part)].sum())


def cut(
    store: TokenStore, examples: np.ndarray, train: Train, *, share: bool, alone: bool = False
) -> Step:  # fmt: skip
    """Cut a step's sequences into units, by configuration and tokens alone.

    A strict chunk takes sequences while they fit into `chunk_tokens`, shared tokens counted once;
    a longer sequence is a chunk of its own.

    Args:
        share: compute leading tokens that sequences of a chunk have in common once.
        alone: every sequence is a unit and has a mean loss of its own; with share = False.
    """
    lengths, labels = store.lengths[examples], store.labels[examples]
    n, tile = len(examples), train.rows_per_product
    shared = np.zeros((n, n), dtype=np.int64)
    if share:
        # The row before the first label is each sequence's own: what is shared has no labels.
        limits = np.maximum(store.first[examples] - 1, 0).tolist()
        shared = common([store.of(e) for e in examples], limits)

    def together(first: int, end: int) -> int:
        return rows_of(tree(shared, lengths, range(first, end)))

    edges = list(range(n + 1))
    if tile and not alone:
        edges = [0]
        for i in range(1, n):
            if together(edges[-1], i + 1) > train.chunk_tokens:
                edges.append(i)
        edges.append(n)
    units = tuple(pairwise(edges))
    if tile:
        load = Load(tuple(-(-together(a, b) // tile) * tile for a, b in units))
    else:
        load = Load(tuple(lengths.tolist()), cache(together) if share else None)
    weights = 1.0 / np.maximum(1, labels if alone else np.full(n, labels.sum()))
    return Step(examples, lengths, shared, units, load, weights, labels)


Parts = Sequence[tuple[Part, Step]]


def passes(
    config: Config, store: TokenStore, population: Population, plan: RoundPlan, lane: np.ndarray,
    slots: int, budget: int, key: int,
) -> Iterator[tuple[Shift, Parts]]:  # fmt: skip
    """The passes of a lane, each with the steps that its parts belong to."""
    train = config.train
    if config.privacy.of_examples:
        yield from singly(config, store, population, plan, lane, slots, budget, key)
        return
    share = train.shared_prefix and not config.adapter.dropout
    steps: dict[tuple[int, int], Step] = {}

    def load(at: int, step: int) -> Load:
        client = int(plan.client_ids[lane[at]])
        owned = population.of(client)
        examples = step_examples(config, owned, key, client, plan.round, step)
        steps[at, step] = cut(store, examples, train, share=share)
        return steps[at, step].load

    for shift in schedule(plan.steps[lane].tolist(), load, slots, budget):
        yield shift, [(part, steps[part.client, part.step]) for part in shift.parts]
        for part in shift.parts:
            if part.completes:
                del steps[part.client, part.step]


def singly(
    config: Config, store: TokenStore, population: Population, plan: RoundPlan, lane: np.ndarray,
    slots: int, budget: int, key: int,
) -> Iterator[tuple[Shift, Parts]]:  # fmt: skip
    """The same where a pass may hold one example of a client: to the schedule each is a step by
    itself, and a step that drew none is one part of no units."""
    steps: list[list[Step]] = []
    order: list[list[tuple[int, int]]] = []  # of each client: the step and unit of each pass
    for index in lane:
        client = int(plan.client_ids[index])
        owned = population.of(client)
        steps.append([
            cut(store, step_examples(config, owned, key, client, plan.round, step), config.train,
                share=False, alone=True)
            for step in range(int(plan.steps[index]))
        ])  # fmt: skip
        order.append([(s, u) for s, step in enumerate(steps[-1])
                      for u in range(max(1, len(step.units)))])  # fmt: skip

    def load(at: int, number: int) -> Load:
        step, unit = order[at][number]
        return Load(steps[at][step].load.units[unit : unit + 1])

    for shift in schedule([len(o) for o in order], load, slots, budget):
        found = []
        for part in shift.parts:
            number, unit = order[part.client][part.step]
            step, end = steps[part.client][number], unit + part.end
            last = end == len(step.units)
            found.append((replace(part, step=number, first=unit, end=end, completes=last), step))
        yield replace(shift, parts=tuple(part for part, _ in found)), found


def filled(parts: Parts) -> Parts:
    """Those that have sequences."""
    return [(part, step) for part, step in parts if part.end > part.first]


def pack(
    store: TokenStore, parts: Parts, tile: int = 0, *, ranks: tuple[int, ...] = (),
    device: torch.device = _CPU,
) -> PackedBatch:  # fmt: skip
    """One pass of the given parts of clients' steps.

    Args:
        parts: by ascending slot.
        tile: rows of one product in strict mode, where each unit is a chunk; 0: a slot is one.
        ranks: of each slot, or ().
    """
    packer = Packer(tile)
    for part, step in parts:
        whole = step.sequences(part)
        units = [range(*unit) for unit in step.units[part.first : part.end]]
        for sequences in units if tile else [whole]:
            packer.chunk(part.slot)
            _chunk(packer, store, step, sequences)
    return packer.finish(device, ranks)


def _chunk(packer: Packer, store: TokenStore, step: Step, sequences: range) -> None:
    """The tree of one chunk's sequences: what they share, then what is each one's own."""
    index: list[int] = []
    for branch in tree(step.shared, step.lengths, sequences):
        example = step.examples[branch.sequence]
        ids = store.of(example)
        parent = index[branch.parent] if branch.parent >= 0 else -1
        row = packer.sequence(ids[branch.begin : branch.end], branch.sequence, branch.begin, parent)
        index.append(packer.last)
        if branch.leaf:
            weight = step.weights[branch.sequence]
            for first, end in store.spans(example):
                packer.labels(row + first - 1 - branch.begin, ids[first:end], weight)
