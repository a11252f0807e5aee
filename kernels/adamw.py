"""AdamW with gradient clipping over the rows of a (K, P) matrix, each client for itself.

    g <- g min(1, c / (||g|| + 1e-6))
    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    x <- x - lr wd x - lr (m / (1 - b1^n)) / (sqrt(v / (1 - b2^n)) + eps)

in the operation order of torch.optim.AdamW and torch.nn.utils.clip_grad_norm_.

Paper: Loshchilov and Hutter, arXiv:1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_ref(
    row: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    lr: Tensor,
    step: Tensor,
    active: Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> Tensor:
    """One optimiser step of the active rows, in place.

    A row whose gradient norm is not finite is left as it was: masks select, they never multiply
    by zero, because 0 x inf is NaN.

    Args:
        row, grad, m, v: (K, P) fp32; `grad` is overwritten.
        lr: (K,) fp32. step: (K,) number of this step, from 1. active: (K,) bool.
        max_norm: clip each row's norm to this; inf for no clipping.

    Returns:
        (K,) fp32 gradient norms before clipping; inf where the step itself overflowed.
    """
    norm: Tensor = torch.linalg.vector_norm(grad, dim=1)
    take = (active & torch.isfinite(norm))[:, None]
    grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0)[:, None])
    b1, b2 = betas
    new_m = torch.lerp(m, grad, 1 - b1)
    new_v = (v * b2).addcmul_(grad, grad, value=1 - b2)
    n = step.double()
    correct1 = (1 - b1**n).to(row.dtype)[:, None]
    correct2 = (1 - b2**n).sqrt().to(row.dtype)[:, None]
    rate = lr[:, None]
    new_row = row * (1 - rate * weight_decay) if weight_decay else row.clone()
    denom = new_v.sqrt().div_(correct2).add_(eps)
    new_row.addcmul_(new_m / denom, rate / correct1, value=-1)
    # A row that overflows in this very step is sick too, and keeps its last finite value.
    burst = active & ~torch.isfinite(new_row).all(1)
    norm = norm.masked_fill(burst, float("inf"))
    take &= ~burst[:, None]
    for old, new in ((m, new_m), (v, new_v), (row, new_row)):
        torch.where(take, new, old, out=old)
    return norm
