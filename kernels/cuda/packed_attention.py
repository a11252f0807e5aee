"""Packed attention in Triton: the forward, one program per 64 rows of a sequence and query head.

Online softmax (Milakov and Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691) over the keys of
the own sequence and then of its parents, whose positions come before its own. Blocks of keys that
no row of the tile can see are not read. Tiles of padding have no keys and store zeros.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.attention_scores import (
    LN2,
    SHAPE,
    attention_variant,
    block,
    capped,
    constants,
    head_block,
    shape,
)
from fedsim_kernels.cuda.packed_attention_backward import (
    packed_attention_backward as packed_attention_backward,  # dispatch looks for it here
)
from fedsim_kernels.cuda.products import product
from fedsim_kernels.cuda.tiles import ROWS, Tiles
from fedsim_kernels.cuda.variant import DTYPES, Variant


@triton.jit
def attention(
    q, k, v, o, lse, tiles, sequences, q_row, q_head, k_row, k_head, v_row, v_head, heads, group,
    D, scale, softcap, window,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """o = softmax(s) v and lse of BM rows of one query head. Grid: (tiles x SPLIT) x Hq."""
    tile, head = tiles + 4 * (tl.program_id(0) // SPLIT), tl.program_id(1)
    skip = (tl.program_id(0) % SPLIT) * BM
    sequence, end = tl.load(tile), tl.load(tile + 2)
    first, position = tl.load(tile + 1) + skip, tl.load(tile + 3) + skip
    if first >= end:
        return
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    inside = m < end - first
    own = block(q + head * q_head, first, m, inside, d, q_row, D)
    k += (head // group) * k_head
    v += (head // group) * v_head
    most = tl.full((BM,), float("-inf"), tl.float32)
    norm = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    while sequence >= 0:
        entry = sequences + 4 * sequence
        start, length, before = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
        low = tl.maximum(position - window + 1 - before, 0) // BN * BN
        high = tl.minimum(length, position + BM - before)
        for c in range(low, high, BN):
            there = n < length - c
            keys = block(k, start + c, n, there, d, k_row, D)
            none = tl.zeros((BM, BN), tl.float32)
            s, _ = capped(product(own, tl.trans(keys), none, UPCAST), scale, softcap, CAPPED)
            last = tl.minimum(m + (position - before - c), length - c - 1)
            first_seen = m + (position - before - c - window)
            seen = (n[None, :] <= last[:, None]) & (n[None, :] > first_seen[:, None])
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(most, tl.max(s, 1))
            # A row that has seen no key yet stays at -inf; -inf - -inf would be NaN.
            zero = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - zero[:, None])
            shrink = tl.exp2(most - zero)
            norm = norm * shrink + tl.sum(p, 1)
            values = block(v, start + c, n, there, d, v_row, D)
            acc = product(p.to(values.dtype), values, acc * shrink[:, None], UPCAST)
            most = higher
        sequence = tl.load(entry + 2)
    empty = norm == 0.0
    norm = tl.where(empty, 1.0, norm)
    logs = tl.where(empty, 0.0, (most + tl.log2(norm)) * LN2)
    row = first.to(tl.int64) * heads + head
    tl.store(lse + row + m * heads, logs, mask=inside)
    out = (acc / norm[:, None]).to(o.dtype.element_ty)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(o + row * D + (m[:, None] * (heads * D) + d[None, :]), out, mask=mask)


# (query rows, keys, warps, stages) by BD: as large as sm_80 takes without spilling registers.
_HALF = {64: (64, 32, 4, 3), 128: (64, 32, 4, 2), 256: (64, 16, 4, 2)}
# Products without a matrix unit unroll BD: few elements for each thread.
_FP32 = {64: (16, 32, 4, 1), 128: (32, 32, 16, 1), 256: (32, 32, 16, 1)}


def tile(d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) of a program for heads of that size."""
    return (_FP32 if dtype == torch.float32 else _HALF)[head_block(d)]


@cache
def _variant(capped: bool, d: int, dtype: torch.dtype) -> Variant:
    rows, keys, warps, stages = tile(d, dtype)
    chosen = constants(capped, d, dtype, rows, keys, ROWS // rows)
    names = f"q k v o lse tiles sequences {SHAPE}"
    return attention_variant(attention, names, chosen, warps, stages, dtype)


def variants() -> list[Variant]:
    """Every form of the forward."""
    return [
        _variant(capped, d, dtype)
        for capped in (False, True)
        for d in (64, 128, 256)
        for dtype in DTYPES
    ]


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (T, Hq, D) and lse (T, Hq) fp32; arguments as in fedsim_kernels.packed_attention."""
    work, (rows, heads, d) = Tiles(*tables[2:]), q.shape
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((rows, heads), dtype=torch.float32, device=q.device)
    variant = _variant(softcap > 0, head_block(d), q.dtype)
    variant.launch(
        (len(work.sequences) * variant.tile["SPLIT"], heads), q, k, v, o, lse, work.sequences,
        tables[1], *shape(q, k, v, scale, window, softcap),
    )  # fmt: skip
    return o, lse
