"""DoRA: the direction of an adapted weight by LoRA, the length of each of its rows by itself.

    y[t] = c[s] (W x[t] + scale[s] B[s] A[s] x[t])      c[s] = mag[s] / ||W + scale[s] B[s] A[s]||

with norms over the rows of the weight, taken as constants by the gradient, so that
dmag[s] = sum_t g[t] z[t] / norm[s] for z the bracket.

Paper: Liu et al., DoRA, arXiv:2402.09353.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim.core import SiteViews

if TYPE_CHECKING:
    from fedsim.lora import Pass, Site


def row_norms(weight: Tensor) -> Tensor:
    """||W|| of every row: (O, I) -> (O,) fp64. Here the magnitudes start."""
    out: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
    return out


@torch.no_grad()
def weight_norms(site: Site, factors: SiteViews, work: Pass) -> list[Tensor]:
    """||W + scale B A|| per output feature, (K, O) fp32 of each adapted member; 1 in slots that
    have no row in the pass.

    From ||W||^2 + 2 s (W A^T) o B + s^2 (B A A^T) o B, summed over the rank in fp64: no (O, I)
    matrix per client. Slot by slot: a product of all slots would let the bits depend on K.
    """
    rank = factors.a.shape[1] // len(site.adapted)
    slots = dict.fromkeys(slot for slot, _, _ in work.segments.spans)
    out = []
    for at, member in enumerate(site.adapted):
        rows = slice(member.column, member.column + member.width)
        w, square = site.weight[rows].float(), site.norms[rows].square()
        norms = torch.ones(len(factors.a), member.width, device=w.device)
        for slot in slots:
            a, b = factors.a[slot, at * rank : (at + 1) * rank], factors.b[slot, site.outputs(at)]
            s, cross = work.scale[slot].double(), torch.mm(w, a.T).double()
            a, b = a.double(), b.double()
            more = s * ((2 * cross + s * torch.mm(b, torch.mm(a, a.T))) * b).sum(1)
            norms[slot] = (square + more).clamp(min=0).sqrt()
        out.append(norms)
    return out


class _Magnitude(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, c: Tensor, norm: Tensor, grad: Tensor | None, work: Pass
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.frozen = (c, norm, grad, work.segments.spans)
        y = torch.zeros_like(z)
        for slot, start, end in work.segments.spans:
            y[start:end] = (z[start:end].float() * c[slot]).to(z.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        c, norm, grad, spans = ctx.frozen
        g = grads[0]
        gz = torch.zeros_like(g)
        for slot, start, end in spans:
            part = g[start:end].float()
            if grad is not None:
                grad[slot] += (part * z[start:end].float()).sum(0) / norm[slot]
            gz[start:end] = (part * c[slot]).to(g.dtype)
        return gz, None, None, None, None


def magnitude(z: Tensor, site: Site, at: int, norms: list[Tensor], work: Pass) -> Tensor:
    """c[s(t)] z[t] of one adapted member, (T, O); its magnitudes learn into the arena."""
    assert site.index is not None
    columns = site.outputs(at)
    mag = work.factors[site.index].mag
    assert mag is not None
    grad = work.grads[site.index].mag if work.grads is not None else None
    out: Tensor = _Magnitude.apply(  # type: ignore[no-untyped-call]
        z, mag[:, columns] / norms[at], norms[at], None if grad is None else grad[:, columns], work
    )
    return out
