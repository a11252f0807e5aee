"""PiSSA: an adapter that begins as the largest singular parts of each weight, not at zero.

    W = U S V^T,   B_0 = U_r S_r^(1/2) / sqrt(s),   A_0 = S_r^(1/2) V_r^T / sqrt(s)
    base: W - s B_0 A_0

What is taken from the base is one more correction (`ServerState.base`), so the first model is W,
all clients share the same factors, and an export has rank 2 r: [B, -B_0] and [A; A_0].

Paper: Meng et al., arXiv:2404.02948.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.model import Base


@torch.no_grad()
def split(base: Base, row: Tensor, scale: float) -> tuple[Tensor, dict[str, Tensor]]:
    """A row (P,) with every A and B replaced, and what the base then lacks.

    Args:
        row: (P,) fp32, a fresh adapter. scale: s of its rank.
    """
    row = row.clone()
    taken: dict[str, Tensor] = {}
    factors = base.layout.factors(row[None])
    for site in base.sites:
        for m in site.adapted:
            weight = site.weight[m.column : m.column + m.width]
            a, b = (view[0] for view in factors[m.name])
            u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
            r = min(base.layout.rank, len(s))
            root = (s[:r] / scale).sqrt()
            a.zero_()
            b.zero_()
            a[:r] = (root[:, None] * vt[:r]).float()
            b[:, :r] = (u[:, :r] * root).float()
            taken |= {f"{m.name}.A": a.clone(), f"{m.name}.B": -scale * b}
    return row, taken
