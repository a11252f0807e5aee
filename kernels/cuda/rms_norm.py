"""RMSNorm and its backward, one or more whole rows per program, in registers.

The equations are in fedsim_kernels.rms_norm. A row is read once: the largest tile, 16,384 numbers
over 512 threads, is 32 registers a thread.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

# D <= BLOCK -> rows of a program, warps. Small D is the head size of models that norm q and k.
_TILES = {256: (8, 4), 1024: (2, 4), 4096: (1, 8), 16384: (1, 16)}


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, eps, T, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # In full, the weight's columns too: loaded in x's layout they need no exchange of threads.
    cols = tl.arange(0, BLOCK)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    at = rows.to(tl.int64)[:, None] * D + cols
    there = (rows < T)[:, None] & (cols < D)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    mean = tl.math.div_rn(tl.sum(x * x, 1), 1.0 * D)
    rstd = tl.math.div_rn(1.0, tl.math.sqrt_rn(mean + eps))
    w = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * w
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=there)
    tl.store(rstd_ptr + rows, rstd, mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def rms_norm_backward_kernel(
    g_ptr, x_ptr, weight_ptr, rstd_ptr, gx_ptr, T, D, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    at = rows.to(tl.int64)[:, None] * D + cols
    there = (rows < T)[:, None] & (cols < D)
    x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
    g = tl.load(g_ptr + at, mask=there, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=rows < T, other=0.0)[:, None]
    gw = g * w
    unit = x * rstd
    mean = tl.math.div_rn(tl.sum(gw * unit, 1), 1.0 * D)
    gx = rstd * (gw - unit * mean[:, None])
    tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=there)


@cache
def _variant(backward: bool, dtype: torch.dtype, weight: torch.dtype, block: int) -> Variant:
    rows, warps = _TILES[block]
    x, w, f = pointer(dtype), pointer(weight), pointer(torch.float32)
    if backward:
        signature = {"g_ptr": x, "x_ptr": x, "weight_ptr": w, "rstd_ptr": f, "gx_ptr": x}
    else:
        signature = {"x_ptr": x, "weight_ptr": w, "y_ptr": x, "rstd_ptr": f, "eps": "fp32"}
    signature |= {"T": "i32", "D": "i32:16", "ROWS": "constexpr", "BLOCK": "constexpr"}
    kernel = rms_norm_backward_kernel if backward else rms_norm_kernel
    tile = {"ROWS": rows, "BLOCK": block}
    return Variant(kernel, dtype_name(dtype), tile, warps, 1, signature, uses_dot=False)


def _select(backward: bool, x: Tensor, weight: Tensor) -> Variant:
    block = next((b for b in _TILES if x.shape[1] <= b), None)
    if block is None:
        raise ValueError(
            f"rms_norm: got rows of {x.shape[1]}; expected at most {max(_TILES)} on CUDA. "
            "Norm in plain torch."
        )
    return _variant(backward, x.dtype, weight.dtype, block)


def variants() -> list[Variant]:
    """Everything that `_select` can return: weights come in the dtype of x or in fp32."""
    return [
        _variant(backward, dtype, weight, block)
        for backward in (False, True)
        for dtype in DTYPES
        for weight in dict.fromkeys((dtype, torch.float32))
        for block in _TILES
    ]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(T, D), (D,) -> y (T, D) of x's dtype, rstd (T,) fp32."""
    y, rstd = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    variant = _select(False, x, weight)
    grid = (triton.cdiv(len(x), variant.tile["ROWS"]),)
    variant.launch(grid, x, weight, y, rstd, eps, *x.shape)
    return y, rstd


def rms_norm_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """(T, D), (T, D), (D,), (T,) -> dL/dx (T, D)."""
    gx = torch.empty_like(x)
    variant = _select(True, x, weight)
    grid = (triton.cdiv(len(x), variant.tile["ROWS"]),)
    variant.launch(grid, g, x, weight, rstd, gx, *x.shape)
    return gx
