"""Packed attention backward in Triton, as FlashAttention-2 (Dao, arXiv:2307.08691).

First dq, a program per 64 query rows, which also leaves delta[t] = g[t] . o[t]; then dk and dv, a
program per 64 keys, which walks every sequence that sees them, every query head that reads them
and their rows, always in this order. The scores are computed again from lse.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.attention_scores import (
    BEYOND,
    LOG2E,
    SHAPE,
    attention_variant,
    block,
    capped,
    constants,
    head_block,
    shape,
)
from fedsim_kernels.cuda.products import product
from fedsim_kernels.cuda.tiles import ROWS, Tiles
from fedsim_kernels.cuda.variant import DTYPES, Variant


@triton.jit
def attention_queries(
    g, q, k, v, o, lse, delta, gq, tiles, sequences, q_row, q_head, k_row, k_head, v_row, v_head,
    heads, group, D, scale, softcap, window,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k and delta of BM rows of one query head. Grid: (tiles x SPLIT) x Hq."""
    tile, head = tiles + 4 * (tl.program_id(0) // SPLIT), tl.program_id(1)
    skip = (tl.program_id(0) % SPLIT) * BM
    sequence, end = tl.load(tile), tl.load(tile + 2)
    first, position = tl.load(tile + 1) + skip, tl.load(tile + 3) + skip
    if first >= end:
        return
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    inside = m < end - first
    grad = block(g + head * D, first, m, inside, d, heads * D, D)
    # Piece by piece: a product of whole rows keeps them in registers through the loops below,
    # which then spill in fp32.
    dots, part = tl.zeros((BM,), tl.float32), tl.arange(0, 16)
    for c in range(0, D, 16):
        left = block(g + head * D + c, first, m, inside, part, heads * D, D - c).to(tl.float32)
        right = block(o + head * D + c, first, m, inside, part, heads * D, D - c).to(tl.float32)
        dots += tl.sum(left * right, 1)
    row = first.to(tl.int64) * heads + head
    tl.store(delta + row + m * heads, dots, mask=inside)
    own = block(q + head * q_head, first, m, inside, d, q_row, D)
    logs = tl.load(lse + row + m * heads, mask=inside, other=0.0) * LOG2E
    k += (head // group) * k_head
    v += (head // group) * v_head
    acc = tl.zeros((BM, BD), tl.float32)
    while sequence >= 0:
        entry = sequences + 4 * sequence
        start, length, before = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
        low = tl.maximum(position - window + 1 - before, 0) // BN * BN
        high = tl.minimum(length, position + BM - before)
        for c in range(low, high, BN):
            there = n < length - c
            keys = block(k, start + c, n, there, d, k_row, D)
            values = block(v, start + c, n, there, d, v_row, D)
            none = tl.zeros((BM, BN), tl.float32)
            s, slope = capped(product(own, tl.trans(keys), none, UPCAST), scale, softcap, CAPPED)
            last = tl.minimum(m + (position - before - c), length - c - 1)
            first_seen = m + (position - before - c - window)
            seen = (n[None, :] <= last[:, None]) & (n[None, :] > first_seen[:, None])
            p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[:, None])
            dp = product(grad, tl.trans(values), none, UPCAST)
            ds = p * (dp - dots[:, None]) * slope
            acc = product(ds.to(keys.dtype), keys, acc, UPCAST)
        sequence = tl.load(entry + 2)
    mask = inside[:, None] & (d < D)[None, :]
    out = (acc * scale).to(gq.dtype.element_ty)
    tl.store(gq + row * D + (m[:, None] * (heads * D) + d[None, :]), out, mask=mask)


@triton.jit
def attention_keys(
    g, q, k, v, lse, delta, gk, gv, tiles, sequences, begins, descendants, q_row, q_head, k_row,
    k_head, v_row, v_head, heads, group, D, scale, softcap, window,
    CAPPED: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """dk = scale ds^T q and dv = p^T g of BN keys of one key head. Grid: (tiles x SPLIT) x Hkv."""
    tile, head = tiles + 4 * (tl.program_id(0) // SPLIT), tl.program_id(1)
    skip = (tl.program_id(0) % SPLIT) * BN
    sequence, end = tl.load(tile), tl.load(tile + 2)
    first, position = tl.load(tile + 1) + skip, tl.load(tile + 3) + skip
    if first >= end:
        return
    m, n, d = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    inside = n < end - first
    keys = block(k + head * k_head, first, n, inside, d, k_row, D)
    values = block(v + head * v_head, first, n, inside, d, v_row, D)
    # Rows beyond the tile are later than every query: their zeros are no scores.
    key = tl.where(inside, n, BEYOND)
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BD), tl.float32)
    begin, stop = 0, 0
    if sequence >= 0:
        begin, stop = tl.load(begins + sequence), tl.load(begins + sequence + 1)
    for i in range(begin, stop):
        entry = sequences + 4 * tl.load(descendants + i)
        start, length, before = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
        low = tl.maximum(position - before, 0) // BM * BM
        high = tl.minimum(length, position + BN - 1 + window - before)
        steps = tl.maximum(tl.cdiv(high - low, BM), 0)
        for step in range(0, group * steps):
            reader, r = head * group + step // steps, low + (step % steps) * BM
            there = m < length - r
            queries = block(q + reader * q_head, start + r, m, there, d, q_row, D)
            grad = block(g + reader * D, start + r, m, there, d, heads * D, D)
            row = (start + r).to(tl.int64) * heads + reader
            logs = tl.load(lse + row + m * heads, mask=there, other=0.0) * LOG2E
            dots = tl.load(delta + row + m * heads, mask=there, other=0.0)
            none = tl.zeros((BN, BM), tl.float32)
            s = product(keys, tl.trans(queries), none, UPCAST)
            s, slope = capped(s, scale, softcap, CAPPED)
            last = tl.where(there, m + (before + r - position), -1)
            first_seen = m + (before + r - position - window)
            seen = (key[:, None] <= last[None, :]) & (key[:, None] > first_seen[None, :])
            p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[None, :])
            acc_v = product(p.to(grad.dtype), grad, acc_v, UPCAST)
            dp = product(values, tl.trans(grad), none, UPCAST)
            ds = p * (dp - dots[None, :]) * slope
            acc_k = product(ds.to(queries.dtype), queries, acc_k, UPCAST)
    mask = inside[:, None] & (d < D)[None, :]
    readers = heads // group
    out = (first.to(tl.int64) * readers + head) * D
    out += n[:, None] * (readers * D) + d[None, :]
    tl.store(gk + out, (acc_k * scale).to(gk.dtype.element_ty), mask=mask)
    tl.store(gv + out, acc_v.to(gv.dtype.element_ty), mask=mask)


# (query rows, keys, warps, stages) by BD: as large as sm_80 takes without spilling registers under
# Triton 3.7.1. Of 18 tiles of fp32 queries at 256 none is without; this one spills 24 bytes.
_QUERIES = {64: (64, 32, 4, 3), 128: (64, 32, 4, 2), 256: (32, 32, 4, 2)}
_KEYS = {64: (32, 64, 4, 1), 128: (16, 64, 4, 2), 256: (32, 32, 8, 2)}
_QUERIES_FP32 = {64: (32, 32, 8, 1), 128: (32, 16, 16, 1), 256: (16, 16, 8, 1)}
_KEYS_FP32 = {64: (16, 32, 8, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}


def tile(keys: bool, d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) of `attention_keys` or `attention_queries`."""
    if dtype == torch.float32:
        return (_KEYS_FP32 if keys else _QUERIES_FP32)[head_block(d)]
    return (_KEYS if keys else _QUERIES)[head_block(d)]


@cache
def _variant(keys: bool, capped: bool, d: int, dtype: torch.dtype) -> Variant:
    rows, columns, warps, stages = tile(keys, d, dtype)
    chosen = constants(capped, d, dtype, rows, columns, ROWS // (columns if keys else rows))
    names, kernel = "g q k v o lse delta gq tiles sequences", attention_queries
    if keys:
        names, kernel = "g q k v lse delta gk gv tiles sequences begins descendants", attention_keys
    return attention_variant(kernel, f"{names} {SHAPE}", chosen, warps, stages, dtype)


def variants() -> list[Variant]:
    """Every form of both kernels."""
    return [
        _variant(keys, capped, d, dtype)
        for keys in (False, True)
        for capped in (False, True)
        for d in (64, 128, 256)
        for dtype in DTYPES
    ]


def packed_attention_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: list[Tensor],
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous; arguments as in fedsim_kernels.packed_attention."""
    work, d = Tiles(*tables[2:]), q.shape[2]
    gq, gk, gv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    values = shape(q, k, v, scale, window, softcap)
    for keys, heads, tensors in (
        (False, q.shape[1], (g, q, k, v, o, lse, delta, gq, work.sequences, tables[1])),
        (True, k.shape[1], (g, q, k, v, lse, delta, gk, gv, work.sequences, tables[1],
                            work.begins, work.descendants)),
    ):  # fmt: skip
        variant = _variant(keys, softcap > 0, head_block(d), q.dtype)
        variant.launch((len(work.sequences) * variant.tile["SPLIT"], heads), *tensors, *values)
    return gq, gk, gv
