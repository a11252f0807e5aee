"""The adapters of one call as the rows of a matrix, each with its scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim import config, peft_io
from fedsim.adapters import rank_numbers
from fedsim.core import SiteViews
from fedsim.dora import weight_norms
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Adapter
from fedsim.lora import Pass
from fedsim.model import Base
from fedsim_kernels.segments import Segments


@dataclass(frozen=True)
class Loaded:
    """K adapters on the base's device; slot s of a pass is adapter s.

    Attributes:
        rows: (K, P) fp32. scale: (K,) fp32.
        ranks: rows of A that each one uses, at least 1: what lies beyond is not multiplied.
        norms: of every site under DoRA, else ().
    """

    rows: Tensor
    scale: Tensor
    ranks: tuple[int, ...]
    factors: tuple[SiteViews, ...]
    norms: tuple[list[Tensor], ...]

    def work(self, base: Base, segments: Segments, rows: Tensor | None = None,
             row_segments: Segments | None = None) -> Pass:  # fmt: skip
        """A pass under these adapters; `rows` are those whose hidden states are wanted."""
        return Pass(
            segments, self.factors, None, self.scale, base.anchor, label_rows=rows,
            label_segments=row_segments, norms=self.norms,
        )  # fmt: skip


@torch.no_grad()
def load(base: Base, adapters: Sequence[Adapter], own: config.Adapter) -> Loaded:
    """Read adapters into the base's layout; what one lacks is as in the bare base.

    Args:
        own: of the run whose rows they are, for the scale of rows that bring none.

    Raises:
        ModelError: there is none, or a folder cannot be read or does not fit the layout.
    """
    if not adapters:
        raise ModelError("adapters", got=0, expected="at least one", remedy="The bare base is one.")
    layout, bare = base.layout, base.magnitudes(torch.zeros(base.layout.size, device=base.device))
    rows = torch.empty(len(adapters), layout.size, device=base.device)
    scales = []
    for row, adapter in zip(rows, adapters, strict=True):
        given, scale = bare, 1.0
        if adapter.row is not None:
            given = adapter.row
            scale = own.scale() if adapter.scale is None else adapter.scale
        elif adapter.folder is not None:
            given, scale = peft_io.load_scaled(adapter.folder, layout, bare.cpu())
        row.copy_(given)
        scales.append(scale)
    numbers = rank_numbers(layout).to(base.device)
    ranks = tuple(1 + int(torch.where(row != 0, numbers, 0).max()) for row in rows)
    scale_ = torch.tensor(scales, device=base.device)
    factors = layout.site_views(rows)
    norms: tuple[list[Tensor], ...] = ()
    if any(site.mag is not None for site in factors):
        k = len(adapters)
        whole = Pass(Segments.build([1] * k, range(k)), factors, None, scale_, base.anchor)
        sites = [s for s in base.sites if s.index is not None]
        norms = tuple(weight_norms(s, factors[i], whole) for i, s in enumerate(sites))
    return Loaded(rows, scale_, ranks, factors, norms)
