"""Compression of what clients send; the server sees its start plus what was decompressed.

    int8, int4   q = floor(L x / s + u),  x' = s q / L       s = max |x| of a block, L = 127 or 7
    top_k        x' = x for the k largest |x|, ties by index; else 0
    feedback     v = d + e,  sent C(v),  e <- v - C(v)       arXiv:1901.09847

u in (0, 1) is counted by client and round: E x' = x, and |x' - x| < s / L (QSGD, arXiv:1610.02132,
has norms for s). Bytes are in `channel.py`. By hand, L = 7: x = (7, 2.5), s = 7: q = 7, and 2 or 3
with probability 1/2 each.

e is a client's, in rows `residual` of its memory; one that failed keeps it. Numbers that do not
travel in a round are neither changed nor carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.channel import BITS, Channel, kept
from fedsim.core import AdapterLayout, ClientMemory, ClientUpdates, LocalRule, RoundPlan


def quantised(x: Tensor, bits: int, block: int, u: Tensor) -> Tensor:
    """x' of b-bit codes, L = 2^(b-1) - 1: (n,) fp32.

    Args:
        x: (n,) fp32, finite. u: (n,) in (0, 1), fp64.
    """
    levels, n = (1 << (bits - 1)) - 1, len(x)
    rows = torch.nn.functional.pad(x, (0, -n % block)).view(-1, block).double()
    scale = rows.abs().amax(1, keepdim=True)
    # In fp64: a number that a code stands for exactly must not fall to its neighbour.
    ratio = rows / torch.where(scale > 0, scale, 1.0) * levels
    codes = (ratio.view(-1)[:n] + u).floor()
    return (codes * (scale / levels).expand_as(rows).reshape(-1)[:n]).float()


def top_k(x: Tensor, k: int) -> Tensor:
    """The k numbers of largest magnitude, ties by index, and 0 elsewhere: (n,) fp32."""
    size = x.abs()
    least = size.topk(k).values[-1]
    ties = torch.nonzero(size == least)[:, 0]
    chosen = size > least
    chosen[ties[: k - int(chosen.sum())]] = True
    return torch.where(chosen, x, 0)


def compressed(x: Tensor, channel: Channel, *, key: int, client: int, round: int) -> Tensor:
    """C(x) of the numbers that travel: (n,) fp32."""
    if channel.keep is not None:
        return top_k(x, kept(channel.keep, len(x)))
    assert channel.block is not None
    u = seeds.uniform(key, seeds.Purpose.CHANNEL, len(x), client=client, round=round)
    return quantised(x, BITS[channel.compression], channel.block, u.to(x.device))


def through(
    channel: Channel, updates: Iterable[ClientUpdates], *, plan: RoundPlan, rule: LocalRule,
    layout: AdapterLayout, memory: ClientMemory, key: int,
) -> Iterator[ClientUpdates]:  # fmt: skip
    """A round's updates as the server gets them, block by block; those of failed clients unchanged.

    One whose row is not finite behind the channel has failed: a server refuses it.
    """
    masks: dict[int, Tensor] = {}  # of P numbers, by rank: one for the round, not for each client
    for block in updates:
        if channel.compression == "none" or not block.ok.any():
            yield block
            continue
        row, ok = block.row.clone(), block.ok.copy()
        for i in np.flatnonzero(block.ok):
            at = int(block.index[i])
            client, rank = int(plan.client_ids[at]), int(plan.rank[at])
            if rank not in masks:
                masks[rank] = layout.mask(rule.up, rank).to(row.device)
            has = masks[rank]
            if not has.any():
                continue
            start = (block.start if block.start.ndim == 1 else block.start[i])[has]
            before = memory.read("residual", client) if channel.feedback else None
            x = row[i][has] - start
            if before is not None:
                x = x + before.to(x.device)[has]
            sent = compressed(x, channel, key=key, client=client, round=plan.round)
            row[i, has] = start + sent
            ok[i] = bool(row[i].isfinite().all())
            if channel.feedback and ok[i]:
                left = torch.zeros_like(row[i]) if before is None else before.to(row).clone()
                left[has] = x - sent
                memory.write("residual", client, left)
        yield replace(block, row=row, ok=ok)
