"""Plans: who trains in a round, on which examples, and how their tokens share passes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.config import Config
from fedsim.core import PackedBatch, Population, RoundPlan
from fedsim.data.tokens import TokenStore

_MIN_PREFIX = 8  # tokens; a shorter shared prefix costs more bookkeeping than it saves


def pass_budget(config: Config, device: torch.device) -> int:
    """Most packed tokens in one pass: `train.budget_tokens`, or what suits the device.

    A GPU wants many tokens to fill it. A CPU wants activations that stay in its cache: a step of
    6,800 tokens (SmolLM2-135M, 2 cores) took 16 to 21 s in one pass, 12.5 to 13.5 s in four.
    """
    fitting = 16384 if device.type == "cuda" else 2048
    return config.train.budget_tokens or max(fitting, config.data.max_length)


def cosine_lr(round: int, rounds: int, lr_max: float, lr_min: float) -> float:
    """lr_min + (lr_max - lr_min) (1 + cos(pi round / rounds)) / 2, for round 1..rounds.

    Constant inside a round, as FlowerTune has it; the last round gets lr_min.
    """
    return lr_min + 0.5 * (lr_max - lr_min) * (1 + math.cos(math.pi * round / rounds))


def plan_round(config: Config, population: Population, round: int, key: int) -> RoundPlan:
    """Sample the round's clients without replacement and write down their work."""
    m = config.per_round
    order = seeds.permutation(key, seeds.Purpose.SAMPLING, len(population), round=round)
    ids = np.sort(order[:m]).astype(np.int64)
    train, adapter = config.train, config.adapter
    lr = cosine_lr(round, config.server.rounds, train.lr_max, train.lr_min)
    return RoundPlan(
        round=round,
        client_ids=ids,
        weights=population.sizes[ids].astype(np.float64),
        rank=np.full(m, adapter.rank),
        scale=np.full(m, adapter.alpha / adapter.rank),
        steps=np.full(m, train.steps),
        lr=np.full(m, lr),
        version=np.full(m, round - 1),
        lanes=(np.arange(m),),
    )


def waves(lane: np.ndarray, slots: int) -> list[np.ndarray]:
    """Cut a lane into groups of at most `slots` clients that share passes, of even size."""
    return np.array_split(lane, -(-len(lane) // slots))


def step_examples(
    config: Config, owned: np.ndarray, key: int, client: int, round: int, step: int
) -> np.ndarray:
    """The examples of one local step of one visit.

    A client goes through its examples in a shuffled order, epoch after epoch; the last batch of
    an epoch may be short. Under `flowertune` every visit repeats the same order, so a client of
    the default app sees the same 160 examples each time; under `fedsim` each visit has its own.
    """
    batches = -(-len(owned) // config.train.batch)
    epoch, batch = divmod(step, batches)
    visit = 0 if config.run.protocol == "flowertune" else round
    order = seeds.permutation(
        key, seeds.Purpose.ORDER, len(owned), client=client, round=visit, step=epoch
    )
    picked: np.ndarray = owned[order[batch * config.train.batch :][: config.train.batch]]
    return picked


def common_prefix(rows: Sequence[np.ndarray], limit: int) -> int:
    """Number of leading tokens, at most `limit`, that all rows share."""
    first = rows[0][:limit]
    n = len(first)
    for row in rows[1:]:
        differs = np.flatnonzero(first[:n] != row[:n])
        n = int(differs[0]) if len(differs) else n
    return n


class Packer:
    """Fills one pass: sequences end to end, each with its slot, positions and labels."""

    def __init__(self) -> None:
        self._ids: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._meta: list[tuple[int, int, int]] = []  # slot, sequence, parent
        self._labels: list[tuple[int, int, int, float]] = []  # row, target, slot, weight
        self.tokens = 0

    def sequence(
        self, ids: np.ndarray, slot: int, sequence: int, position: int = 0, parent: int = -1
    ) -> int:
        """Add tokens that start at `position`; returns the first packed row."""
        row = self.tokens
        self._ids.append(ids)
        self._positions.append(np.arange(position, position + len(ids)))
        self._meta.append((slot, sequence, parent))
        self.tokens += len(ids)
        return row

    @property
    def last(self) -> int:
        """Index of the sequence added last."""
        return len(self._ids) - 1

    def labels(self, first: int, targets: np.ndarray, slot: int, weight: float) -> None:
        """Rows first, first + 1, ... predict the targets."""
        self._labels += [(first + j, int(t), slot, weight) for j, t in enumerate(targets)]

    def finish(self, device: torch.device) -> PackedBatch:
        """The packed pass on its device."""
        slot, sequence, parent = np.array(self._meta, dtype=np.int64).T
        labels = list(zip(*self._labels, strict=True)) or [()] * 4
        rows, targets, label_slot, weight = labels

        def move(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(np.asarray(values), dtype=dtype).to(device, non_blocking=True)

        return PackedBatch(
            input_ids=move(np.concatenate(self._ids)),
            position_ids=move(np.concatenate(self._positions)),
            lengths=np.array([len(ids) for ids in self._ids]),
            slot=slot,
            sequence=sequence,
            parent=parent,
            label_rows=move(rows),
            targets=move(targets),
            label_slot=move(label_slot),
            label_weight=move(weight, torch.float32),
        )


def _groups(
    store: TokenStore, work: Sequence[tuple[int, np.ndarray]], budget: int
) -> list[list[tuple[int, int, int]]]:
    """Cut a step into passes of whole sequences within the budget: (slot, sequence, example)."""
    passes: list[list[tuple[int, int, int]]] = [[]]
    used = 0
    lengths = store.lengths
    for slot, examples in work:
        for sequence, example in enumerate(examples):
            if passes[-1] and used + lengths[example] > budget:
                passes.append([])
                used = 0
            passes[-1].append((slot, sequence, int(example)))
            used += int(lengths[example])
    return passes


def pack_step(
    store: TokenStore,
    work: Sequence[tuple[int, np.ndarray]],
    *,
    budget: int,
    shared_prefix: bool,
    device: torch.device,
) -> list[PackedBatch]:
    """One local step of several clients, as one pass, or several where the budget asks for it.

    A client's loss is the mean over its label tokens of the *whole* step, so weights are known
    before the first pass and gradients of the passes add up to the step's.

    Args:
        work: (slot, examples of this step) of each client, by ascending slot.
        shared_prefix: compute the leading tokens that a client's sequences of a pass have in
            common once. Exact: labels never lie in it, and rows attend to it as before.
    """
    weight = {
        slot: 1.0 / max(1, int((store.lengths[ex] - store.label_start[ex]).sum()))
        for slot, ex in work
    }
    out = []
    for group in _groups(store, work, budget):
        packer = Packer()
        for slot in dict.fromkeys(s for s, _, _ in group):
            members = [(q, e) for s, q, e in group if s == slot]
            rows = [store.of(e) for _, e in members]
            starts = [int(store.label_start[e]) for _, e in members]
            prefix, parent = 0, -1
            if shared_prefix and len(rows) > 1:
                prefix = common_prefix(rows, min(starts) - 1)
                prefix = prefix if prefix >= _MIN_PREFIX else 0
            if prefix:
                packer.sequence(rows[0][:prefix], slot, members[0][0])
                parent = packer.last
            for (sequence, _), ids, start in zip(members, rows, starts, strict=True):
                first = packer.sequence(ids[prefix:], slot, sequence, prefix, parent)
                packer.labels(first + start - 1 - prefix, ids[start:], slot, weight[slot])
        out.append(packer.finish(device))
    return out
