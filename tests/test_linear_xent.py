"""The token loss where its cases in kernels/linear_xent.py do not reach.

Proved in PyTorch and in C++: vocabularies of several blocks, division, soft-caps and logits far
from 0 follow the definition; a label of weight 0 gives exactly nothing, whatever it holds; in
tiles, a label's bits do not depend on the labels beside it. About 5 seconds on one thread.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsim_kernels import linear_xent
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw, errors
from tests.implementations import DTYPES, IMPLEMENTATIONS, using

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def rows_of_logits(size: float, divide: float, softcap: float) -> KernelSpec:
    """softmax_xent alone, on logits of a given size; case.features[1] is the vocabulary."""

    def inputs(case: Case, dtype: torch.dtype) -> Tensors:
        t, v = case.rows, case.features[1]
        z = size * draw(t, v, dtype=dtype, seed=1)
        return z, torch.arange(t) * 7919 % v, draw(t, seed=2).exp()

    def run(case: Case, inputs: Tensors) -> Tensors:
        z, targets, weight = inputs
        z = z.clone()
        return torch.ops.fedsim.softmax_xent(z, targets, weight, divide, softcap), z

    def formula(case: Case, inputs: Tensors) -> Tensors:
        z, targets, weight = inputs
        z = z.clone().requires_grad_()
        s = z / divide
        if softcap:
            s = softcap * torch.tanh(s / softcap)
        nll = -weight * torch.log_softmax(s, 1).gather(1, targets[:, None])[:, 0]
        return nll.detach(), *torch.autograd.grad(nll.sum(), z)

    return KernelSpec("rows", ("softmax_xent",), inputs, run, formula, lambda *_: (0.0, 0.0))


@pytest.mark.parametrize(
    ("size", "divide", "softcap"),
    [(1, 1, 0), (4, 3, 0), (3, 1, 2), (3, 3, 0.9), (1e-3, 1, 30), (200, 1, 30), (3e4, 1, 0)],
)
@pytest.mark.parametrize("vocabulary", [2, 5, 2048, 5003])
@each_dtype
@each_implementation
def test_rows_of_logits(
    implementation: str, dtype: torch.dtype, vocabulary: int, size: float, divide: float,
    softcap: float,
) -> None:  # fmt: skip
    case = Case("rows", (5,), (0,), features=(1, vocabulary))
    with using(implementation):
        found = errors(rows_of_logits(size, float(divide), float(softcap)), case, dtype)
    assert max(map(max, found)) <= 1


@each_implementation
def test_loss_by_hand(implementation: str) -> None:
    """Two equal logits: nll = ln 2, gradient of the target -1/2, of the other 1/2."""
    z = torch.tensor([[3.0, 3.0], [0.0, math.log(3)]])
    with using(implementation):
        nll = torch.ops.fedsim.softmax_xent(
            z, torch.tensor([1, 1]), torch.tensor([1.0, 2.0]), 1.0, 0.0
        )
    assert nll.tolist() == pytest.approx([math.log(2), 2 * math.log(4 / 3)], rel=1e-6)
    assert z.flatten().tolist() == pytest.approx([0.5, -0.5, 0.5, -0.5], rel=1e-6)


def losses(
    h: Tensor, head: Tensor, targets: Tensor, weight: Tensor, tile: int = 0, g: Tensor | None = None
) -> Tensors:
    """nll and dh."""
    h = h.clone().requires_grad_()
    nll, _ = torch.ops.fedsim.linear_xent(h, head, targets, weight, tile, 1.0, 0.0)
    return nll.detach(), *torch.autograd.grad(nll, h, torch.ones_like(nll) if g is None else g)


@each_dtype
@each_implementation
def test_weightless_labels_give_nothing(implementation: str, dtype: torch.dtype) -> None:
    """Their rows hold NaN and infinity, their targets are none, their incoming gradient is NaN."""
    h, head, targets = draw(6, 8, dtype=dtype), draw(50, 8, dtype=dtype, seed=1), torch.arange(6)
    weight, g = torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0, 0.0]), draw(6, seed=2)
    off = weight == 0
    with using(implementation):
        want = losses(h, head, targets, weight, g=g)
        h[1], h[3], g[off], targets[off] = math.nan, math.inf, math.nan, -100
        got = losses(h, head, targets, weight, g=g)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b) and not b[off].any() and b[~off].any()


@each_implementation
@pytest.mark.parametrize("target", [-1, 50])
def test_targets_beyond_the_vocabulary_are_refused(implementation: str, target: int) -> None:
    with (
        using(implementation),
        pytest.raises(ValueError, match=f"got target {target}; expected 0 to 49"),
    ):
        losses(draw(2, 8), draw(50, 8), torch.tensor([3, target]), torch.ones(2))


def test_no_labels() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    nll, grad = losses(torch.zeros(0, 4), torch.ones(6, 4), none, torch.zeros(0))
    assert nll.shape == (0,) and grad.shape == (0, 4)


@each_dtype
@each_implementation
def test_tiles_make_labels_independent(
    monkeypatch: pytest.MonkeyPatch, implementation: str, dtype: torch.dtype
) -> None:
    """In products of 16 rows a label has the same bits alone, in any place and in any number."""
    monkeypatch.setattr(linear_xent, "CHUNK", 32)
    h, head = draw(83, 24, dtype=dtype), draw(130, 24, dtype=dtype, seed=1)
    targets, weight = torch.arange(83) * 3 % 130, draw(83, seed=2).exp()
    order = torch.randperm(83, generator=torch.Generator().manual_seed(3))
    with using(implementation):
        whole = losses(h, head, targets, weight, 16)
        shuffled = losses(h[order], head, targets[order], weight[order], 16)
        alone = losses(h[40:41], head, targets[40:41], weight[40:41], 16)
        plain = losses(h, head, targets, weight)
    for all_, other, one, untiled in zip(whole, shuffled, alone, plain, strict=True):
        assert torch.equal(all_[order], other) and torch.equal(all_[40:41], one)
        slack = 8 * torch.finfo(dtype).eps * untiled.abs().max()
        assert (all_ - untiled).abs().max() <= slack


def test_a_tile_must_divide_the_chunk() -> None:
    with pytest.raises(ValueError, match="got tile 48; expected a divisor of 256"):
        losses(draw(2, 8), draw(50, 8), torch.arange(2), torch.ones(2), 48)


def test_head_logits() -> None:
    h, head = draw(3, 8), draw(50, 8, seed=1)
    z = h.double() @ head.double().T / 2
    want = 1.5 * torch.tanh(z / 1.5)
    got = linear_xent.head_logits(h, head, divide=2.0, softcap=1.5)
    assert got.dtype == torch.float32 and torch.allclose(got.double(), want, atol=1e-6)
