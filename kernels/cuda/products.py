"""Matrix products that are also right in Triton's interpreter."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


def upcast(dtype: torch.dtype) -> int:
    """1 where operands must be widened first: bf16 in the interpreter.

    It holds bf16 blocks as uint16 and computes on those bits, silently; only load, store and
    conversions know better. A GPU multiplies bf16 as it is.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return int(interpreted and dtype == torch.bfloat16)


def padded(n: int) -> int:
    """The size of a block that holds n: a power of two, and 16 at least, as tl.dot wants."""
    return max(16, 1 << (n - 1).bit_length())


@triton.jit
def product(a, b, total, UPCAST: tl.constexpr):
    """total + a b in fp32; a and b of one dtype. No TF32: fp32 means fp32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
