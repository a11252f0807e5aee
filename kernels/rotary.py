"""Rotary positions: queries and keys turned by the angles of their positions.

    y = x cos + rot(x) sin        rot(x1 | x2) = -x2 | x1

in fp32, rounded once. Backward, for g = dL/dy, the transposed map; the two halves of cos and sin
need not be equal:

    dx1 = g1 cos1 + g2 sin2        dx2 = g2 cos2 - g1 sin1

Paper: Su et al., RoFormer, arXiv:2104.09864.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define, differentiate
from fedsim_kernels.spec import CASES, Case, KernelSpec, Tensors, draw

_SUFFIX = {
    (torch.float32, torch.float32): "f32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_f32",
}
Pair = tuple[Tensor, Tensor]


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    rows, d = len(q), q.shape[-1]
    for name, x in (("q", q), ("k", k)):
        fits = x.ndim == 3 and len(x) == rows and x.shape[2] == d and d % 2 == 0
        fits &= x.is_floating_point()
        if not fits or x.dtype != q.dtype or (x.stride(2) != 1 and x.numel()):
            raise ValueError(
                f"rotary: got {name} {tuple(x.shape)} {x.dtype} with strides {x.stride()}; "
                f"expected ({rows}, heads, {d}) {q.dtype}, D even, its elements adjacent. Call "
                ".contiguous() first."
            )
    for name, x in (("cos", cos), ("sin", sin)):
        fits = x.shape == (rows, d) and x.dtype in (q.dtype, torch.float32)
        if not fits or x.dtype != cos.dtype or not x.is_contiguous():
            raise ValueError(
                f"rotary: got {name} {tuple(x.shape)} {x.dtype} with strides {x.stride()}; "
                f"expected contiguous ({rows}, {d}), both {q.dtype} or fp32. Call .contiguous() "
                "first."
            )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_ref(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """Turn q and k.

    Args:
        q, k: (T, Hq, D) and (T, Hkv, D), one floating dtype; strides over T and H are free.
        cos, sin: (T, D), q.dtype or fp32.

    Returns:
        The turned q and k, contiguous, in q.dtype.

    Raises:
        ValueError: other shapes, dtypes or strides, or an odd D.
    """
    _check(q, k, cos, sin)
    c, s = _wide(cos)[:, None], _wide(sin)[:, None]

    def turn(x: Tensor) -> Tensor:
        x1, x2 = _wide(x).chunk(2, 2)
        return (_wide(x) * c + torch.cat((-x2, x1), 2) * s).to(x.dtype).contiguous()

    return turn(q), turn(k)


def rotary_backward_ref(gq: Tensor, gk: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    """dL/dq and dL/dk, contiguous, from the gradients of the turned q and k."""
    _check(gq, gk, cos, sin)
    c, s = _wide(cos)[:, None], _wide(sin)[:, None]

    def turn_back(g: Tensor) -> Tensor:
        s1, s2 = (_wide(g) * s).chunk(2, 2)
        return (_wide(g) * c + torch.cat((s2, -s1), 2)).to(g.dtype).contiguous()

    return turn_back(gq), turn_back(gk)


def _call(name: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    _check(q, k, cos, sin)
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    native.call(
        f"{name}_{_SUFFIX[q.dtype, cos.dtype]}", q, k, cos, sin, *out, len(q), q.shape[1],
        k.shape[1], q.shape[2], *q.stride()[:2], *k.stride()[:2],
    )  # fmt: skip
    return out


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
    return q.new_empty(q.shape), k.new_empty(k.shape)


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    "rotary",
    reference=rotary_ref,
    native=lambda *inputs: _call("rotary", *inputs),
    fake=_fake,
)
define(
    "rotary_backward(Tensor gq, Tensor gk, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    "rotary",
    reference=rotary_backward_ref,
    native=lambda *inputs: _call("rotary_backward", *inputs),
    fake=_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    gq, gk = (g if g.stride(2) == 1 else g.contiguous() for g in grads)
    return *torch.ops.fedsim.rotary_backward(gq, gk, *ctx.saved_tensors), None, None


differentiate("rotary", _backward, _setup)


# Inputs and definition; D = 5 cannot be halved


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """q and k as columns of one projection; cos and sin whose halves differ; both gradients."""
    hq, hkv, d = case.heads
    q, k, _ = draw(case.rows, hq + 2 * hkv, d, dtype=dtype).split((hq, hkv, hkv), 1)
    angle = 3 * draw(case.rows, d, seed=1)
    gradients = draw(case.rows, hq + hkv, d, dtype=dtype, seed=2).split((hq, hkv), 1)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype), *gradients


def _run(case: Case, inputs: Tensors) -> Tensors:
    q, k, cos, sin, *gradients = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    out = torch.ops.fedsim.rotary(*leaves, cos, sin)
    return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients)


def _formula(case: Case, inputs: Tensors) -> Tensors:
    q, k, cos, sin, *gradients = inputs
    d = case.heads[2]
    swap = torch.zeros(d, d, dtype=q.dtype)  # rot as a matrix
    for i in range(d // 2):
        swap[i + d // 2, i], swap[i, i + d // 2] = -1, 1
    leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
    out = [x * cos[:, None] + x @ swap * sin[:, None] for x in leaves]
    return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, gradients)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """q and k are read and written, forward and backward."""
    hq, hkv, d = case.heads
    n = case.rows * (hq + hkv) * d
    return 6.0 * n, 4.0 * n * dtype.itemsize


KERNEL = KernelSpec(
    "rotary", ("rotary", "rotary_backward"), _inputs, _run, _formula, _work,
    tuple(c if c.heads[2] % 2 == 0 else replace(c, heads=(3, 3, 10)) for c in CASES),
)  # fmt: skip
