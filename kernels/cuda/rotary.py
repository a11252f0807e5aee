"""Rotary embedding of q and k in one launch, and its transpose.

The equations are in fedsim_kernels.rotary. A program turns some heads of one row; the heads of k
follow those of q in the grid.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

_HALVES = (32, 64, 128, 256)  # D / 2 <= HALF
_PAIRS = 1024  # numbers of each half that a program turns: 8 a thread


@triton.jit
def _turn(
    x_ptr, y_ptr, cos_ptr, sin_ptr, row, block, H, stride_t, stride_h, D, TRANSPOSE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    half = D // 2
    heads = (block * HEADS + tl.arange(0, HEADS))[:, None]
    # In full, although all heads share the angles: in x's layout they need no exchange of threads.
    cols = tl.arange(0, HALF)[None, :] + tl.zeros([HEADS, 1], tl.int32)
    there = (heads < H) & (cols < half)
    angle = row * D + cols
    cos1 = tl.load(cos_ptr + angle, mask=cols < half, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + angle + half, mask=cols < half, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + angle, mask=cols < half, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + angle + half, mask=cols < half, other=0.0).to(tl.float32)
    if TRANSPOSE:
        sin1, sin2 = -sin2, -sin1
    x = x_ptr + row * stride_t + heads * stride_h + cols
    x1 = tl.load(x, mask=there, other=0.0).to(tl.float32)
    x2 = tl.load(x + half, mask=there, other=0.0).to(tl.float32)
    y = y_ptr + (row * H + heads) * D + cols
    tl.store(y, (x1 * cos1 - x2 * sin1).to(y_ptr.dtype.element_ty), mask=there)
    tl.store(y + half, (x2 * cos2 + x1 * sin2).to(y_ptr.dtype.element_ty), mask=there)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, Hq, Hkv, q_stride_t, q_stride_h,
    k_stride_t, k_stride_h, D, TRANSPOSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    of_q = tl.cdiv(Hq, HEADS)
    if block < of_q:
        _turn(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, row, block, Hq, q_stride_t, q_stride_h, D,
            TRANSPOSE, HEADS, HALF,
        )  # fmt: skip
    else:
        _turn(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, row, block - of_q, Hkv, k_stride_t, k_stride_h, D,
            TRANSPOSE, HEADS, HALF,
        )  # fmt: skip


@cache
def _variant(transpose: bool, dtype: torch.dtype, angles: torch.dtype, half: int) -> Variant:
    x, c = pointer(dtype), pointer(angles)
    signature = {
        "q_ptr": x, "k_ptr": x, "cos_ptr": c, "sin_ptr": c, "q_out_ptr": x, "k_out_ptr": x,
        "Hq": "i32", "Hkv": "i32", "q_stride_t": "i32:16", "q_stride_h": "i32:16",
        "k_stride_t": "i32:16", "k_stride_h": "i32:16", "D": "i32:16", "TRANSPOSE": "constexpr",
        "HEADS": "constexpr", "HALF": "constexpr",
    }  # fmt: skip
    tile = {"TRANSPOSE": int(transpose), "HEADS": _PAIRS // half, "HALF": half}
    return Variant(rotary_kernel, dtype_name(dtype), tile, 4, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """Both directions for each dtype and size; cos and sin come in the dtype of q or in fp32."""
    return [
        _variant(transpose, dtype, angles, half)
        for transpose in (False, True)
        for dtype in DTYPES
        for angles in dict.fromkeys((dtype, torch.float32))
        for half in _HALVES
    ]


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transpose: bool) -> tuple[Tensor, ...]:
    (t, hq, d), hkv = q.shape, k.shape[1]
    half = next((h for h in _HALVES if d <= 2 * h), None)
    if half is None or d % 2:
        raise ValueError(
            f"rotary: got heads of {d}; expected an even size up to {2 * max(_HALVES)} on CUDA. "
            "Rotate in plain torch."
        )
    variant = _variant(transpose, q.dtype, cos.dtype, half)
    heads = variant.tile["HEADS"]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    variant.launch(
        (t, triton.cdiv(hq, heads) + triton.cdiv(hkv, heads)), q, k, cos, sin, q_out, k_out, hq,
        hkv, q.stride(0), q.stride(1), k.stride(0), k.stride(1), d,
    )  # fmt: skip
    return q_out, k_out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """q (T, Hq, D), k (T, Hkv, D), cos and sin (T, D) -> both turned, contiguous."""
    return _rotate(q, k, cos, sin, transpose=False)


def rotary_backward(gq: Tensor, gk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The transposed map: dL/dq (T, Hq, D) and dL/dk (T, Hkv, D), contiguous."""
    return _rotate(gq, gk, cos, sin, transpose=True)
