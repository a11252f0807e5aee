"""AdamW with gradient clipping over the rows of a (K, P) matrix, each client for itself.

    g <- g min(1, c / (||g|| + 1e-6))
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    x <- x - r wd x - r m_hat / (sqrt(v_hat) + eps)         r = lr lr_scale

with m_hat = m / (1 - b1^n) and v_hat = v / (1 - b2^n), in the operation order of
torch.optim.AdamW and torch.nn.utils.clip_grad_norm_. Whether a step could overflow is known before
it is taken. Since m = (1 - b1) sum_i b1^i g_(n-i) and v = (1 - b2) sum_i b2^i g_(n-i)^2, i < n,
splitting b1^i g into (b1^i b2^(-i/2)) (b2^(i/2) g) gives, by Cauchy and Schwarz,

    |m_hat| / sqrt(v_hat) <= BOUND(n)
        = (1 - b1) / (1 - b1^n) sqrt((1 - b2^n) / (1 - b2) sum_(i<n) (b1^2 / b2)^i)

which stays below 7.3 for b1 = 0.9, b2 = 0.999. A row is sick when its norm is not finite, when it
holds NaN, or when max|x| (1 + r wd) + r BOUND could reach the largest float.

Papers: Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101; Hayou et al.,
LoRA+, arXiv:2402.12354 (lr_scale).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw


class Plan(NamedTuple):
    """What the update of each row needs, all (K,), fp32 but for `take`, bool."""

    take: Tensor  # active and not sick
    norm: Tensor  # of the gradient before clipping
    clip: Tensor
    inverse1: Tensor  # 1 / (1 - b1^n)
    inverse2: Tensor  # 1 / sqrt(1 - b2^n)


def bound(step: Tensor, beta1: float, beta2: float) -> Tensor:
    """BOUND(n) for steps n >= 1, float64."""
    n, ratio = step.double(), beta1 * beta1 / beta2
    terms = (1 - ratio**n) / (1 - ratio)
    return (1 - beta1) / (1 - beta1**n) * ((1 - beta2**n) / (1 - beta2) * terms).sqrt()


def plan(
    square: Tensor, peak: Tensor, lr: Tensor, step: Tensor, active: Tensor,
    lr_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_norm: float,
) -> Plan:  # fmt: skip
    """Decide every row from its sum of grad^2 and max |row|, both (K,) fp32; nothing is synced."""
    norm = square.sqrt().masked_fill(~active, 0.0)
    n, rate = step.double(), lr.double()
    if lr_scale is not None:
        rate = rate * lr_scale.max()
    # Where g^2 underflows, v is up to 2^-112 too small even with denormals flushed, which matters
    # beside eps only when eps itself is tiny. 1.001 covers the rounding of the step.
    largest = rate * bound(n, beta1, beta2) * (1 + 2.0**-56 / eps)
    largest = 1.001 * (peak.double().clamp(min=1.0) * (1 + rate * weight_decay) + largest)
    fits = largest < torch.finfo(torch.float32).max  # False for NaN
    finite = norm.isfinite()
    return Plan(
        active & finite & fits,
        norm.masked_fill(active & finite & ~fits, float("inf")),
        torch.clamp(max_norm / (norm + 1e-6), max=1.0),
        (1 / (1 - beta1**n)).float(),
        (1 / (1 - beta2**n).sqrt()).float(),
    )


def _check(
    row: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, active: Tensor,
    lr_scale: Tensor | None, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    for name, x in zip(("row", "grad", "m", "v"), (row, grad, m, v), strict=True):
        fits = x.dtype == torch.float32 and x.shape == row.shape and x.ndim == 2
        if not fits or x.stride(1) != 1 or (len(x) > 1 and x.stride(0) < x.shape[1]):
            raise ValueError(
                f"adamw: got {name} {tuple(x.shape)} {x.dtype} with strides {x.stride()}; expected "
                f"fp32 of row's shape {tuple(row.shape)}, rows contiguous."
            )
    k, p = row.shape
    vectors: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("lr", lr, torch.float32, k), ("step", step, step.dtype, k),
        ("active", active, torch.bool, k), ("lr_scale", lr_scale, torch.float32, p),
    ]  # fmt: skip
    for name, given, dtype, n in vectors:
        if given is None:
            continue
        if given.dtype != dtype or given.shape != (n,) or not given.is_contiguous():
            raise ValueError(
                f"adamw: got {name} {tuple(given.shape)} {given.dtype}; expected {dtype} ({n},), "
                "contiguous."
            )
    if not (0 <= beta1 * beta1 < beta2 < 1 and eps > 0):
        raise ValueError(
            f"adamw: got beta1 {beta1}, beta2 {beta2}, eps {eps}; expected beta1^2 < beta2 < 1 and "
            "eps > 0, or a step has no bound. Use 0.9, 0.999 and 1e-8."
        )


def adamw_ref(
    row: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, active: Tensor,
    lr_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_norm: float,
) -> Tensor:  # fmt: skip
    """One optimiser step of the active rows, in place; inactive and sick rows keep every bit.

    Masks select, they never multiply by zero, because 0 x inf is NaN.

    Args:
        row, grad, m, v: (K, P) fp32, rows P or more apart; what `grad` holds afterwards is
            unspecified.
        lr: (K,) fp32. step: (K,) number of this step, from 1. active: (K,) bool.
        lr_scale: (P,) fp32, multiplies lr, or None.
        max_norm: clip each row's norm to this; inf for no clipping.

    Returns:
        (K,) fp32 gradient norms before clipping; inf where the step could overflow, 0 where a row
        is not active.

    Raises:
        ValueError: other shapes, strides or dtypes; betas without a bound.
    """
    _check(row, grad, m, v, lr, step, active, lr_scale, beta1, beta2, eps)
    square, peak = grad.square().sum(1), row.abs().amax(1)
    p = plan(square, peak, lr, step, active, lr_scale, beta1, beta2, eps, weight_decay, max_norm)
    g = grad * p.clip[:, None]
    new_m = torch.lerp(m, g, 1 - beta1)
    new_v = (v * beta2).addcmul_(g, g, value=1 - beta2)
    rate = lr[:, None] if lr_scale is None else lr[:, None] * lr_scale
    ratio = new_m * p.inverse1[:, None] / (new_v.sqrt() * p.inverse2[:, None] + eps)
    new_row = row * (1 - rate * weight_decay) - rate * ratio
    for old, new in ((row, new_row), (m, new_m), (v, new_v)):
        old.copy_(torch.where(p.take[:, None], new, old))
    return p.norm


def _native(
    row: Tensor, grad: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, active: Tensor,
    lr_scale: Tensor | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_norm: float,
) -> Tensor:  # fmt: skip
    _check(row, grad, m, v, lr, step, active, lr_scale, beta1, beta2, eps)
    square, peak = torch.empty_like(lr), torch.empty_like(lr)
    native.call(
        "adamw_measure", row, grad, active, square, peak, *row.shape, row.stride(0), grad.stride(0)
    )
    p = plan(square, peak, lr, step, active, lr_scale, beta1, beta2, eps, weight_decay, max_norm)
    native.call(
        "adamw_update", row, grad, m, v, p.take, p.clip, lr, p.inverse1, p.inverse2, lr_scale,
        float(beta1), float(beta2), float(eps), float(weight_decay), *row.shape,
        *(x.stride(0) for x in (row, grad, m, v)),
    )  # fmt: skip
    return p.norm


define(
    "adamw(Tensor(a!) row, Tensor(b!) grad, Tensor(c!) m, Tensor(d!) v, Tensor lr, Tensor step, "
    "Tensor active, Tensor? lr_scale, float beta1, float beta2, float eps, float weight_decay, "
    "float max_norm) -> Tensor",
    "adamw",
    reference=adamw_ref,
    native=_native,
    fake=lambda row, *_: row.new_empty(len(row)),
)


# Inputs and definition: a row for each slot, at steps 1, 7 and 400; the last row rests

_SETTINGS = (0.9, 0.999, 1e-8, 0.1, 2.0)


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """row, grad, m, v, lr, step, active, lr_scale; fp32 whatever the dtype, as optimisers are."""
    k, p = len(case.ranks), case.features[0] * case.features[1] * max(case.ranks)
    return (
        draw(k, p, seed=1), draw(k, p, seed=2), 0.1 * draw(k, p, seed=3),
        draw(k, p, seed=4).square(), torch.tensor([1e-2, 3e-3, 0.5])[:k],
        torch.tensor([1, 7, 400])[:k], torch.arange(k) < max(1, k - 1),
        draw(p, seed=5).exp(),
    )  # fmt: skip


def _run(case: Case, inputs: Tensors) -> Tensors:
    row, grad, m, v, *rest = (x.clone() for x in inputs)
    norm = torch.ops.fedsim.adamw(row, grad, m, v, *rest, *_SETTINGS)
    return row, m, v, norm


def _formula(case: Case, inputs: Tensors) -> Tensors:
    row, grad, m, v, lr, step, active, scale = inputs
    beta1, beta2, eps, decay, max_norm = _SETTINGS
    norm = torch.where(active, grad.norm(dim=1), 0)
    grad = grad * (max_norm / (norm + 1e-6)).clamp(max=1)[:, None]
    new_m, new_v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    n, rate = step[:, None].to(row.dtype), lr[:, None] * scale
    hat = new_m / (1 - beta1**n) / ((new_v / (1 - beta2**n)).sqrt() + eps)
    new_row = row - rate * decay * row - rate * hat
    on = active[:, None]
    pairs: Any = ((new_row, row), (new_m, m), (new_v, v))
    return *(torch.where(on, new, old) for new, old in pairs), norm


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Norms read row and grad; the update reads all four and writes three."""
    k, p = len(case.ranks), case.features[0] * case.features[1] * max(case.ranks)
    return 20.0 * k * p, 36.0 * k * p


KERNEL = KernelSpec("adamw", ("adamw",), _inputs, _run, _formula, _work)
