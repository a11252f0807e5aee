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
    LOG2E, SHAPE, attention_variant, block, capped, constants, shape,
)  # fmt: skip
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
    t, d = first + tl.arange(0, BM), tl.arange(0, BD)
    own = block(q + head * q_head, t, t < end, d, q_row, D)
    grad = block(g + head * D, t, t < end, d, heads * D, D)
    out = block(o + head * D, t, t < end, d, heads * D, D)
    dots = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    row = t.to(tl.int64) * heads + head
    tl.store(delta + row, dots, mask=t < end)
    logs = tl.load(lse + row, mask=t < end, other=0.0) * LOG2E
    k += (head // group) * k_head
    v += (head // group) * v_head
    at = position + tl.arange(0, BM)
    acc = tl.zeros((BM, BD), tl.float32)
    while sequence >= 0:
        entry = sequences + 4 * sequence
        start, length, before = tl.load(entry), tl.load(entry + 1), tl.load(entry + 3)
        low = tl.maximum(position - window + 1 - before, 0) // BN * BN
        high = tl.minimum(length, position + BM - before)
        for c in range(low, high, BN):
            n = c + tl.arange(0, BN)
            keys = block(k, start + n, n < length, d, k_row, D)
            values = block(v, start + n, n < length, d, v_row, D)
            none = tl.zeros((BM, BN), tl.float32)
            s, slope = capped(product(own, tl.trans(keys), none, UPCAST), scale, softcap, CAPPED)
            distance = at[:, None] - (before + n)[None, :]
            seen = (distance >= 0) & (distance < window) & (n < length)[None, :]
            p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[:, None])
            dp = product(grad, tl.trans(values), none, UPCAST)
            ds = p * (dp - dots[:, None]) * slope
            acc = product(ds.to(keys.dtype), keys, acc, UPCAST)
        sequence = tl.load(entry + 2)
    mask = (t < end)[:, None] & (d < D)[None, :]
    out = (acc * scale).to(gq.dtype.element_ty)
    tl.store(gq + row[:, None] * D + d[None, :], out, mask=mask)


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
    t, d = first + tl.arange(0, BN), tl.arange(0, BD)
    keys = block(k + head * k_head, t, t < end, d, k_row, D)
    values = block(v + head * v_head, t, t < end, d, v_row, D)
    at = position + tl.arange(0, BN)
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
        for member in range(0, group):
            reader = head * group + member
            for r in range(low, high, BM):
                n = r + tl.arange(0, BM)
                queries = block(q + reader * q_head, start + n, n < length, d, q_row, D)
                grad = block(g + reader * D, start + n, n < length, d, heads * D, D)
                row = (start + n).to(tl.int64) * heads + reader
                logs = tl.load(lse + row, mask=n < length, other=0.0) * LOG2E
                dots = tl.load(delta + row, mask=n < length, other=0.0)
                none = tl.zeros((BN, BM), tl.float32)
                s = product(keys, tl.trans(queries), none, UPCAST)
                s, slope = capped(s, scale, softcap, CAPPED)
                distance = (before + n)[None, :] - at[:, None]
                seen = (distance >= 0) & (distance < window) & (n < length)[None, :]
                p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[None, :])
                acc_v = product(p.to(grad.dtype), grad, acc_v, UPCAST)
                dp = product(values, tl.trans(grad), none, UPCAST)
                ds = p * (dp - dots[None, :]) * slope
                acc_k = product(ds.to(queries.dtype), queries, acc_k, UPCAST)
    mask = (t < end)[:, None] & (d < D)[None, :]
    out = (t.to(tl.int64) * (heads // group) + head)[:, None] * D + d[None, :]
    tl.store(gk + out, (acc_k * scale).to(gk.dtype.element_ty), mask=mask)
    tl.store(gv + out, acc_v.to(gv.dtype.element_ty), mask=mask)


def tile(keys: bool, d: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(query rows, keys, warps, stages) of `attention_keys` or `attention_queries`."""
    return 64, 64, 4, 2


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
        variant = _variant(keys, softcap > 0, d, q.dtype)
        variant.launch(
            (len(work.sequences) * variant.tile["SPLIT"], heads), *tensors, *values
        )
    return gq, gk, gv
