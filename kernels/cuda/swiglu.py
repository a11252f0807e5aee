"""SwiGLU and its backward, elementwise; the equations are in fedsim_kernels.swiglu."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

_BLOCK = 1024  # columns of a program: 8 a thread, one 16-byte access in bf16


@triton.jit
def swiglu_kernel(y_ptr, out_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = cols < F
    gate = tl.load(y_ptr + row * 2 * F + cols, mask=there, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + row * 2 * F + F + cols, mask=there, other=0.0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def swiglu_backward_kernel(g_ptr, y_ptr, gy_ptr, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = cols < F
    g = tl.load(g_ptr + row * F + cols, mask=there, other=0.0).to(tl.float32)
    gate = tl.load(y_ptr + row * 2 * F + cols, mask=there, other=0.0).to(tl.float32)
    up = tl.load(y_ptr + row * 2 * F + F + cols, mask=there, other=0.0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-gate))
    g_gate = g * up * sigmoid * (1 + gate * (1 - sigmoid))
    g_up = g * gate * sigmoid
    to = gy_ptr + row * 2 * F + cols
    tl.store(to, g_gate.to(gy_ptr.dtype.element_ty), mask=there)
    tl.store(to + F, g_up.to(gy_ptr.dtype.element_ty), mask=there)


@cache
def _variant(backward: bool, dtype: torch.dtype) -> Variant:
    names = ("g_ptr", "y_ptr", "gy_ptr") if backward else ("y_ptr", "out_ptr")
    signature = dict.fromkeys(names, pointer(dtype)) | {"F": "i32:16", "BLOCK": "constexpr"}
    kernel = swiglu_backward_kernel if backward else swiglu_kernel
    return Variant(kernel, dtype_name(dtype), {"BLOCK": _BLOCK}, 4, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """Forward and backward in each dtype."""
    return [_variant(backward, dtype) for backward in (False, True) for dtype in DTYPES]


def swiglu(y: Tensor) -> Tensor:
    """(T, 2F) -> (T, F)."""
    t, f = y.shape[0], y.shape[1] // 2
    out = y.new_empty(t, f)
    _variant(False, y.dtype).launch((t, triton.cdiv(f, _BLOCK)), y, out, f)
    return out


def swiglu_backward(g: Tensor, y: Tensor) -> Tensor:
    """dL/dout (T, F), (T, 2F) -> dL/dy (T, 2F)."""
    t, f = g.shape
    gy = torch.empty_like(y)
    _variant(True, y.dtype).launch((t, triton.cdiv(f, _BLOCK)), g, y, gy, f)
    return gy
