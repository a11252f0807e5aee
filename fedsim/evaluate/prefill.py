"""Prompts of many adapters as one packed pass, shared beginnings computed once.

The prompts of an adapter form a tree (`prefix.py`); each ends in a row of its own, whose hidden
state says what comes next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import PackedBatch, Packer, on_device
from fedsim.prefix import LEAST, common, common_prefix, rows_of, tree


@dataclass(frozen=True)
class Prompt:
    """One prompt of one adapter.

    Attributes:
        request: its place in the call.
    """

    request: int
    adapter: int
    ids: np.ndarray  # (n,) int64


@dataclass(frozen=True)
class Prefill:
    """A packed pass of prompts.

    Attributes:
        order: (n,) which prompt each of the batch's label rows ends.
        kept: (3, E) int64: packed row, prompt and position of every token of every prompt.
    """

    batch: PackedBatch
    order: list[int]
    kept: Tensor


def fitting(prompts: Iterable[Prompt], budget: int, most: int) -> list[Prompt]:
    """The first prompts that fit into a pass, at least one. Those of an adapter are adjacent."""
    out: list[Prompt] = []
    used = 0
    for prompt in prompts:
        cost, first = len(prompt.ids), next((p for p in out if p.adapter == prompt.adapter), None)
        if first is not None:
            shared = common_prefix([first.ids, prompt.ids], cost - 1)
            cost -= shared if shared >= LEAST else 0
        if len(out) == most or (out and used + cost > budget):
            break
        out.append(prompt)
        used += cost
    # The count above may miss that a short shared part is computed twice.
    while len(out) > 1 and rows_of(tree(*_shared(out), range(len(out)))) > budget:
        out.pop()
    return out


def _shared(prompts: Sequence[Prompt]) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) leading tokens that prompts of one adapter have in common, less each one's last row;
    (n,) lengths."""
    lengths = np.array([len(p.ids) for p in prompts])
    adapters = np.array([p.adapter for p in prompts])
    table = common([p.ids for p in prompts], (lengths - 1).tolist())
    return np.where(adapters[:, None] == adapters, table, 0), lengths


def pack(prompts: Sequence[Prompt], ranks: tuple[int, ...], device: torch.device) -> Prefill:
    """Pack prompts, those of an adapter adjacent and adapters ascending."""
    packer, slot = Packer(), -1
    order: list[int] = []
    index: list[int] = []
    rows: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    for branch in tree(*_shared(prompts), range(len(prompts))):
        prompt = prompts[branch.sequence]
        if prompt.adapter != slot:
            slot = prompt.adapter
            packer.chunk(slot)
        parent = index[branch.parent] if branch.parent >= 0 else -1
        first = packer.sequence(prompt.ids[branch.begin : branch.end], 0, branch.begin, parent)
        index.append(packer.last)
        own = np.arange(first, packer.tokens)
        rows.append(own if parent < 0 else np.concatenate([rows[branch.parent], own]))
        if branch.leaf:
            packer.labels(packer.tokens - 1, np.zeros(1, dtype=np.int64), 0.0)
            order.append(branch.sequence)
            n = len(rows[-1])
            kept.append(np.stack([rows[-1], np.full(n, branch.sequence), np.arange(n)]))
    where = on_device(np.concatenate(kept, 1), device)
    return Prefill(packer.finish(device, ranks), order, where)
