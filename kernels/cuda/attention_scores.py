"""Scores of packed attention, as the Triton forward and both backward kernels compute them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.products import upcast
from fedsim_kernels.cuda.variant import Variant, dtype_name, pointer

UNBOUNDED = 1 << 30  # a window that nothing exceeds
BEYOND = tl.constexpr(UNBOUNDED)  # and a position that none reaches
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(z):
    """To 2 ulp. Triton has none of its own that the interpreter knows; below 0.3, where the
    quotient would cancel, the series to z^9, whose remainder is 5e-8, less than an ulp."""
    w = z * z
    series = -5.3968253968253971e-02 + 2.1869488536155202e-02 * w
    series = 1.3333333333333333e-01 + series * w
    series = -3.3333333333333333e-01 + series * w
    e = tl.exp(-2.0 * tl.abs(z))
    quotient = (1.0 - e) / (1.0 + e)
    return tl.where(w < 0.09, z + z * (w * series), tl.where(z < 0.0, -quotient, quotient))


@triton.jit
def capped(product, scale, softcap, CAPPED: tl.constexpr):
    """(score in units of log 2, its slope by scale q.k) of products q.k in fp32."""
    s = product * scale
    slope = tl.full(s.shape, 1.0, tl.float32)
    if CAPPED:
        t = tanh(s / softcap)
        s = softcap * t
        slope = 1.0 - t * t
    return s * LOG2E, slope


@triton.jit
def block(base, first, rows, within, columns, stride, D):
    """Rows `first` + `rows` of one head; zero where there is none. Only `first` is wide: what
    differs from element to element stays in 32 bits."""
    at = base + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    return tl.load(at, mask=within[:, None] & (columns < D)[None, :], other=0.0)


# What launchers can select

_TABLES = ("tiles", "sequences", "begins", "descendants")
_FP32 = ("lse", "delta")
_FLOATS = ("scale", "softcap")
SHAPE = "q_row q_head k_row k_head v_row v_head heads group D scale softcap window"


def attention_variant(
    kernel: object, arguments: str, chosen: dict[str, int], warps: int, stages: int,
    dtype: torch.dtype,
) -> Variant:  # fmt: skip
    """A variant of a kernel whose arguments are named as in all three."""
    tensors = arguments.split()
    types = dict.fromkeys(tensors, pointer(dtype))
    types |= {n: "*i32" for n in _TABLES if n in tensors}
    types |= {n: "*fp32" for n in _FP32 if n in tensors}
    types |= dict.fromkeys(SHAPE.split(), "i32:16") | dict.fromkeys(_FLOATS, "fp32")
    types |= dict.fromkeys(("heads", "group", "window"), "i32")
    return Variant(
        kernel, dtype_name(dtype), chosen, warps, stages,
        types | dict.fromkeys(chosen, "constexpr"), True,
    )  # fmt: skip


def head_block(d: int) -> int:
    """BD for heads of d features: 64, as below it there are only toy models, 128 or 256.

    Raises:
        ValueError: d beyond 256.
    """
    if d > 256:
        raise ValueError(
            f"packed attention: got heads of {d} features; expected at most 256 on CUDA. "
            "Use the reference on CPU."
        )
    return 64 if d <= 64 else 128 if d <= 128 else 256


def constants(
    capped: bool, d: int, dtype: torch.dtype, queries: int, keys: int, split: int
) -> dict[str, int]:
    """BM query rows by BN keys; SPLIT programs share a tile of the table."""
    return {
        "CAPPED": int(capped), "UPCAST": upcast(dtype), "BM": queries, "BN": keys,
        "BD": head_block(d), "SPLIT": split,
    }  # fmt: skip


def shape(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, softcap: float
) -> tuple[int | float, ...]:
    """The values of SHAPE."""
    strides = (n for x in (q, k, v) for n in x.stride()[:2])
    heads, d = q.shape[1:]
    return (*strides, heads, heads // k.shape[1], d, scale, softcap, window or UNBOUNDED)
