"""Softmax cross-entropy over the vocabulary, in place: one row of logits per program.

The equations are in fedsim_kernels.linear_xent. A row is read twice and written once, block by
block, so any vocabulary fits: running maximum and sum first, then the gradient.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.attention_scores import tanh
from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

# 512 threads with 8 logits each: a pass has 256 rows at once, 2 programs to a multiprocessor.
_LANES, _PER_LANE, _WARPS = 512, 8, 16


@triton.jit
def _score(z, divide, softcap, CAP: tl.constexpr):
    s = z / divide
    if CAP:
        s = softcap * tanh(s / softcap)
    return s


@triton.jit
def softmax_xent_kernel(
    z_ptr, targets_ptr, weight_ptr, nll_ptr, divide, softcap, V, CAP: tl.constexpr,
    LANES: tl.constexpr, PER_LANE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * V
    weight = tl.load(weight_ptr + row)
    cols = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
    BLOCK: tl.constexpr = LANES * PER_LANE
    if weight == 0:  # the row may hold NaN: nothing of it is read
        for first in range(0, V, BLOCK):
            nothing = tl.zeros([LANES, PER_LANE], z_ptr.dtype.element_ty)
            tl.store(z_ptr + first + cols, nothing, mask=first + cols < V)
        tl.store(nll_ptr + row, 0.0)
        return

    target = tl.load(targets_ptr + row)
    hit = _score(tl.load(z_ptr + target).to(tl.float32), divide, softcap, CAP)
    # Each lane keeps its own maximum and sum, so that the threads meet only once, at the end.
    peak = tl.full([LANES], -3.4e38, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, V, BLOCK):
        there = first + cols < V
        z = tl.load(z_ptr + first + cols, mask=there, other=0.0).to(tl.float32)
        s = tl.where(there, _score(z, divide, softcap, CAP), float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)
        peak = higher
    top = tl.max(peak, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
    tl.store(nll_ptr + row, weight * (norm - hit))

    factor = weight / divide
    for first in range(0, V, BLOCK):
        there = first + cols < V
        z = tl.load(z_ptr + first + cols, mask=there, other=0.0).to(tl.float32)
        s = _score(z, divide, softcap, CAP)
        d = tl.exp(s - norm) - tl.where(first + cols == target, 1.0, 0.0)
        if CAP:
            d *= 1 - (s / softcap) * (s / softcap)
        tl.store(z_ptr + first + cols, (d * factor).to(z_ptr.dtype.element_ty), mask=there)


@cache
def _variant(dtype: torch.dtype, cap: bool) -> Variant:
    f = pointer(torch.float32)
    signature = {
        "z_ptr": pointer(dtype), "targets_ptr": pointer(torch.int64), "weight_ptr": f,
        "nll_ptr": f, "divide": "fp32", "softcap": "fp32", "V": "i32:16", "CAP": "constexpr",
        "LANES": "constexpr", "PER_LANE": "constexpr",
    }  # fmt: skip
    tile = {"CAP": int(cap), "LANES": _LANES, "PER_LANE": _PER_LANE}
    name = dtype_name(dtype)
    return Variant(softmax_xent_kernel, name, tile, _WARPS, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """With a soft-cap and without, in each dtype."""
    return [_variant(dtype, cap) for dtype in DTYPES for cap in (False, True)]


def softmax_xent(
    z: Tensor, targets: Tensor, weight: Tensor, divide: float, softcap: float
) -> Tensor:
    """Logits z (L, V), overwritten by dLoss/dz; targets, weight (L,) -> nll (L,) fp32."""
    nll = z.new_empty(len(z), dtype=torch.float32)
    variant = _variant(z.dtype, softcap > 0)
    variant.launch((len(z),), z, targets, weight, nll, divide, softcap, z.shape[1])
    return nll
