"""From local steps to passes: what a step costs, which units share a pass, and their packing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from fedsim.batch import PackedBatch, Packer
from fedsim.config import Config, Train
from fedsim.core import Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.plan import Load, Part, Shift, schedule, step_examples

_CPU = torch.device("cpu")
_MIN_PREFIX = 8  # tokens; a shorter shared prefix costs more bookkeeping than it saves


def common_prefix(rows: Sequence[np.ndarray], limit: int) -> int:
    """Number of leading tokens, at most `limit`, that all rows share."""
    first = rows[0][:limit]
    n = len(first)
    for row in rows[1:]:
        differs = np.flatnonzero(first[:n] != row[:n])
        n = int(differs[0]) if len(differs) else n
    return n


@dataclass(frozen=True)
class Step:
    """One local step of one client, cut into units that a pass takes whole.

    Attributes:
        examples, lengths: (n,) int64 of its sequences, in order.
        prefix: leading tokens that its sequences have in common and a chunk computes once.
        units: first and end sequence of each unit: a sequence in fast mode, a chunk in strict.
        load: packed rows of each unit.
        weight: 1 / label tokens of the whole step, so that passes add up to the step's mean.
    """

    examples: np.ndarray
    lengths: np.ndarray
    prefix: int
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
    """Cut a step's sequences into units, by configuration and lengths alone.

    A strict chunk takes sequences while they fit into `chunk_tokens`, its prefix included; a
    longer sequence is a chunk of its own.

    Args:
        share: compute the leading tokens that the step's sequences have in common once a chunk.
            Exact: labels never lie in them, and rows attend to them as before.
    """
    lengths, starts = store.lengths[examples], store.label_start[examples]
    prefix = 0
    if share and len(examples) > 1:
        prefix = common_prefix([store.of(e) for e in examples], max(0, int(starts.min()) - 1))
        prefix = prefix if prefix >= _MIN_PREFIX else 0
    own = (lengths - prefix).tolist()
    edges, tile = list(range(len(own) + 1)), train.rows_per_product
    if tile:
        edges, used = [0], prefix
        for i, rows in enumerate(own):
            if i > edges[-1] and used + rows > train.chunk_tokens:
                edges.append(i)
                used = prefix
            used += rows
        edges.append(len(own))
    units = tuple(pairwise(edges))
    load = Load(tuple(own), prefix)
    if tile:
        load = Load(tuple(-(-(prefix + sum(own[a:b])) // tile) * tile for a, b in units))
    labels = int(np.maximum(lengths - starts, 0).sum())
    return Step(examples, lengths, prefix, units, load, 1.0 / max(1, labels))


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

    slots = min(train.slots, config.per_round)
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
    """The sequences of one chunk, after their prefix where it is shared."""
    prefix, parent = (step.prefix if len(sequences) > 1 else 0), -1
    if prefix:
        head = store.of(step.examples[sequences[0]])[:prefix]
        packer.sequence(head, sequences[0])
        parent = packer.last
    for i in sequences:
        ids, start = store.of(step.examples[i]), int(store.label_start[step.examples[i]])
        first = packer.sequence(ids[prefix:], i, prefix, parent)
        packer.labels(first + start - 1 - prefix, ids[start:], step.weight)
