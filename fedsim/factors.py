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

# Shares of the largest singular value below which one is rounding: in fp64, and when squared in it.
_ZERO, _SQUARED = 1e-12, 1e-7


@dataclass(frozen=True)
class Parts:
    """Singular parts u (O, r), s (r,), vt (r, I), fp64; the norm of those that were left out."""

    u: Tensor
    s: Tensor
    vt: Tensor
    lost: float


@dataclass(frozen=True)
class Stacked:
    """A matrix (O, I) as factors b (O, n) and a (n, I), fp64."""

    b: Tensor
    a: Tensor

    @property
    def numbers(self) -> int:
        """That it takes to send it."""
        return self.b.numel() + self.a.numel()

    def dense(self) -> Tensor:
        """(O, I)."""
        return self.b @ self.a

    def times(self, x: Tensor) -> Tensor:
        """The product with x (I, m): (O, m)."""
        return self.b @ (self.a @ x)

    def plus(self, b: Tensor, a: Tensor) -> Stacked:
        """With another b a beside it."""
        return Stacked(torch.cat([self.b, b], 1), torch.cat([self.a, a]))

    def norm(self) -> float:
        """Frobenius norm: ||b a||^2 = <b^T b, a a^T>."""
        return math.sqrt(max(float(((self.b.T @ self.b) * (self.a @ self.a.T)).sum()), 0.0))

    def svd(self, rank: int) -> Parts:
        """The largest `rank` singular parts, and no more than are not 0, in O((O + I) n^2 + n^3):
        thin QR of both factors, then the SVD of the (n, n) core R_B R_A^T."""
        qb, rb = torch.linalg.qr(self.b)
        qa, ra = torch.linalg.qr(self.a.T)
        u, s, vt = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        kept = min(rank, int((s > _ZERO * s[0]).sum()))
        return _parts(qb @ u, s, vt @ qa.T, kept, float(s[rank:].square().sum()))


@dataclass(frozen=True)
class Dense:
    """A matrix (O, I) as it is, fp64."""

    w: Tensor

    @property
    def numbers(self) -> int:
        """That it takes to send it."""
        return self.w.numel()

    def dense(self) -> Tensor:
        """(O, I)."""
        return self.w

    def times(self, x: Tensor) -> Tensor:
        """The product with x (I, m): (O, m)."""
        return self.w @ x

    def plus(self, b: Tensor, a: Tensor) -> Dense:
        """With b a added."""
        return Dense(self.w + b @ a)

    def norm(self) -> float:
        """Frobenius norm."""
        return float(self.w.norm())

    def svd(self, rank: int) -> Parts:
        """The same parts from the eigenvectors v of the smaller Gram matrix, u s = w v.

        What squaring rounds away, 1e-8 of the largest singular value, is less than fp32 keeps, and
        it is several times faster than an SVD.
        """
        tall = self.w.shape[0] >= self.w.shape[1]
        g = self.w if tall else self.w.T
        squares, v = torch.linalg.eigh(g.T @ g)
        lost = float(squares[: max(0, len(squares) - rank)].clamp(min=0).sum())
        v = v.flip(1)[:, :rank]
        image = g @ v
        s = image.norm(dim=0)
        u = image / s.clamp(min=torch.finfo(s.dtype).tiny)
        kept = int((s > _SQUARED * s[0]).sum())
        return _parts(u, s, v.T, kept, lost) if tall else _parts(v, s, u.T, kept, lost)


Product = Stacked | Dense


def _parts(u: Tensor, s: Tensor, vt: Tensor, kept: int, lost: float) -> Parts:
    """The first ones; the largest number of each row of vt is positive."""
    u, s, vt = u[:, :kept], s[:kept], vt[:kept]
    sign = torch.gather(vt, 1, vt.abs().argmax(1, keepdim=True)).sign()
    return Parts(u * sign.T, s, vt * sign, math.sqrt(lost))


class Products:
    """sum_k w_k B_k A_k of every module, as clients come.

    Stacked factors while their rank is below min(I, O) / 2, then one dense fp64 matrix a module, to
    which stacks of that rank are added: at most 8 bytes a weight of the base and, in fp32, 4 of
    stacks, whatever the number of clients.
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
        out: dict[str, Product] = {}
        for module, stack in self._stacks.items():
            if (whole := self._dense.pop(module, None)) is not None:
                if stack:
                    whole.addmm_(*_stacked(stack))
                out[module] = Dense(whole.div_(total))
            else:
                b, a = _stacked(stack)
                out[module] = Stacked(b / total, a)
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
    lost but fp32's rounding; then they become one dense fp32 matrix.
    """
    out = dict(base)
    for module, product in added.items():
        w, a, b = (out.pop(f"{module}.{kind}", None) for kind in ("W", "A", "B"))
        if w is not None:
            product = Dense(product.dense() + w.double())
        elif a is not None and b is not None:
            product = product.plus(b.double(), a.double())
        if isinstance(product, Stacked) and narrow(
            len(product.a), len(product.b), product.a.shape[1]
        ):
            out |= {f"{module}.A": product.a.float(), f"{module}.B": product.b.float()}
        else:
            out[f"{module}.W"] = product.dense().float()
    return out
