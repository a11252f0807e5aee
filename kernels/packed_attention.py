"""Causal attention inside each packed sequence; rows of different sequences never meet.

    s[t, j] = cap(scale q[t] . k[j])      cap(z) = c tanh(z / c), or z
    lse[t] = log sum_j exp s[t, j]        o[t] = sum_j exp(s[t, j] - lse[t]) v[j]

over the keys j of t's own sequence and its ancestors with 0 <= position[t] - position[j] < window.
Softmax in fp32. Grouped-query: query head h reads key head h // (Hq / Hkv). Backward, g = dL/do:

    p = exp(s - lse)     dp = g v^T     ds = p (dp - delta) cap'(s)     delta[t] = sum_j p dp
    dq = scale ds k      dk = scale ds^T q           dv = p^T g

delta also equals g[t] . o[t], which needs no whole row of scores; where the rows are whole, the sum
cancels better: 1.6e-5 against 6e-6 of the largest gradient on a small Qwen3 with fp32 weights.

Paper: Dao, FlashAttention-2, arXiv:2307.08691 (variable-length form).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define, differentiate
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

Saved = tuple[Tensor, Tensor, Tensor, Tensor]


def _check(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor]) -> None:
    if q.shape[1] % k.shape[1] or k.shape != v.shape or q.shape[::2] != k.shape[::2]:
        raise ValueError(
            f"packed attention: got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (T, Hq, D) and twice (T, Hkv, D) with Hq a multiple of Hkv."
        )


# Reference: sequence by sequence, dense


def _sequences(tables: list[Tensor]) -> Iterator[tuple[slice, list[slice], int]]:
    """(rows, rows of ancestors and own, tokens of the ancestors) of each sequence."""
    own: list[list[slice]] = []
    for start, length, parent, before in tables[1].tolist():
        rows = slice(start, start + length)
        own.append([*(own[parent] if parent >= 0 else []), rows])
        yield rows, own[-1], before


def _scores(
    q: Tensor, k: Tensor, before: int, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Capped scores (H, L, before + L), -inf where unseen, and cap'."""
    s = torch.matmul(q, k.transpose(1, 2)) * scale
    slope = torch.ones_like(s)
    if softcap:
        s = torch.tanh(s / softcap)
        slope, s = 1 - s.square(), s * softcap
    length = q.shape[1]
    at = torch.arange(before, before + length, device=q.device)[:, None]
    distance = at - torch.arange(before + length, device=q.device)[None, :]
    seen = (distance >= 0) & (distance < (window or math.inf))
    return s.masked_fill(~seen, -math.inf), slope


def _heads(x: Tensor, rows: list[slice], groups: int) -> Tensor:
    """Rows of (T, H, D) as (H groups, L, D) fp32 (fp64 stays)."""
    picked = torch.cat([x[r] for r in rows]) if len(rows) > 1 else x[rows[0]]
    picked = picked.transpose(0, 1)
    picked = picked if picked.dtype == torch.float64 else picked.float()
    return picked.repeat_interleave(groups, 0) if groups > 1 else picked


def packed_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of one packed pass.

    Args:
        q: (T, Hq, D), k and v: (T, Hkv, D), one floating dtype, last dimension contiguous.
        tables: of `Segments.tables`.
        window: number of keys a query may see, itself included; 0 for all.
        softcap: c, or 0 for none.

    Returns:
        o (T, Hq, D) in q.dtype and lse (T, Hq) fp32; zero on rows of no sequence.
    """
    groups = q.shape[1] // k.shape[1]
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_zeros(q.shape[:2], dtype=torch.float32)
    for rows, seen, before in _sequences(tables):
        keys, values = _heads(k, seen, groups), _heads(v, seen, groups)
        s, _ = _scores(_heads(q, [rows], 1), keys, before, scale, window, softcap)
        norm = torch.logsumexp(s, -1)
        out = torch.matmul(torch.softmax(s, -1), values)
        o[rows], lse[rows] = out.transpose(0, 1).to(q.dtype), norm.T.float()
    return o, lse


def packed_attention_backward_ref(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: list[Tensor],
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous, each in its dtype; zero on rows of no sequence.

    Args:
        g: (T, Hq, D) dL/do. The others: inputs and outputs of the forward.
    """
    groups = q.shape[1] // k.shape[1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    gq, gk, gv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for rows, seen, before in _sequences(tables):
        query, grad = (_heads(x, [rows], 1) for x in (q, g))
        keys, values = _heads(k, seen, groups), _heads(v, seen, groups)
        s, slope = _scores(query, keys, before, scale, window, softcap)
        p = torch.softmax(s, -1)  # exp(s - lse) would carry the rounding of lse, |lse| eps
        dp = torch.matmul(grad, values.transpose(1, 2))
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * slope * scale
        gq[rows] = torch.matmul(ds, keys).transpose(0, 1)
        for total, part in ((gk, ds.mT @ query), (gv, p.mT @ grad)):
            by_key = part.view(len(part) // groups, groups, *part.shape[1:]).sum(1).transpose(0, 1)
            first = 0
            for r in seen:
                total[r] += by_key[first : first + r.stop - r.start]
                first += r.stop - r.start
    return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype)


# C++


def _describe(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float
              ) -> tuple[Any, ...]:  # fmt: skip
    strides = (s for x in (q, k, v) for s in x.stride()[:2])
    return q.shape[1], k.shape[1], q.shape[2], *strides, scale, softcap, window


def _native(q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], scale: float, window: int,
            softcap: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    o = torch.zeros(q.shape, dtype=q.dtype)  # rows of no sequence stay zero
    lse = torch.zeros(q.shape[:2])
    name = "packed_attention_bf16" if q.dtype == torch.bfloat16 else "packed_attention_f32"
    native.call(
        name, q, k, v, o, lse, tables[1], len(tables[1]),
        *_describe(q, k, v, scale, window, softcap),
    )  # fmt: skip
    return o, lse


def _native_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, tables: list[Tensor],
    scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gq, gk, gv = (torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v))
    kind = "bf16" if q.dtype == torch.bfloat16 else "f32"
    native.call(
        f"packed_attention_backward_{kind}", g, q, k, v, gq, gk, gv, tables[1],
        len(tables[1]), *_describe(q, k, v, scale, window, softcap),
    )  # fmt: skip
    return gq, gk, gv


define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor[] tables, float scale, int window, "
    "float softcap) -> (Tensor, Tensor)",
    "packed_attention",
    reference=packed_attention_ref,
    native=_native,
    fake=lambda q, *_: (
        q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    ),
)  # fmt: skip
define(
    "packed_attention_backward(Tensor g, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor[] tables, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    "packed_attention",
    reference=packed_attention_backward_ref,
    native=_native_backward,
    fake=lambda g, q, k, v, *_: (
        q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    ),
)  # fmt: skip


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
    q, k, v, o, lse = ctx.saved_tensors
    grads = torch.ops.fedsim.packed_attention_backward(g.contiguous(), q, k, v, o, lse, *ctx.rest)
    return *grads, [None] * len(ctx.rest[0]), None, None, None


differentiate("packed_attention", _backward, _setup)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], *, scale: float,
    window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """o (T, Hq, D) of q (T, Hq, D), k and v (T, Hkv, D); differentiable.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(q, k, v, tables)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    o, _ = torch.ops.fedsim.packed_attention(q, k, v, tables, scale, window or 0, softcap or 0.0)
    out: Tensor = o
    return out


# Inputs and definition


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """q, k, v as columns of one projection, as a model hands them over, and g."""
    hq, hkv, d = case.heads
    t = case.rows
    whole = draw(t, hq + 2 * hkv, d, dtype=dtype)
    q, k, v = whole.split((hq, hkv, hkv), 1)
    return q, k, v, draw(t, hq, d, dtype=dtype, seed=1)


def _run(case: Case, inputs: Tensors) -> Tensors:
    *leaves, g = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    q, k, v = leaves
    tables = case.segments.tables(g.device)
    out = packed_attention(q, k, v, tables, scale=0.6, window=case.window, softcap=case.softcap)
    return out.detach(), *torch.autograd.grad(out, leaves, g)


def visible(case: Case) -> Tensor:
    """(T, T) bool from the definition: own sequence and ancestors, 0 <= distance < window."""
    segments, t = case.segments, case.rows
    sequence, position = [-1] * t, [0] * t
    for i, n in enumerate(case.lengths):
        before = sum(case.lengths[j] for j in segments.chain(i)[:-1])
        for offset in range(n):
            sequence[segments.starts[i] + offset] = i
            position[segments.starts[i] + offset] = before + offset
    chains = [set(segments.chain(i)) for i in range(len(case.lengths))]
    limit = case.window or math.inf
    return torch.tensor([
        [sequence[i] >= 0 and sequence[j] in chains[sequence[i]]
         and 0 <= position[i] - position[j] < limit for j in range(t)] for i in range(t)
    ])  # fmt: skip


def _formula(case: Case, inputs: Tensors) -> Tensors:
    q, k, v, g = (x.transpose(0, 1) for x in inputs)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    seen = visible(case)
    real = seen.any(1)
    head = torch.arange(q.shape[0]) // (q.shape[0] // k.shape[0])
    z = 0.6 * q @ k[head].transpose(1, 2)
    if case.softcap is not None:
        z = case.softcap * torch.tanh(z / case.softcap)
    p = torch.softmax(z.masked_fill(~seen, -math.inf).masked_fill(~real[:, None], 0), -1)
    out = torch.where(real[:, None], p @ v[head], 0)
    grads = torch.autograd.grad(out, (q, k, v), g)
    return tuple(x.transpose(0, 1) for x in (out.detach(), *grads))


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Two products forward and five backward over the visible pairs."""
    hq, hkv, d = case.heads
    pairs = sum(
        n * (n + 1) // 2 + n * sum(case.lengths[j] for j in case.segments.chain(i)[:-1])
        for i, n in enumerate(case.lengths)
    )
    moved = case.rows * d * (5 * hq + 6 * hkv) * dtype.itemsize
    return 14.0 * pairs * hq * d, float(moved)


KERNEL = KernelSpec(
    "packed_attention", ("packed_attention", "packed_attention_backward"), _inputs, _run,
    _formula, _work,
)  # fmt: skip
