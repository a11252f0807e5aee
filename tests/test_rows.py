"""What works on the matrix whose rows are adapters: AdamW with clipping, and the weighted sum.

Proved in PyTorch and in C++: ten steps of AdamW follow torch's AdamW and clip_grad_norm_, row by
row, each with its own learning rates and rests; a row that rests or is sick keeps every bit; no
step ever overflows, because the bound of a step holds for any gradients and is reached; the sum is
that of exact arithmetic. About 10 seconds on one thread.
"""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedsim.core import AdapterLayout
from fedsim_kernels.adamw import bound
from fedsim_kernels.spec import draw
from tests.implementations import IMPLEMENTATIONS, using

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
LAYOUT = AdapterLayout.build({"a": (5, 7), "b": (7, 3)}, 3)
GAPS = torch.ones(LAYOUT.size, dtype=torch.bool)
for _piece in LAYOUT.pieces:
    GAPS[_piece.offset : _piece.offset + _piece.size] = False
BETAS, EPS = (0.9, 0.999), 1e-8
LARGEST = torch.finfo(torch.float32).max


def matrix(k: int, seed: int) -> Tensor:
    return draw(k, LAYOUT.size, seed=seed).masked_fill(GAPS, 0)


@pytest.mark.parametrize("max_norm", [1.0, 9.0, math.inf])
@pytest.mark.parametrize(("weight_decay", "ratio"), [(0.0, 1.0), (0.1, 1.0), (0.1, 16.0)])
@each_implementation
def test_adamw_follows_torch(
    implementation: str, weight_decay: float, ratio: float, max_norm: float
) -> None:
    """Ten steps of rows that rest at different steps; B learns `ratio` times as fast as A."""
    k, lr = 4, torch.tensor([1e-2, 3e-3, 1e-1, 5e-5]) / ratio
    rests = ((), (2, 5), (0, 1, 2), (9,))
    row, m, v = matrix(k, 0), torch.zeros(k, LAYOUT.size), torch.zeros(k, LAYOUT.size)
    scale = torch.ones(1, LAYOUT.size)
    for piece in LAYOUT.pieces:
        LAYOUT.view(scale, piece).fill_(ratio if piece.kind == "B" else 1.0)
    factors = [
        [nn.Parameter(LAYOUT.view(row, p)[i].clone()) for p in LAYOUT.pieces] for i in range(k)
    ]
    optimisers = [
        torch.optim.AdamW(
            [{"params": [p], "lr": float(lr[i] * (ratio if piece.kind == "B" else 1.0))}
             for p, piece in zip(f, LAYOUT.pieces, strict=True)],
            betas=BETAS, eps=EPS, weight_decay=weight_decay,
        ) for i, f in enumerate(factors)
    ]  # fmt: skip
    done = torch.zeros(k)
    for step in range(10):
        grad = matrix(k, step + 1)
        active = torch.tensor([step not in rest for rest in rests])
        done += active
        norms = torch.zeros(k)
        for i in active.nonzero().flatten().tolist():
            for p, piece in zip(factors[i], LAYOUT.pieces, strict=True):
                p.grad = LAYOUT.view(grad, piece)[i].clone()
            norms[i] = nn.utils.clip_grad_norm_(factors[i], max_norm)
            optimisers[i].step()
        with using(implementation):
            got = torch.ops.fedsim.adamw(
                row, grad, m, v, lr, done, active, None if ratio == 1 else scale[0], *BETAS, EPS,
                weight_decay, max_norm,
            )  # fmt: skip
        assert torch.allclose(got, norms, rtol=1e-6, atol=0)
    for i in range(k):
        for p, piece in zip(factors[i], LAYOUT.pieces, strict=True):
            difference = LAYOUT.view(row, piece)[i] - p.detach()
            assert difference.norm() <= 1e-7 * p.detach().norm()
    assert GAPS.any() and not row[:, GAPS].any() and not m[:, GAPS].any() and not v[:, GAPS].any()


def step_of(
    implementation: str, row: Tensor, grad: Tensor, lr: float, step: int, *,
    active: Tensor | None = None, scale: Tensor | None = None, weight_decay: float = 0.1,
    max_norm: float = 1.0, state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """row, m, v and norm after one step."""
    k = len(row)
    m, v = state or (torch.zeros_like(row), torch.zeros_like(row))
    row, m, v = row.clone(), m.clone(), v.clone()
    with using(implementation):
        norm = torch.ops.fedsim.adamw(
            row, grad.clone(), m, v, torch.full((k,), lr), torch.full((k,), step),
            torch.ones(k, dtype=torch.bool) if active is None else active, scale, *BETAS, EPS,
            weight_decay, max_norm,
        )  # fmt: skip
    return row, m, v, norm


@each_implementation
def test_adamw_leaves_resting_and_sick_rows(implementation: str) -> None:
    """NaN, infinity and a norm that overflows in the gradient; NaN and infinity in the row; and a
    row that rests, whose gradient may then hold anything."""
    rows, grad, moments = matrix(8, 0), matrix(8, 1), (matrix(8, 2), matrix(8, 3).abs())
    grad[1, 0], grad[2, 2], grad[3] = math.nan, -math.inf, 1e30
    rows[4, 1], rows[5, 3] = math.nan, math.inf
    grad[6, 0] = math.nan
    active = torch.tensor([True] * 6 + [False, True])
    row, m, v, norm = step_of(implementation, rows, grad, 1e-2, 3, active=active, state=moments)
    assert norm.isfinite().tolist() == [True, False, False, False, False, False, True, True]
    assert norm[6] == 0
    for old, new in ((rows, row), (moments[0], m), (moments[1], v)):
        assert torch.equal(old[1:7].view(torch.int32), new[1:7].view(torch.int32))
        assert all(not torch.equal(old[i], new[i]) for i in (0, 7))


@each_implementation
def test_adamw_works_on_rows_that_lie_apart(implementation: str) -> None:
    """A slice of a wider matrix changes as a matrix of its own does, and nothing beside it."""
    wide = [draw(3, 40, seed=s) for s in range(4)]
    wide[3].abs_()
    before = [x.clone() for x in wide]
    parts = [x[:, 3:36] for x in wide]
    lr, step = torch.full((3,), 1e-2), torch.full((3,), 2)
    rest = (lr, step, torch.ones(3, dtype=torch.bool), None, *BETAS, EPS, 0.1, 1.0)
    own = [p.clone() for p in parts]
    with using(implementation):
        torch.ops.fedsim.adamw(*own, *rest)
        torch.ops.fedsim.adamw(*parts, *rest)
    for i in (0, 2, 3):
        assert torch.equal(parts[i], own[i]) and not torch.equal(own[i], before[i][:, 3:36])
        wide[i][:, 3:36] = before[i][:, 3:36]
        assert torch.equal(wide[i], before[i])


# No step overflows


def test_bound_by_hand() -> None:
    """One gradient: m_hat = g, v_hat = g^2. Two: (0.1 / 0.19) sqrt(1.999 (1 + 0.81 / 0.999))."""
    two = 0.1 / 0.19 * math.sqrt(1.999 * (1 + 0.81 / 0.999))
    assert bound(torch.tensor([1, 2]), *BETAS).tolist() == pytest.approx([1.0, two], rel=1e-12)
    assert bound(torch.tensor(10**6), *BETAS) < 7.3


def ratio(gradients: Tensor, beta1: float, beta2: float) -> Tensor:
    """|m_hat| / sqrt(v_hat) of a sequence of gradients, in float64."""
    n = len(gradients)
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    m = (1 - beta1) * (beta1**age * gradients).sum() / (1 - beta1**n)
    v = (1 - beta2) * (beta2**age * gradients.square()).sum() / (1 - beta2**n)
    return m.abs() / v.sqrt()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from([-1, 1]), st.floats(-60, 60)), min_size=1, max_size=60),
    st.floats(0, 0.99), st.floats(0.01, 0.999),
)  # fmt: skip
def test_bound_holds_for_any_gradients(
    signed: list[tuple[int, float]], beta1: float, part: float
) -> None:
    """Signs and exponents of the gradients are free; so are the betas, b1^2 < b2 < 1."""
    beta2 = beta1 * beta1 + (1 - beta1 * beta1) * part
    gradients = torch.tensor([s * 10**e for s, e in signed], dtype=torch.float64)
    limit = bound(torch.tensor(len(signed)), beta1, beta2)
    assert ratio(gradients, beta1, beta2) <= limit * (1 + 1e-9)


@pytest.mark.parametrize("n", [1, 2, 30, 400])
def test_bound_is_reached(n: int) -> None:
    """Gradients in proportion to (b1 / b2)^age make Cauchy and Schwarz an equality."""
    age = torch.arange(n - 1, -1, -1, dtype=torch.float64)
    worst = (BETAS[0] / BETAS[1]) ** age
    assert ratio(worst, *BETAS) == pytest.approx(float(bound(torch.tensor(n), *BETAS)), rel=1e-9)


@each_implementation
def test_adamw_refuses_a_step_that_could_overflow(implementation: str) -> None:
    """At lr = 1e38 a first step is at most 1e38: it fits from 0, not from 3e38, not four times as
    long, and not after 400 gradients, when it could be 7.27e38."""
    zero, far, grad = torch.zeros(1, 20), torch.full((1, 20), 3e38), draw(1, 20)
    row, _, _, norm = step_of(implementation, zero, grad, 1e38, 1, weight_decay=0.0)
    assert norm.isfinite() and row.isfinite().all() and row.abs().max() > 0.99e38
    for start, step, scale in (
        (far, 1, None),
        (zero, 1, torch.full((20,), 4.0)),
        (zero, 400, None),
    ):
        row, m, v, norm = step_of(
            implementation, start, grad, 1e38, step, scale=scale, weight_decay=0.0
        )
        assert norm == math.inf and torch.equal(row, start) and not m.any() and not v.any()


exponents = st.one_of(st.floats(-45, 38.5), st.floats(37.5, 38.5))  # often near the largest


@settings(max_examples=150, deadline=None, derandomize=True)
@example([30.0] * 4, 38.5, 38.0, True, 0.0)
@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=8), exponents, exponents, st.booleans(),
    st.floats(0, 10),
)  # fmt: skip
def test_adamw_never_overflows(
    gradients: list[float], rate: float, size: float, clipped: bool, decay: float
) -> None:
    """Any learning rate, row and gradients: a row stays finite, and is left alone when sick."""
    sizes = torch.tensor([float(torch.tensor(10.0, dtype=torch.float64) ** size)]).clamp(
        max=LARGEST
    )
    lr = min(10.0**rate, LARGEST)
    for implementation in IMPLEMENTATIONS[:2]:
        row = (sizes * torch.tensor([-1.0, 1.0, 0.5, 0.0, 1.0])).expand(1, 5).contiguous()
        state = (torch.zeros(1, 5), torch.zeros(1, 5))
        taken = 0
        for i, g in enumerate(gradients):
            grad = draw(1, 5, seed=i) * 10.0**g
            new, m, v, norm = step_of(
                implementation, row, grad, lr, taken + 1, weight_decay=decay, state=state,
                max_norm=1.0 if clipped else math.inf,
            )  # fmt: skip
            assert new.isfinite().all() and m.isfinite().all() and v.isfinite().all()
            if norm.isfinite():
                taken += 1
            else:
                assert torch.equal(new, row) and torch.equal(m, state[0])
            row, state = new, (m, v)


# The weighted sum of rows


@pytest.mark.parametrize(("from_start", "stride"), list(product([False, True], [37, 50])))
@each_implementation
def test_weighted_rows_is_the_exact_sum(implementation: str, from_start: bool, stride: int) -> None:
    """Against math.fsum of products in fp64, over rows of very different size."""
    rows = (draw(6, stride) * 10.0 ** torch.arange(-8, 16, 4).float()[:, None])[:, :37]
    start = draw(37, seed=1)
    weights = torch.tensor([0.3, -1.5, 0.25, 1e-3, 0.0, 1e-7], dtype=torch.float64)
    rows[4] = math.nan  # of weight 0
    total = draw(37, seed=2).double()
    want = []
    for j in range(37):
        terms = [float(weights[k]) * (float(rows[k, j]) - from_start * float(start[j]))
                 for k in (0, 1, 2, 3, 5)]  # fmt: skip
        want.append((math.fsum([float(total[j]), *terms]), max(map(abs, terms))))
    with using(implementation):
        torch.ops.fedsim.weighted_rows(total, rows, start if from_start else None, weights)
    for got, (exact, largest) in zip(total.tolist(), want, strict=True):
        assert abs(got - exact) <= 6 * 2.0**-52 * largest  # one rounding for each row


@each_implementation
def test_weighted_rows_folds_in_parts(implementation: str) -> None:
    """Rows that come in two calls give the bits of one call: the order alone decides."""
    rows, start, weights = draw(5, 3000), draw(3000, seed=1), draw(5, seed=2).double().abs()
    once, twice = torch.zeros(2, 3000, dtype=torch.float64)
    with using(implementation):
        torch.ops.fedsim.weighted_rows(once, rows, start, weights)
        torch.ops.fedsim.weighted_rows(twice, rows[:2], start, weights[:2])
        torch.ops.fedsim.weighted_rows(twice, rows[2:], start, weights[2:])
    assert torch.equal(once, twice) and once.any()
