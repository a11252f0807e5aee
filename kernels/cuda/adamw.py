"""AdamW with clipping over (K, P): three launches, no host sync, no atomics.

Equations, overflow rule and operation order are in fedsim_kernels.adamw. The first launch leaves
the sum of g^2 and max|row| of every (row, block); the second adds a row's up in order and decides
whether the row steps; the third updates. Rows at rest return at once. Blocks are fixed, so that
a norm depends neither on the device nor on the other rows.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import Variant, pointer

LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
FLUSHED = tl.constexpr(2.0**-56)  # as in fedsim_kernels.adamw.plan, which the second launch is
_BLOCK = 4096  # columns of a program in the first launch: 16 a thread
_PARTS = 1024  # partial sums that the second launch reads at once
_UPDATE = 1024  # columns of a program in the third: 8 a thread of each of four matrices
PLAN = tl.constexpr(4)  # numbers per row that the second launch leaves for the third


@triton.jit
def adamw_partials_kernel(
    row_ptr, grad_ptr, active_ptr, parts_ptr, row_stride, grad_stride, P, BLOCK: tl.constexpr
):
    k = tl.program_id(1).to(tl.int64)
    if tl.load(active_ptr + k):
        block = tl.program_id(0)
        blocks = tl.num_programs(0)
        cols = block * BLOCK + tl.arange(0, BLOCK)
        there = cols < P
        g = tl.load(grad_ptr + k * grad_stride + cols, mask=there, other=0.0)
        x = tl.load(row_ptr + k * row_stride + cols, mask=there, other=0.0)
        # A maximum drops NaN, infinity it keeps; both mean the same: this row is sick.
        size = tl.where(x == x, tl.abs(x), float("inf"))
        to = parts_ptr + (k * blocks + block) * 2
        wide = g.to(tl.float64)
        tl.store(to, tl.sum(wide * wide, 0))
        tl.store(to + 1, tl.max(size, 0).to(tl.float64))


@triton.jit(do_not_specialize=["blocks"])
def adamw_plan_kernel(
    parts_ptr, lr_ptr, step_ptr, active_ptr, scale_peak_ptr, plan_ptr, norm_ptr, log1, log1_low,
    log2, log2_low, rest1, rest2, eps, weight_decay, max_norm, blocks, SCALED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    if tl.load(active_ptr + k):
        squares = tl.zeros([PARTS], tl.float64)
        sizes = tl.zeros([PARTS], tl.float64)
        for first in range(0, blocks, PARTS):
            i = first + tl.arange(0, PARTS)
            at = parts_ptr + (k * blocks + i) * 2
            squares += tl.load(at, mask=i < blocks, other=0.0)
            sizes = tl.maximum(sizes, tl.load(at + 1, mask=i < blocks, other=0.0))
        norm = tl.math.sqrt_rn(tl.sum(squares, 0).to(tl.float32))

        n = tl.load(step_ptr + k).to(tl.float64)
        decay1 = n * log1 + n * log1_low
        decay2 = n * log2 + n * log2_low
        correct1 = 1 - tl.exp(decay1)
        correct2 = 1 - tl.exp(decay2)
        # sum over i < n of (b1^2 / b2)^i; where that ratio rounds to 1 the quotient is 0 / 0.
        decay = 2 * decay1 - decay2
        flat = tl.abs(decay) < 1e-9 * n
        below = tl.where(flat, 1.0, 1 - tl.exp(decay / n))
        terms = tl.where(flat, n, (1 - tl.exp(decay)) / below)
        bound = rest1 / correct1 * tl.sqrt(correct2 / rest2 * terms)
        rate = tl.load(lr_ptr + k).to(tl.float64)
        if SCALED:
            rate *= tl.load(scale_peak_ptr).to(tl.float64)
        largest = tl.maximum(tl.max(sizes, 0), 1.0) * (1 + rate * weight_decay)
        largest = 1.001 * (largest + rate * bound * (1 + FLUSHED / eps))
        fits = largest < LARGEST
        finite = (norm == norm) & (norm < float("inf"))
        tl.store(norm_ptr + k, tl.where(finite & (fits == 0), float("inf"), norm))
        plan = plan_ptr + k * PLAN
        tl.store(plan, tl.where(finite & fits, 1.0, 0.0))
        tl.store(plan + 1, tl.minimum(tl.math.div_rn(max_norm, norm + 1e-6), 1.0))
        tl.store(plan + 2, correct1.to(tl.float32))
        tl.store(plan + 3, tl.sqrt(correct2).to(tl.float32))
    else:
        tl.store(norm_ptr + k, 0.0)
        tl.store(plan_ptr + k * PLAN, 0.0)


@triton.jit
def adamw_update_kernel(
    row_ptr, grad_ptr, m_ptr, v_ptr, lr_ptr, scale_ptr, plan_ptr, row_stride, grad_stride,
    m_stride, v_stride, rest1, beta2, rest2, eps, weight_decay, P, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(1).to(tl.int64)
    plan = plan_ptr + k * PLAN
    if tl.load(plan) != 0:
        cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        there = cols < P
        rate = tl.load(lr_ptr + k)
        if SCALED:
            rate = rate * tl.load(scale_ptr + cols, mask=there, other=0.0)
        g = tl.load(grad_ptr + k * grad_stride + cols, mask=there, other=0.0) * tl.load(plan + 1)
        m = tl.load(m_ptr + k * m_stride + cols, mask=there, other=0.0)
        v = tl.load(v_ptr + k * v_stride + cols, mask=there, other=0.0)
        x = tl.load(row_ptr + k * row_stride + cols, mask=there, other=0.0)
        m += rest1 * (g - m)
        v = v * beta2 + rest2 * g * g
        # Division and root rounded correctly: 28 bytes a number leave time for them.
        below = tl.math.div_rn(tl.math.sqrt_rn(v), tl.load(plan + 3)) + eps
        # The ratio first: it is bounded, while rate x m could overflow.
        ratio = tl.math.div_rn(tl.math.div_rn(m, tl.load(plan + 2)), below)
        x = x * (1 - rate * weight_decay) - rate * ratio
        tl.store(m_ptr + k * m_stride + cols, m, mask=there)
        tl.store(v_ptr + k * v_stride + cols, v, mask=there)
        tl.store(row_ptr + k * row_stride + cols, x, mask=there)


@cache
def _partials() -> Variant:
    f = pointer(torch.float32)
    signature = {
        "row_ptr": f, "grad_ptr": f, "active_ptr": pointer(torch.bool),
        "parts_ptr": pointer(torch.float64), "row_stride": "i32:16", "grad_stride": "i32:16",
        "P": "i32:16", "BLOCK": "constexpr",
    }  # fmt: skip
    return _variant(adamw_partials_kernel, {"BLOCK": _BLOCK}, 8, signature)


@cache
def _plan(step: torch.dtype, scaled: bool) -> Variant:
    f = pointer(torch.float32)
    signature = {
        "parts_ptr": pointer(torch.float64), "lr_ptr": f, "step_ptr": pointer(step),
        "active_ptr": pointer(torch.bool), "scale_peak_ptr": f, "plan_ptr": f, "norm_ptr": f,
        "log1": "fp32", "log1_low": "fp32", "log2": "fp32", "log2_low": "fp32", "rest1": "fp32",
        "rest2": "fp32", "eps": "fp32", "weight_decay": "fp32", "max_norm": "fp32", "blocks": "i32",
        "SCALED": "constexpr", "PARTS": "constexpr",
    }  # fmt: skip
    return _variant(adamw_plan_kernel, {"SCALED": int(scaled), "PARTS": _PARTS}, 4, signature)


@cache
def _update(scaled: bool) -> Variant:
    f = pointer(torch.float32)
    matrices, strides = ("row", "grad", "m", "v"), ("row_stride", "grad_stride", "m_stride")
    signature = {f"{name}_ptr": f for name in (*matrices, "lr", "scale", "plan")}
    signature |= dict.fromkeys((*strides, "v_stride"), "i32:16")
    signature |= dict.fromkeys(("rest1", "beta2", "rest2", "eps", "weight_decay"), "fp32")
    signature |= {"P": "i32:16", "SCALED": "constexpr", "BLOCK": "constexpr"}
    return _variant(adamw_update_kernel, {"SCALED": int(scaled), "BLOCK": _UPDATE}, 4, signature)


def _variant(kernel: Any, tile: dict[str, int], warps: int, signature: dict[str, str]) -> Variant:
    return Variant(kernel, "float32", tile, warps, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """Steps come in fp32 or int64; with `lr_scale` and without."""
    plans = [_plan(step, s) for step in (torch.float32, torch.int64) for s in (False, True)]
    return [_partials(), *plans, _update(False), _update(True)]


def _two(x: float) -> tuple[float, float]:
    """x as the sum of two fp32 numbers: 48 bits, which a kernel can take."""
    high = torch.tensor(x, dtype=torch.float32).item()
    return high, x - high


def adamw(
    row: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, active: Tensor,
    lr_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_norm: float,
) -> Tensor:  # fmt: skip
    """One step of the active rows of (K, P), in place -> (K,) fp32 norms before clipping."""
    rows, p = row.shape
    blocks = triton.cdiv(p, _BLOCK)
    parts = row.new_empty(rows, blocks, 2, dtype=torch.float64)
    plan, norm = row.new_empty(rows, PLAN.value), row.new_empty(rows)
    _partials().launch((blocks, rows), row, grad, active, parts, row.stride(0), grad.stride(0), p)
    scaled = lr_scale is not None
    # The logarithm of 0 is -inf, and n times the two halves of that is no number.
    logs = (_two(math.log(max(b, 1e-300))) for b in (beta1, beta2))
    _plan(step.dtype, scaled).launch(
        (rows,), parts, lr, step, active, lr if lr_scale is None else lr_scale.amax(), plan, norm,
        *next(logs), *next(logs), 1 - beta1, 1 - beta2, eps, weight_decay, max_norm, blocks,
    )  # fmt: skip
    _update(scaled).launch(
        (triton.cdiv(p, _UPDATE), rows), row, grad, m, v, lr, lr if lr_scale is None else lr_scale,
        plan, row.stride(0), grad.stride(0), m.stride(0), v.stride(0), 1 - beta1, beta2,
        1 - beta2, eps, weight_decay, p,
    )  # fmt: skip
    return norm
