"""Sums of clients' products B A: exact, and as factors while these are smaller than the matrix.

Letters: O, I features out and in of a module, n the rank of a stack of factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.layout import AdapterLayout

# fp64 cannot tell a singular value below this share of the largest from rounding.
_ZERO = 1e-12


@dataclass(frozen=True)
class Parts:
    """Singular parts u (O, r), s (r,), vt (r, I), fp64; the norm of those that were left out."""

    u: Tensor
    s: Tensor
    vt: Tensor
    lost: float


@dataclass(frozen=True)
class Product:
    """A matrix (O, I) in fp64: factors b (O, n) and a (n, I), or whole."""

    b: Tensor | None = None
    a: Tensor | None = None
    whole: Tensor | None = None

    def dense(self) -> Tensor:
        """(O, I)."""
        return self.whole if self.whole is not None else self._b @ self._a

    @property
    def _b(self) -> Tensor:
        assert self.b is not None
        return self.b

    @property
    def _a(self) -> Tensor:
        assert self.a is not None
        return self.a

    @property
    def numbers(self) -> int:
        """That it takes to send it."""
        return sum(t.numel() for t in (self.b, self.a, self.whole) if t is not None)

    def times(self, x: Tensor) -> Tensor:
        """The product with x (I, n): (O, n)."""
        return self.whole @ x if self.whole is not None else self._b @ (self._a @ x)

    def plus(self, b: Tensor, a: Tensor) -> Product:
        """With another b (O, n) a (n, I) added."""
        if self.whole is not None:
            return Product(whole=self.whole + b @ a)
        return Product(torch.cat([self._b, b], 1), torch.cat([self._a, a]))

    def norm(self) -> float:
        """Frobenius norm, of factors from their Gram matrices."""
        if self.whole is not None:
            return float(self.whole.norm())
        square = float(((self._b.T @ self._b) * (self._a @ self._a.T)).sum())
        return math.sqrt(max(square, 0.0))

    def svd(self, rank: int) -> Parts:
        """The largest `rank` singular parts, and no more than are not 0.

        Of factors in O((O + I) n^2 + n^3): thin QR of both, then the SVD of the n x n core
        R_B R_A^T. Of a whole matrix from the eigenvectors v of its smaller Gram matrix, G v and
        not the root of an eigenvalue being s u: what squaring rounds away, 1e-8 of the largest, is
        less than fp32 keeps, and it is several times faster than an SVD. Each row of vt has its
        largest number positive.
        """
        if self.whole is None:
            qb, rb = torch.linalg.qr(self._b)
            qa, ra = torch.linalg.qr(self._a.T)
            core = torch.linalg.svd(rb @ ra.T, full_matrices=False)
            u, s, vt = qb @ core[0], core[1], core[2] @ qa.T
            lost = s[rank:].square().sum()
        else:
            tall = self.whole.shape[0] >= self.whole.shape[1]
            g = self.whole if tall else self.whole.T
            squares, v = torch.linalg.eigh(g.T @ g)
            lost = squares[: max(0, len(squares) - rank)].clamp(min=0).sum()
            v = v.flip(1)[:, :rank]
            image = g @ v
            s = image.norm(dim=0)
            image = image / s.clamp(min=torch.finfo(s.dtype).tiny)
            u, vt = (image, v.T) if tall else (v, image.T)
        kept = min(rank, int((s > _ZERO * s[0]).sum()))
        u, s, vt = u[:, :kept], s[:kept], vt[:kept]
        sign = torch.gather(vt, 1, vt.abs().argmax(1, keepdim=True)).sign()
        return Parts(u * sign.T, s, vt * sign, math.sqrt(float(lost)))


class Products:
    """sum_k w_k B_k A_k of every module, as clients come.

    Stacked factors while their rank is below min(I, O) / 2, then one dense fp64 matrix a module, to
    which stacks of that rank are added: memory is bounded by the base's, whatever the number of
    clients.
    """

    def __init__(self, layout: AdapterLayout) -> None:
        self._layout = layout
        self._stacks: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
        self._dense: dict[str, Tensor] = {}

    def add(self, row: Tensor, rank: int, weight: float) -> None:
        """Take in w B A of one client's row (P,) fp32."""
        for module, (a, b) in self._layout.factors(row[None]).items():
            stack = self._stacks.setdefault(module, [])
            stack.append((b[0, :, :rank].clone(), a[0, :rank].clone(), weight))
            if not narrow(sum(len(a) for _, a, _ in stack), b.shape[1], a.shape[2]):
                b64, a64 = _stacked(stack)
                whole = self._dense.get(module)
                self._dense[module] = b64 @ a64 if whole is None else whole.addmm_(b64, a64)
                stack.clear()

    def over(self, total: float) -> dict[str, Product]:
        """module -> the sum divided by a total of weights; asked once, it takes the sums away."""
        out = {}
        for module, stack in self._stacks.items():
            if (whole := self._dense.pop(module, None)) is not None:
                if stack:
                    whole.addmm_(*_stacked(stack))
                out[module] = Product(whole=whole.div_(total))
            else:
                b, a = _stacked(stack)
                out[module] = Product(b / total, a)
        return out


def narrow(rank: int, o: int, i: int) -> bool:
    """Whether factors of this rank are kept as such: below half of the smaller side."""
    return 2 * rank < min(o, i)


def _stacked(stack: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """[w_1 B_1 ...] (O, n) and [A_1; ...] (n, I), fp64."""
    return (
        torch.cat([w * b.double() for b, _, w in stack], 1),
        torch.cat([a.double() for _, a, _ in stack]),
    )


def joined(base: Mapping[str, Tensor], added: Mapping[str, Product]) -> dict[str, Tensor]:
    """What a rule has added to the base (`ServerState.base`), and these with it.

    Factors are put beside each other while their rank is below min(I, O) / 2, so that nothing is
    lost but fp32's rounding of B; then they become one dense fp32 matrix.
    """
    out = dict(base)
    for module, product in added.items():
        w, a, b = (out.pop(f"{module}.{kind}", None) for kind in ("W", "A", "B"))
        if w is not None:
            product = Product(whole=product.dense() + w.double())
        elif a is not None and b is not None:
            product = product.plus(b.double(), a.double())
        a, b = product.a, product.b
        if a is not None and b is not None and narrow(len(a), len(b), a.shape[1]):
            out |= {f"{module}.A": a.float(), f"{module}.B": b.float()}
        else:
            out[f"{module}.W"] = product.dense().float()
    return out
