"""Multiple-choice questions by packed prefill: no decoding, no padding, no token twice.

The tokens that all prompts share are computed once a pass, then each prompt, then each choice
beyond its prompt, as a tree of packed sequences: a choice of one token costs no row at all,
because its probability is read off the prompt's last row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import PackedBatch, Packer
from fedsim.data import pieces
from fedsim.lora import Pass
from fedsim.model import Base
from fedsim.prefix import common_prefix
from fedsim_kernels.segments import Segments

_ROWS = 256  # rows of logits at once


@dataclass(frozen=True)
class Question:
    """A prompt with its choices, as tokens; the choice's own begin at `start`."""

    choices: tuple[np.ndarray, ...]
    start: tuple[int, ...]
    stem: int  # leading tokens that all choices share, less than each one's length


@dataclass(frozen=True)
class Answer:
    """What the model thinks of each choice of one question."""

    logprob: np.ndarray  # (choices,) float64 sum over the choice's tokens
    greedy: np.ndarray  # (choices,) bool: greedy decoding would write this choice


def question(tokenizer: Any, prompt: str, choices: Sequence[str]) -> Question:
    """Prompt + " " + choice, whose tokens are those that training would train."""
    found = pieces.label(tokenizer, [[(prompt, False), (f" {c}", True)] for c in choices])
    rows = tuple(np.array(ids) for ids, _ in found)
    start = tuple(int(own.argmax()) if own.any() else len(own) for _, own in found)
    return Question(rows, start, common_prefix(rows, min(len(r) for r in rows) - 1))


Asked = tuple[int, Question]  # of which adapter


def _passes(asked: Iterable[Asked], budget: int) -> Iterator[list[Asked]]:
    group: list[Asked] = []
    used = 0
    for slot, q in asked:
        cost = q.stem + sum(len(c) - 1 - q.stem for c in q.choices)
        if group and used + cost > budget:
            yield group
            group, used = [], 0
        group.append((slot, q))
        used += cost
    if group:
        yield group


def _pack(group: Sequence[Asked], device: torch.device) -> tuple[PackedBatch, list[int]]:
    """Pack a tree of sequences for each adapter; labels are every token of every choice, in order.

    Returns:
        The batch, and the number of label tokens of each choice of each question.
    """
    packer = Packer()
    counts: list[int] = []
    for slot, run in groupby(group, key=lambda asked: asked[0]):
        packer.chunk(slot)
        counts += _tree(packer, [q for _, q in run])
    return packer.finish(device), counts


def _tree(packer: Packer, questions: Sequence[Question]) -> list[int]:
    stems = [q.choices[0][: q.stem] for q in questions]
    limit = min(min(*(s - 1 for s in q.start), q.stem - 1) for q in questions)
    root = common_prefix(stems, limit) if len(questions) > 1 else 0
    parent = -1
    if root:
        packer.sequence(stems[0][:root], 0)
        parent = packer.last
    counts = []
    for q, stem in zip(questions, stems, strict=True):
        first = packer.sequence(stem[root:], 0, root, parent)
        stem_sequence = packer.last
        for ids, start in zip(q.choices, q.start, strict=True):
            shared = min(len(ids), q.stem + 1)  # labels up to here are predicted by stem rows
            packer.labels(first + start - 1 - root, ids[start:shared], 0.0)
            if len(ids) > q.stem + 1:
                row = packer.sequence(ids[q.stem : -1], 0, q.stem, stem_sequence)
                packer.labels(row + max(0, start - 1 - q.stem), ids[max(start, shared) :], 0.0)
            counts.append(len(ids) - start)
    return counts


@torch.no_grad()
def answer(
    base: Base, rows: Tensor, scales: Tensor | Sequence[float], questions: Sequence[Question],
    budget: int,
) -> list[list[Answer]]:  # fmt: skip
    """Log-probability and greedy agreement of every choice under each of K adapters.

    Args:
        rows: (K, P) fp32.
        scales: (K,).
        budget: packed tokens of one pass.
    """
    factors = base.layout.site_views(rows.to(base.device))
    scale = torch.as_tensor(scales, dtype=torch.float32, device=base.device)
    out: list[list[Answer]] = [[] for _ in range(len(rows))]
    for group in _passes(((k, q) for k in range(len(rows)) for q in questions), budget):
        batch, counts = _pack(group, base.device)
        label_rows, where = torch.unique(batch.label_rows, return_inverse=True)
        spans = batch.segments.spans
        edges = torch.tensor([*(first for _, first, _ in spans), len(batch)], device=base.device)
        work = Pass(
            batch.segments, factors, None, scale, base.anchor, label_rows=label_rows,
            label_segments=Segments.build(
                torch.searchsorted(label_rows, edges).diff().tolist(), [slot for slot, *_ in spans]
            ),
        )  # fmt: skip
        hidden = base.hidden(batch.input_ids, batch.position_ids, work)
        logprob, greedy = _read(base, hidden, where, batch.targets)
        ends = np.cumsum(counts)
        sums = [(logprob[e - c : e].sum(), greedy[e - c : e].all())
                for c, e in zip(counts, ends, strict=True)]  # fmt: skip
        for slot, q in group:
            mine, sums = sums[: len(q.choices)], sums[len(q.choices) :]
            lp, hit = zip(*mine, strict=True)
            out[slot].append(Answer(np.array(lp), np.array(hit)))
    return out


def _read(
    base: Base, hidden: Tensor, where: Tensor, targets: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(labels,) log-probability of each label, and whether it is its row's most probable token.

    Args:
        hidden: (rows, D). where: (labels,) the row of each.
    """
    logprob = torch.empty(len(where), dtype=torch.float32, device=base.device)
    top = torch.empty(len(hidden), dtype=torch.int64, device=base.device)
    for first in range(0, len(hidden), _ROWS):
        z = base.logits(hidden[first : first + _ROWS])
        top[first : first + _ROWS] = z.argmax(-1)
        mine = (where >= first) & (where < first + _ROWS)
        target, at = targets[mine], where[mine] - first
        logprob[mine] = z[at, target] - torch.logsumexp(z, -1)[at]
    return logprob.double().cpu().numpy(), (top[where] == targets).cpu().numpy()
