"""LoRA dropout by counted random words; the counters are explained in fedsim_kernels.dropout."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

_BLOCK = 1024  # columns of a program: 8 a thread, two Philox blocks


@triton.jit(do_not_specialize=["key_low", "key_high", "module", "threshold"])
def dropout_kernel(
    x_ptr,
    counters_ptr,
    y_ptr,
    key_low,
    key_high,
    module,
    threshold,
    keep,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK
    position = tl.load(counters_ptr + row * 4)
    c1 = (tl.load(counters_ptr + row * 4 + 1) | module).to(tl.uint32)
    c2 = tl.load(counters_ptr + row * 4 + 2).to(tl.uint32)
    c3 = tl.load(counters_ptr + row * 4 + 3).to(tl.uint32)
    # Every counter is a 32-bit block: Triton's Philox is another generator for 64-bit counters.
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    c0 = (position * tl.cdiv(width, 4)).to(tl.uint32) + block
    low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    key = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    w0, w1, w2, w3 = tl.philox(key, c0, zero + c1, zero + c2, zero + c3)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    cols = first + tl.arange(0, BLOCK)
    there = cols < width
    # As a block: Triton's interpreter makes an integer of a scalar condition that meets a mask.
    real = tl.full([BLOCK], 0, tl.int64) + position >= 0
    kept = (word >= threshold.to(tl.uint32, bitcast=True)) & real
    x = tl.load(x_ptr + row * width + cols, mask=there, other=0.0).to(tl.float32)
    y = tl.where(kept, tl.math.div_rn(x, keep), 0.0)
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=there)


@cache
def _variant(dtype: torch.dtype) -> Variant:
    x = pointer(dtype)
    signature = {
        "x_ptr": x, "counters_ptr": pointer(torch.int64), "y_ptr": x, "key_low": "i32",
        "key_high": "i32", "module": "i32", "threshold": "i32", "keep": "fp32", "width": "i32:16",
        "BLOCK": "constexpr",
    }  # fmt: skip
    name = dtype_name(dtype)
    return Variant(dropout_kernel, name, {"BLOCK": _BLOCK}, 4, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """One in each dtype."""
    return [_variant(dtype) for dtype in DTYPES]


def _signed(word: int) -> int:
    """The int32 with these 32 bits: a kernel argument beyond 2^31 would become 64 bits wide."""
    word &= 0xFFFFFFFF
    return word - (word >> 31 << 32)


def dropout(x: Tensor, counters: Tensor, key: int, module: int, p: float) -> Tensor:
    """x (T, I), counters (T, 4) int64 -> x / (1 - p) where kept, exactly 0 elsewhere."""
    t, i = x.shape
    y = torch.empty_like(x)
    _variant(x.dtype).launch(
        (t, triton.cdiv(i, _BLOCK)), x, counters, y, _signed(key), _signed(key >> 32), module,
        _signed(int(p * 2**32)), 1 - p, i,
    )  # fmt: skip
    return y
