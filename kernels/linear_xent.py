"""Token loss of each client from hidden states; only label positions meet the vocabulary.

    z = post(W h[j])      nll[j] = logsumexp(z) - z[target[j]]
    loss[s] = sum over labels j of slot s of weight[j] nll[j]

`post` divides by `divide` and applies the soft-cap c tanh(z / c), where the model has them. The
gradient of h is formed in the forward, chunk by chunk, so at most (CHUNK, V) logits exist.

Paper: Wijmans et al., Cut Your Losses, arXiv:2411.09009 (never keeping the logits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK = 256  # rows of logits at once: 50 MB in fp32 at a vocabulary of 49,152


def head_logits(
    h: Tensor, weight: Tensor, *, divide: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Next-token logits of hidden rows: (L, D) x (V, D) -> (L, V) fp32."""
    z = torch.mm(h, weight.T).float()
    if divide != 1.0:
        z = z / divide
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z


class _LinearXent(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        targets: Tensor,
        slot: Tensor,
        label_weight: Tensor,
        slots: int,
        divide: float,
        softcap: float | None,
    ) -> Tensor:
        loss = torch.zeros(slots, dtype=torch.float32, device=h.device)
        grad = torch.empty_like(h)
        for first in range(0, len(h), CHUNK):
            part = slice(first, first + CHUNK)
            z = head_logits(h[part], weight, divide=divide, softcap=softcap)
            target = targets[part, None]
            norm = torch.logsumexp(z, -1)
            nll = norm - z.gather(1, target)[:, 0]
            loss.index_add_(0, slot[part], nll * label_weight[part])
            d = torch.exp(z - norm[:, None])
            d.scatter_add_(1, target, torch.full_like(target, -1, dtype=d.dtype))
            if softcap is not None:
                d.mul_(1 - (z / softcap).square_())
            d.mul_(label_weight[part, None] / divide)
            grad[part] = torch.mm(d.to(weight.dtype), weight)
        ctx.save_for_backward(grad, slot)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, slot = ctx.saved_tensors
        scaled = grad * grads[0].index_select(0, slot)[:, None].to(grad.dtype)
        return scaled, None, None, None, None, None, None, None


def linear_xent_ref(
    h: Tensor,
    weight: Tensor,
    targets: Tensor,
    slot: Tensor,
    label_weight: Tensor,
    slots: int,
    *,
    divide: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Weighted token loss of every slot, differentiable in h only.

    Args:
        h: (L, D) hidden states at label positions.
        weight: (V, D) frozen head, same dtype.
        targets, slot: (L,) int64. label_weight: (L,) fp32.
        slots: K.

    Returns:
        (K,) fp32; slots without labels get exactly 0.
    """
    loss: Tensor = _LinearXent.apply(  # type: ignore[no-untyped-call]
        h, weight, targets, slot, label_weight, slots, divide, softcap
    )
    return loss
