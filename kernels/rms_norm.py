"""RMS norm of every row, in fp32 and rounded once.

    rstd[t] = 1 / sqrt(mean_i x[t, i]^2 + eps)        y[t] = x[t] rstd[t] w

Backward, for g = dL/dy and a frozen w, with u = g w:

    dx[t] = rstd[t] (u[t] - x[t] rstd[t]^2 mean_i u[t, i] x[t, i])

Paper: Zhang and Sennrich, Root mean square layer normalization, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define, differentiate
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

_SUFFIX = {
    (torch.float32, torch.float32): "f32",
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.float32): "bf16_f32",
}


def _check(x: Tensor, weight: Tensor) -> None:
    fits = x.ndim == 2 and weight.shape == x.shape[1:] and weight.dtype in (x.dtype, torch.float32)
    if not (fits and x.is_floating_point() and x.is_contiguous() and weight.is_contiguous()):
        raise ValueError(
            f"rms_norm: got x {tuple(x.shape)} {x.dtype} with strides {x.stride()}, weight "
            f"{tuple(weight.shape)} {weight.dtype}; expected contiguous (T, D) and (D,), weight "
            "in x's dtype or fp32. Call .contiguous() or .to() first."
        )


def _check_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> None:
    _check(x, weight)
    for name, given, shape, dtype in (
        ("g", g, x.shape, x.dtype), ("rstd", rstd, x.shape[:1], _wide(x.dtype))
    ):  # fmt: skip
        if given.shape != shape or given.dtype != dtype or not given.is_contiguous():
            raise ValueError(
                f"rms_norm: got {name} {tuple(given.shape)} {given.dtype} with strides "
                f"{given.stride()}; expected contiguous {tuple(shape)} {dtype}. Call "
                ".contiguous() first."
            )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the arithmetic is done in."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of every row.

    Args:
        x: (T, D) of any floating dtype, contiguous.
        weight: (D,), x.dtype or fp32.

    Returns:
        y (T, D) in x.dtype and rstd (T,) fp32 (fp64 for fp64).

    Raises:
        ValueError: other shapes, dtypes or strides.
    """
    _check(x, weight)
    wide = x.to(_wide(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(1) + eps)
    return (wide * rstd[:, None] * weight).to(x.dtype), rstd


def rms_norm_backward_ref(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """dL/dx (T, D) in x.dtype from g = dL/dy, same shape and dtype; the others as above."""
    _check_backward(g, x, weight, rstd)
    wide, u = x.to(rstd.dtype), g.to(rstd.dtype) * weight
    back = (u * wide).mean(1) * rstd.square()
    return ((u - wide * back[:, None]) * rstd[:, None]).to(x.dtype)


def _native(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    y, rstd = torch.empty_like(x), x.new_empty(len(x), dtype=torch.float32)
    name = f"rms_norm_{_SUFFIX[x.dtype, weight.dtype]}"
    native.call(name, x, weight, y, rstd, float(eps), *x.shape)
    return y, rstd


def _native_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    _check_backward(g, x, weight, rstd)
    gx = torch.empty_like(x)
    name = f"rms_norm_backward_{_SUFFIX[x.dtype, weight.dtype]}"
    native.call(name, g, x, weight, rstd, gx, *x.shape)
    return gx


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    "rms_norm",
    reference=rms_norm_ref,
    native=_native,
    fake=lambda x, *_: (torch.empty_like(x), x.new_empty(len(x), dtype=_wide(x.dtype))),
)
define(
    "rms_norm_backward(Tensor g, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    "rms_norm",
    reference=rms_norm_backward_ref,
    native=_native_backward,
    fake=lambda g, x, *_: torch.empty_like(x),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.fedsim.rms_norm_backward(g.contiguous(), *ctx.saved_tensors), None, None


differentiate("rms_norm", _backward, _setup)


# Inputs and definition

_EPS = 1e-5


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """x with rows of very different size, weight and g."""
    t, d = case.rows, case.features[0]
    x = draw(t, d, seed=1) * draw(t, 1, seed=2).mul(3).exp()
    return x.to(dtype), 1 + 0.3 * draw(d, dtype=dtype, seed=3), draw(t, d, dtype=dtype, seed=4)


def _run(case: Case, inputs: Tensors) -> Tensors:
    x, weight, g = inputs
    x = x.clone().requires_grad_()
    y, rstd = torch.ops.fedsim.rms_norm(x, weight, _EPS)
    return y.detach(), rstd, *torch.autograd.grad(y, x, g)


def _formula(case: Case, inputs: Tensors) -> Tensors:
    x, weight, g = inputs
    x = x.clone().requires_grad_()
    rstd = 1 / (x.square().mean(1) + _EPS).sqrt()
    y = x * rstd[:, None] * weight
    return y.detach(), rstd.detach(), *torch.autograd.grad(y, x, g)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads g and x and writes dx."""
    n = case.rows * case.features[0]
    return 12.0 * n, 5.0 * n * dtype.itemsize


KERNEL = KernelSpec("rms_norm", ("rms_norm", "rms_norm_backward"), _inputs, _run, _formula, _work)
