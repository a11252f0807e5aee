"""From local steps to passes: what a step costs, which units share a pass, and their packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        weight: 1 / label tokens of the whole step, so that passes add up to the step's mean.
    """

    examples: np.ndarray
    lengths: np.ndarray
    shared: np.ndarray
    units: tuple[tuple[int, int], ...]
    load: Load
    weight: float

    def sequences(self, part: Part) -> range:
        """Those of one part."""
        return range(self.units[part.first][0], self.units[part.end - 1][1])

    def tokens(self, part: Part) -> int:
        """Of one part's sequences, each counted whole."""
        return int(self.lengths[self.sequences(part)].sum())


def cut(store: TokenStore, examples: np.ndarray, train: Train, *, share: bool) -> Step:
    """Cut a step's sequences into units, by configuration and tokens alone.

    A strict chunk takes sequences while they fit into `chunk_tokens`, shared tokens counted once;
    a longer sequence is a chunk of its own.

    Args:
        share: compute leading tokens that sequences of a chunk have in common once.
    """
    lengths, starts = store.lengths[examples], store.label_start[examples]
    n, tile = len(examples), train.rows_per_product
    shared = np.zeros((n, n), dtype=np.int64)
    if share:
        # The row before the first label is each sequence's own: what is shared has no labels.
        limits = np.maximum(starts - 1, 0).tolist()
        shared = common([store.of(e) for e in examples], limits)

    def together(first: int, end: int) -> int:
        return rows_of(tree(shared, lengths, range(first, end)))

    edges = list(range(n + 1))
    if tile:
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
    labels = int(np.maximum(lengths - starts, 0).sum())
    return Step(examples, lengths, shared, units, load, 1.0 / max(1, labels))


Parts = Sequence[tuple[Part, Step]]


def passes(
    config: Config, store: TokenStore, population: Population, plan: RoundPlan, lane: np.ndarray,
    budget: int, key: int,
) -> Iterator[tuple[Shift, Parts]]:  # fmt: skip
    """The passes of a lane, each with the steps that its parts belong to."""
    train = config.train
    share = train.shared_prefix and not config.adapter.dropout
    steps: dict[tuple[int, int], Step] = {}

    def load(at: int, step: int) -> Load:
        client = int(plan.client_ids[lane[at]])
        owned = population.of(client)
        examples = step_examples(config, owned, key, client, plan.round, step)
        steps[at, step] = cut(store, examples, train, share=share)
        return steps[at, step].load

    slots = min(train.slots, config.most_clients)
    for shift in schedule(plan.steps[lane].tolist(), load, slots, budget):
        yield shift, [(part, steps[part.client, part.step]) for part in shift.parts]
        for part in shift.parts:
            if part.completes:
                del steps[part.client, part.step]


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
            start = int(store.label_start[example])
            packer.labels(row + start - 1 - branch.begin, ids[start:], step.weight)
