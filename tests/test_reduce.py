"""Sums and means of updates against float64, with shared and personal starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.core import ClientUpdates
from fedsim.errors import RunError
from fedsim.reduce import uniform, weights_of
from tests.rules import EPS, LAYOUT, M, blocks, plan_of, random_rows, reduce

WEIGHTS = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
OK = [True, True, False, True, True, True]


def personal(cuts: tuple[int, ...]) -> list[ClientUpdates]:
    """Updates whose starts differ; the failed client's row is NaN."""
    starts, rows = random_rows(1, M), random_rows(2, M)
    rows[2] = float("nan")
    whole = blocks(starts[0], rows, OK, cuts)
    return [replace(b, start=starts[b.index]) for b in whole]


@pytest.mark.parametrize("cuts", [(), (1, 4), (3, 3)])
def test_two_ways_of_weighing_in_one_pass(cuts: tuple[int, ...]) -> None:
    plan = plan_of(WEIGHTS)
    got = reduce().sums(plan, iter(personal(cuts)), weights_of(plan), uniform)
    starts, rows = random_rows(1, M).double(), random_rows(2, M).double()
    keep = [i for i in range(M) if OK[i]]
    for total, weight, w in zip(got.totals, got.weights, (WEIGHTS, [1.0] * M), strict=True):
        want = sum(w[i] * (rows[i] - starts[i]) for i in keep)
        assert weight == sum(w[i] for i in keep)
        assert float((total - want).abs().max()) <= 1e-13
    assert got.ok.tolist() == OK


def test_rows_themselves() -> None:
    plan = plan_of(WEIGHTS)
    got = reduce().sums(plan, iter(personal((2,))), uniform, of="row")
    rows = random_rows(2, M).double()
    assert float((got.totals[0] - rows[[0, 1, 3, 4, 5]].sum(0)).abs().max()) <= 1e-13


def test_all_rows_of_those_that_returned() -> None:
    plan = plan_of(WEIGHTS)
    got = reduce().rows(plan, iter(personal((1, 4))))
    starts, rows = random_rows(1, M), random_rows(2, M)
    keep = [0, 1, 3, 4, 5]
    assert got.index.tolist() == keep and torch.equal(got.row, rows[keep])
    assert torch.equal(got.delta, rows[keep] - starts[keep])
    assert np.allclose(got.weights, np.array(WEIGHTS)[keep] / 29.0, rtol=EPS)


@pytest.mark.parametrize("way", ["mean", "rows"])
def test_nobody_returned(way: str) -> None:
    plan = plan_of(WEIGHTS)
    updates = blocks(random_rows(1, 1)[0], random_rows(2, M), [False] * M)
    with pytest.raises(RunError, match="none of the 6 clients"):
        getattr(reduce(), way)(plan, updates)


def test_kinds_of_the_layout() -> None:
    """A and B are all there is, a mask covers what it names, and a third of the rank is a third."""
    of = {kind: LAYOUT.numel(3, (kind,)) for kind in ("A", "B")}
    assert sum(of.values()) == LAYOUT.numel() and of["A"] == int(LAYOUT.mask(("A",)).sum())
    assert of["B"] == int(LAYOUT.mask(("B",)).sum()) and LAYOUT.numel(1, ("A",)) * 3 == of["A"]
