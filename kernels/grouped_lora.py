"""Grouped LoRA: every packed row is updated by its own slot's low-rank adapter.

Forward, with s(t) the slot of row t:

    h[t] = A[s] x[t]        y[t] += scale[s] B[s] h[t]

Backward, for g = dL/dy, summed over the rows of each slot in a fixed order:

    u[t] = scale[s] B[s]^T g[t]      dx[t] += A[s]^T u[t]
    dA[s] += sum_t u[t] x[t]^T       dB[s] += scale[s] sum_t g[t] h[t]^T

Papers: Hu et al., LoRA, arXiv:2106.09685; Chen et al., Punica, arXiv:2310.18547 (segments).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim_kernels.segments import Segments


def grouped_lora_ref(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Sequence[float], segments: Segments
) -> Tensor:
    """Add each row's low-rank update to y in place; return h for the backward.

    The low-rank products run in the adapters' fp32, also on a bf16 base, as stock PEFT runs them.

    Args:
        y: (T, O), changed in place.
        x: (T, I) same dtype.
        a: (K, R, I) fp32, b: (K, O, R) fp32; zero beyond a slot's rank.
        scale: K numbers, alpha / rank.

    Returns:
        h (T, R) fp32.
    """
    h = a.new_empty(len(x), a.shape[1])
    for slot, start, end in segments.spans:
        torch.mm(x[start:end].to(a.dtype), a[slot].T, out=h[start:end])
        _add_product(y[start:end], h[start:end], b[slot].T, scale[slot])
    return h


def _add_product(out: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """out += alpha left @ right, rounded once to out's dtype."""
    if out.dtype == left.dtype:
        out.addmm_(left, right, alpha=alpha)
    else:
        out.add_(torch.mm(left, right), alpha=alpha)


def grouped_lora_backward_ref(
    g: Tensor,
    x: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Sequence[float],
    segments: Segments,
    grad_a: Tensor,
    grad_b: Tensor,
    grad_x: Tensor | None,
) -> None:
    """Add the gradients of every slot to the arena, and dL/dx to `grad_x` when it is given.

    Args:
        g: (T, O) dL/dy. x, h, a, b, scale, segments: as in the forward.
        grad_a: (K, R, I) fp32, grad_b: (K, O, R) fp32, changed in place.
        grad_x: (T, I) or None, changed in place.
    """
    for slot, start, end in segments.spans:
        gs = g[start:end].to(a.dtype)
        u = torch.mm(gs, b[slot]).mul_(scale[slot])
        if grad_x is not None:
            _add_product(grad_x[start:end], u, a[slot], 1.0)
        grad_a[slot].addmm_(u.T, x[start:end].to(a.dtype))
        grad_b[slot].addmm_(gs.T, h[start:end], alpha=scale[slot])
