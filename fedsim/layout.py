"""Where each LoRA factor lies in an adapter's row.

Letters: K slots, P parameters of an adapter, R rank, I/O linear in/out features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

KINDS = ("A", "B", "mag")
_ALIGN = 16  # elements; a piece starts on a 64-byte boundary in fp32, 32 in bf16


@dataclass(frozen=True)
class Piece:
    """One factor of one target module inside an adapter's row."""

    module: str
    kind: str  # "A" (R, I), "B" (O, R), or with DoRA "mag" (1, O)
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class SiteViews:
    """The factors of a site's n modules as views of a (K, P) matrix: (K, n R, I), (K, sum O, R)
    and, with DoRA, (K, sum O)."""

    a: Tensor
    b: Tensor
    mag: Tensor | None


@dataclass(frozen=True)
class AdapterLayout:
    """Where each LoRA factor lies in a row of P numbers.

    Target modules that read the same input form a site. The A of a site lie below each other, and
    so do its B, so that one product serves all of them; each of the two starts at a multiple of
    16 elements. The gaps between stay zero and count neither in norms nor in traffic. A client of
    rank r < R uses the first r rows of A and the first r columns of B; the rest stays exactly
    zero.

    Attributes:
        sites: the module names of each site.
        rank: R, the largest rank of any client.
        size: P.
    """

    pieces: tuple[Piece, ...]
    sites: tuple[tuple[str, ...], ...]
    rank: int
    size: int

    @classmethod
    def build(
        cls,
        targets: Mapping[str, tuple[int, int]],
        rank: int,
        *,
        sites: Sequence[Sequence[str]] | None = None,
        dora: bool = False,
    ) -> AdapterLayout:
        """Lay out the factors of every target module, site by site.

        Args:
            targets: module name -> (in features I, out features O).
            rank: R, the largest rank of any client.
            sites: modules that read the same input; each by itself when not given.
            dora: each output feature also has a magnitude.
        """
        groups = tuple(tuple(site) for site in sites or [[name] for name in targets])
        pieces, offset = [], 0
        for site in groups:
            for kind in KINDS[: 3 if dora else 2]:
                for module in site:
                    i, o = targets[module]
                    shape = {"A": (rank, i), "B": (o, rank), "mag": (1, o)}[kind]
                    pieces.append(Piece(module, kind, shape, offset))
                    offset += shape[0] * shape[1]
                offset = -(-offset // _ALIGN) * _ALIGN
        return cls(tuple(pieces), groups, rank, offset)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every target module, site by site."""
        return tuple(name for site in self.sites for name in site)

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Piece]:
        return {(p.module, p.kind): p for p in self.pieces}

    def piece(self, module: str, kind: str) -> Piece:
        """One factor of one module."""
        return self._by_name[module, kind]

    def has(self, module: str, kind: str) -> bool:
        """Does this module have such a factor?"""
        return (module, kind) in self._by_name

    def view(self, matrix: Tensor, piece: Piece) -> Tensor:
        """One piece of every row: (K, P) -> strided view (K, *shape), no copy."""
        span = matrix[:, piece.offset : piece.offset + piece.size]
        return span.view(len(matrix), *piece.shape)

    def _part(self, matrix: Tensor, module: str, kind: str) -> Tensor:
        return self.view(matrix, self.piece(module, kind))

    def factors(self, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """module -> views (A (K, R, I), B (K, O, R)) of a (K, P) matrix."""
        return {
            name: (self._part(matrix, name, "A"), self._part(matrix, name, "B"))
            for name in self.modules
        }

    def site_views(self, matrix: Tensor) -> tuple[SiteViews, ...]:
        """The factors of every site as views of a (K, P) matrix."""
        out = []
        for site in self.sites:
            views: list[Tensor | None] = []
            for kind in KINDS:
                pieces = [p for m in site if (p := self._by_name.get((m, kind)))]
                if not pieces:
                    views.append(None)
                    continue
                first, last = pieces[0], pieces[-1]
                span = matrix[:, first.offset : last.offset + last.size]
                views.append(span.view(len(matrix), -1, first.shape[1]) if kind != "mag" else span)
            a, b, mag = views
            assert a is not None and b is not None
            out.append(SiteViews(a, b, mag))
        return tuple(out)

    def numel(self, rank: int | None = None, kinds: Sequence[str] = KINDS) -> int:
        """Numbers of these kinds that a client of this rank has: all are sum of r (I + O), and O
        with DoRA."""
        r = self.rank if rank is None else rank
        mine = [p for p in self.pieces if p.kind in kinds]
        return sum(p.size if p.kind == "mag" else p.size // self.rank * r for p in mine)

    def mask(self, kinds: Sequence[str], rank: int | None = None) -> Tensor:
        """Which of the P numbers a client of this rank has in these kinds of pieces: (P,) bool;
        gaps belong to none."""
        out = torch.zeros(1, self.size, dtype=torch.bool)
        for piece in self.pieces:
            if piece.kind in kinds:
                view = self.view(out, piece)
                cut = {"A": view[:, :rank], "B": view[..., :rank], "mag": view}[piece.kind]
                cut.fill_(True)
        return out[0]
