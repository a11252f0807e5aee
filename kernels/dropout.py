"""Dropout whose mask is a function of what an element is, never of where it is packed.

    y[t, j] = x[t, j] / (1 - p)  where  word(t, j) >= floor(p 2^32),  else exactly 0

word(t, j) is word j % 4 of Philox-4x32-10 under a 64-bit key, counters of 32 bits each:

    c0 = position[t] ceil(I / 4) + j // 4        c1 = sequence[t] << 16 | module
    c2 = round << 16 | step                      c3 = purpose << 28 | client

The backward is the same operation on the gradient, so no mask is kept.

Papers: Srivastava et al., Dropout, JMLR 15 (2014); Salmon et al., Parallel random numbers: as easy
as 1, 2, 3, SC 2011 (Philox).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define, differentiate
from fedsim_kernels.philox import philox
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_MASK = 0xFFFFFFFF


def _check(x: Tensor, counters: Tensor, p: float) -> None:
    if x.ndim != 2 or not x.is_floating_point() or not x.is_contiguous():
        raise ValueError(
            f"dropout: got x {tuple(x.shape)} {x.dtype} with strides {x.stride()}; expected "
            "contiguous floating (T, I). Call .contiguous() first."
        )
    shape = (len(x), 4)
    if counters.shape != shape or counters.dtype != torch.int64 or not counters.is_contiguous():
        raise ValueError(
            f"dropout: got counters {tuple(counters.shape)} {counters.dtype}; expected contiguous "
            f"{shape} int64."
        )
    if not 0 <= p < 1:
        raise ValueError(f"dropout: got p {p}; expected 0 <= p < 1.")


def dropout_ref(x: Tensor, counters: Tensor, key: int, module: int, p: float) -> Tensor:
    """Drop elements of packed rows.

    Args:
        x: (T, I) of any floating dtype, contiguous.
        counters: (T, 4) int64: position, sequence << 16, round << 16 | step, purpose << 28 |
            client. A position below 0 is padding, and its row becomes 0. Beyond 2^32 / ceil(I / 4)
            positions, c0 is taken modulo 2^32.
        key: 64 bits, signed or not. module: below 2^16.
        p: probability of dropping, in [0, 1).

    Returns:
        (T, I) in x.dtype.

    Raises:
        ValueError: other shapes, dtypes or strides; p outside [0, 1).
    """
    _check(x, counters, p)
    blocks = (x.shape[1] + 3) // 4
    position, c1, c2, c3 = (c[:, None] for c in counters.unbind(1))
    c0 = (position * blocks + torch.arange(blocks, device=x.device)) & _MASK
    words = torch.stack(philox(key, c0, c1 | module, c2, c3), -1)
    word = words.reshape(len(x), -1)[:, : x.shape[1]]
    return torch.where((word >= int(p * 2**32)) & (position >= 0), x / (1 - p), 0)


def _native(x: Tensor, counters: Tensor, key: int, module: int, p: float) -> Tensor:
    _check(x, counters, p)
    y = torch.empty_like(x)
    native.call(f"dropout_{_SUFFIX[x.dtype]}", x, counters, y, key, module, float(p), *x.shape)
    return y


define(
    "dropout(Tensor x, Tensor counters, int key, int module, float p) -> Tensor",
    "dropout",
    reference=dropout_ref,
    native=_native,
    fake=lambda x, *_: torch.empty_like(x),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, counters, *ctx.rest = inputs
    ctx.save_for_backward(counters)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (counters,) = ctx.saved_tensors
    return torch.ops.fedsim.dropout(g.contiguous(), counters, *ctx.rest), *(None,) * 4


differentiate("dropout", _backward, _setup)


# Inputs and definition

_KEY, _MODULE, _P = -0x123456789ABCDEF, 7, 0.3


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """x, the counters of a step's rows, and g."""
    counters = torch.tensor([[-1, 0, 0, 0]]).repeat(case.rows, 1)
    of = zip(case.segments.starts, case.lengths, case.slots, strict=True)
    for i, (start, length, slot) in enumerate(of):
        rows = counters[start : start + length]
        rows[:, 0] = torch.arange(length)
        rows[:, 1:] = torch.tensor([i << 16, 3 << 16 | 5, 2 << 28 | slot])
    i = case.features[0]
    return (
        draw(case.rows, i, dtype=dtype, seed=1), counters, draw(case.rows, i, dtype=dtype, seed=2)
    )  # fmt: skip


def _run(case: Case, inputs: Tensors) -> Tensors:
    x, counters, g = inputs
    x = x.clone().requires_grad_()
    y = torch.ops.fedsim.dropout(x, counters, _KEY, _MODULE, _P)
    return y.detach(), *torch.autograd.grad(y, x, g)


def _word(key: int, c: list[int]) -> list[int]:
    """The four words of one counter, in plain integers."""
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k0, p1 & _MASK, p0 >> 32 ^ c[3] ^ k1, p0 & _MASK]
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c


def _formula(case: Case, inputs: Tensors) -> Tensors:
    x, counters, g = inputs
    blocks = (x.shape[1] + 3) // 4
    scale = torch.zeros(len(x), 4 * blocks, dtype=x.dtype)
    for t, (position, c1, c2, c3) in enumerate(counters.tolist()):
        for j in range(blocks if position >= 0 else 0):
            word = _word(_KEY, [position * blocks + j, c1 | _MODULE, c2, c3])
            scale[t, 4 * j : 4 * j + 4] = torch.tensor(word) >= int(_P * 2**32)
    scale = scale[:, : x.shape[1]]
    return x * scale / (1 - _P), g * scale / (1 - _P)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Ten rounds of two products and six simpler operations give four words, twice."""
    n = case.rows * case.features[0]
    return 40.0 * n, 4.0 * n * dtype.itemsize


KERNEL = KernelSpec("dropout", ("dropout",), _inputs, _run, _formula, _work)
