"""The gated unit of a transformer's MLP, on gate and up as one product wrote them.

    y = gate | up        out = silu(gate) up        silu(z) = z s, s = 1 / (1 + exp(-z))

in fp32, rounded once. Backward, for g = dL/dout:

    dgate = g up s (1 + gate (1 - s))        dup = g gate s

Paper: Shazeer, GLU variants improve transformer, arXiv:2002.05202.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define, differentiate
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _check(y: Tensor, g: Tensor | None = None) -> None:
    if y.ndim != 2 or y.shape[1] % 2 or not y.is_contiguous() or not y.is_floating_point():
        raise ValueError(
            f"swiglu: got y {tuple(y.shape)} {y.dtype} with strides {y.stride()}; expected "
            "contiguous floating (T, 2F). Call .contiguous() first."
        )
    half = (len(y), y.shape[1] // 2)
    if g is not None and not (g.shape == half and g.dtype == y.dtype and g.is_contiguous()):
        raise ValueError(
            f"swiglu: got g {tuple(g.shape)} {g.dtype} with strides {g.stride()}; expected "
            f"contiguous {half} {y.dtype}. Call .contiguous() first."
        )


def _halves(y: Tensor) -> tuple[Tensor, ...]:
    return y.to(torch.promote_types(y.dtype, torch.float32)).chunk(2, 1)


def swiglu_ref(y: Tensor) -> Tensor:
    """silu(gate) up: (T, 2F) of any floating dtype, contiguous -> (T, F) in the same.

    Raises:
        ValueError: an odd number of columns, another dtype or strides.
    """
    _check(y)
    gate, up = _halves(y)
    return (gate * torch.sigmoid(gate) * up).to(y.dtype)


def swiglu_backward_ref(g: Tensor, y: Tensor) -> Tensor:
    """dL/dy (T, 2F) from g = dL/dout (T, F) and the input y, one dtype."""
    _check(y, g)
    gate, up = _halves(y)
    wide, s = g.to(gate.dtype), torch.sigmoid(gate)
    return torch.cat((wide * up * s * (1 + gate * (1 - s)), wide * gate * s), 1).to(y.dtype)


def _native(y: Tensor) -> Tensor:
    _check(y)
    out = y.new_empty(len(y), y.shape[1] // 2)
    native.call(f"swiglu_{_SUFFIX[y.dtype]}", y, out, *out.shape)
    return out


def _native_backward(g: Tensor, y: Tensor) -> Tensor:
    _check(y, g)
    gy = torch.empty_like(y)
    native.call(f"swiglu_backward_{_SUFFIX[y.dtype]}", g, y, gy, *g.shape)
    return gy


define(
    "swiglu(Tensor y) -> Tensor",
    "swiglu",
    reference=swiglu_ref,
    native=_native,
    fake=lambda y: y.new_empty(len(y), y.shape[1] // 2),
)
define(
    "swiglu_backward(Tensor g, Tensor y) -> Tensor",
    "swiglu",
    reference=swiglu_backward_ref,
    native=_native_backward,
    fake=lambda g, y: torch.empty_like(y),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, g: Tensor) -> Any:
    return torch.ops.fedsim.swiglu_backward(g.contiguous(), *ctx.saved_tensors)


differentiate("swiglu", _backward, _setup)


# Inputs and definition


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    t, f = case.rows, case.features[1]
    return 4 * draw(t, 2 * f, dtype=dtype, seed=1), draw(t, f, dtype=dtype, seed=2)


def _run(case: Case, inputs: Tensors) -> Tensors:
    y, g = inputs
    y = y.clone().requires_grad_()
    out = torch.ops.fedsim.swiglu(y)
    return out.detach(), *torch.autograd.grad(out, y, g)


def _formula(case: Case, inputs: Tensors) -> Tensors:
    y, g = inputs
    y = y.clone().requires_grad_()
    gate, up = y.chunk(2, 1)
    out = gate * torch.sigmoid(gate) * up  # exp(-gate) overflows in fp16
    return out.detach(), *torch.autograd.grad(out, y, g)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Forward reads two halves and writes one; backward reads three and writes two."""
    n = case.rows * case.features[1]
    return 20.0 * n, 8.0 * n * dtype.itemsize


KERNEL = KernelSpec("swiglu", ("swiglu", "swiglu_backward"), _inputs, _run, _formula, _work)
