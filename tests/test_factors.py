"""Sums of products against dense float64 matrices: stacked, dense, cut, and put into the base.

About 3 s.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.correction import delta_of
from fedsim.factors import Dense, Product, Products, Stacked, joined, narrow
from fedsim.layout import AdapterLayout

WIDE = AdapterLayout.build({"up": (24, 40), "down": (40, 24), "small": (24, 6)}, 4)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(count: int, rank: int = 4) -> Tensor:
    out = torch.zeros(count, WIDE.size)
    out[:, WIDE.mask(("A", "B"), rank)] = normal(
        count, int(WIDE.mask(("A", "B"), rank).sum())
    ).float()
    return out


def dense(all_rows: Tensor, weights: list[float]) -> dict[str, Tensor]:
    return {
        m: torch.einsum("k,kor,kri->oi", torch.tensor(weights).double(), b.double(), a.double())
        for m, (a, b) in WIDE.factors(all_rows).items()
    }


def near(got: Tensor, want: Tensor, bound: float = 1e-13) -> bool:
    return float((got - want).norm()) <= bound * float(want.norm())


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_the_sum_is_exact_whatever_it_is_kept_as(count: int) -> None:
    """Of 24 x 40 up to 2 clients of rank 4 are factors, then dense; of 6 x 24 never."""
    all_rows, weights = rows(count), [0.5 + k for k in range(count)]
    products = Products(WIDE)
    for row, w in zip(all_rows, weights, strict=True):
        products.add(row, 4, w)
    got = products.over(3.0)
    for module, want in dense(all_rows, weights).items():
        assert near(got[module].dense(), want / 3)
        assert near(
            got[module].times(normal(want.shape[1], 3)), want @ normal(want.shape[1], 3) / 3
        )
        assert got[module].norm() == pytest.approx(float(want.norm()) / 3, rel=1e-10)
    assert isinstance(got["small"], Dense) and got["small"].numbers == 24 * 6
    assert isinstance(got["up"], Stacked) is (count < 3)
    assert got["up"].numbers == (4 * count * 64 if count < 3 else 24 * 40)


def test_ranks_below_the_layouts() -> None:
    all_rows = torch.cat([rows(1, 2), rows(1, 3)])
    products = Products(WIDE)
    for row, rank in zip(all_rows, (2, 3), strict=True):
        products.add(row, rank, 1.0)
    got = products.over(1.0)
    assert isinstance(got["up"], Stacked) and len(got["up"].a) == 5
    assert all(near(got[m].dense(), want) for m, want in dense(all_rows, [1.0, 1.0]).items())


def test_a_row_that_changes_later_does_not_matter() -> None:
    row, products = rows(1), Products(WIDE)
    want = dense(row, [1.0])["up"]
    products.add(row[0], 4, 1.0)
    row.zero_()
    assert near(products.over(1.0)["up"].dense(), want)


@pytest.mark.parametrize(("o", "i", "n"), [(40, 24, 5), (24, 40, 5), (24, 40, 24), (12, 12, 3)])
@pytest.mark.parametrize("rank", [1, 3, 5, 50])
def test_the_svd_is_the_dense_one(o: int, i: int, n: int, rank: int) -> None:
    b, a = normal(o, n), normal(n, i, seed=2)
    u, s, vt = torch.linalg.svd(b @ a, full_matrices=False)
    r = min(rank, n)
    cases: list[tuple[Product, float]] = [(Stacked(b, a), 1e-12), (Dense(b @ a), 1e-7)]
    for product, bound in cases:
        parts = product.svd(rank)
        assert len(parts.s) == r
        assert near(parts.s[:r], s[:r], bound)
        best = u[:, :r] * s[:r] @ vt[:r]
        assert near((parts.u * parts.s) @ parts.vt, best, bound)
        assert parts.lost == pytest.approx(float(s[r:].norm()), rel=1e-6, abs=1e-6 * float(s[0]))
        eye = torch.eye(r).double()
        assert near(parts.vt[:r] @ parts.vt[:r].T, eye, 1e-10)
        assert near(parts.u[:, :r].T @ parts.u[:, :r], eye, max(bound, 1e-10))
        assert (torch.gather(parts.vt, 1, parts.vt.abs().argmax(1)[:, None]) > 0).all()


def test_signs_do_not_depend_on_the_factors() -> None:
    b, a = normal(20, 4), normal(4, 12, seed=2)
    turn = torch.linalg.qr(normal(4, 4, seed=3))[0]
    one = Stacked(b, a).svd(4)
    for other in (Stacked(b @ turn, turn.T @ a).svd(4), Dense(b @ a).svd(4)):
        assert near(other.u, one.u, 1e-6) and near(other.vt, one.vt, 1e-6)


def test_parts_that_are_zero_are_left_out() -> None:
    b, a = normal(20, 2), normal(2, 12, seed=2)
    assert len(Stacked(torch.cat([b, b], 1), torch.cat([a, a])).svd(4).s) == 2
    zero = Stacked(torch.zeros(20, 3).double(), normal(3, 12)).svd(3)
    assert len(zero.s) == 0 and zero.u.shape == (20, 0) and zero.lost == 0
    assert len(Dense(torch.zeros(20, 12).double()).svd(3).s) == 0


@pytest.mark.parametrize("count", [1, 2])
def test_what_joins_the_base_adds_up(count: int) -> None:
    """Six rounds: factors beside each other, then dense, and the sum is always that of all."""
    base: dict[str, Tensor] = {}
    total = {m: torch.zeros(p.shape).double() for m, p in dense(rows(1), [1.0]).items()}
    for round in range(6):
        products = Products(WIDE)
        all_rows = rows(count) * (1 + round)
        for row in all_rows:
            products.add(row, 4, 0.25)
        before = dict(base)
        base = joined(base, products.over(1.0))
        assert all(torch.equal(before[k], v) for k, v in before.items())  # nothing was changed
        for module, more in dense(all_rows, [0.25] * count).items():
            total[module] += more
            got = delta_of(base, module)
            assert got is not None and near(got, total[module], 2.0**-23)
        factors = narrow(4 * count * (round + 1), 40, 24)
        assert ("up.A" in base) is factors and ("up.W" in base) is not factors
    assert all(v.dtype == torch.float32 for v in base.values())


def test_a_module_that_gets_nothing_keeps_its_part() -> None:
    base = {"other.W": torch.ones(2, 2)}
    got = joined(base, {"up": Stacked(normal(40, 1), normal(1, 24))})
    assert got["other.W"] is base["other.W"] and {"up.A", "up.B"} <= got.keys()
