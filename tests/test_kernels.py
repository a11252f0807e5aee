"""Every hot operation against the formula in its header, written out densely in float64.

Proved here: outputs and every gradient of grouped LoRA, packed attention and the token loss lie
within one tolerance rule of float64, in fp32 and bf16, over one list of cases; nothing leaks
between slots, not even NaN; AdamW follows torch's AdamW and clipping, row by row; Segments refuse
what cannot be packed. About 5 seconds on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedsim.core import AdapterLayout
from fedsim_kernels import linear_xent as xent
from fedsim_kernels.adamw import adamw_ref
from fedsim_kernels.grouped_lora import grouped_lora_backward_ref, grouped_lora_ref
from fedsim_kernels.linear_xent import linear_xent_ref
from fedsim_kernels.packed_attention import packed_attention_ref
from fedsim_kernels.segments import Segments


@dataclass(frozen=True)
class Case:
    """One packing and one set of sizes; every operation takes what it needs of it."""

    name: str
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    ranks: tuple[int, ...] = (4, 4, 4)  # of each slot; R is the largest
    features: tuple[int, int] = (16, 24)  # I and O, or hidden size and vocabulary
    heads: tuple[int, int, int] = (2, 2, 8)  # Hq, Hkv, D
    window: int | None = None
    softcap: float | None = None

    @property
    def segments(self) -> Segments:
        return Segments.build(self.lengths, self.slots, self.parents)

    def rows(self) -> Tensor:
        """(T,) slot of each packed row."""
        return torch.tensor(self.slots).repeat_interleave(torch.tensor(self.lengths))


CHAIN: dict[str, Any] = {
    "lengths": (6, 4, 3, 2, 5), "slots": (0, 0, 0, 0, 1), "parents": (-1, 0, 1, 0, -1)
}  # fmt: skip
CASES = (
    Case("one-slot", (7, 5), (0, 0)),
    Case("one-token", (1,), (0,)),
    Case("a-token-each", (1, 1, 1), (0, 1, 2)),
    Case("skewed", (60, 1, 2), (0, 1, 2)),
    Case("slots-in-any-order", (3, 2, 6, 5), (2, 2, 0, 1)),
    Case("an-idle-slot", (9, 8), (0, 2)),
    Case("mixed-ranks", (8, 7, 9), (0, 1, 2), ranks=(1, 5, 3)),
    Case("odd-sizes", (5, 11, 3), (0, 1, 1), ranks=(3, 3, 2), features=(13, 7), heads=(3, 3, 5)),
    Case("prefix-chain", **CHAIN),
    Case("window", (9, 4, 12), (0, 0, 1), window=4),
    Case("window-of-one", (5, 3), (0, 1), window=1),
    Case("window-chain", **CHAIN, window=5),
    Case("softcap", (9, 4, 12), (0, 0, 1), softcap=1.5),
    Case("softcap-window-chain", **CHAIN, window=5, softcap=1.5, heads=(4, 2, 8)),
    Case("grouped-queries", (9, 4, 12), (0, 0, 1), heads=(6, 2, 8)),
    Case("one-key-head", **CHAIN, heads=(4, 1, 8)),
)
DTYPES = (torch.float32, torch.bfloat16)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
Formula = Callable[..., tuple[Tensor, ...]]


def check(dtype: torch.dtype, got: tuple[Tensor, ...], inputs: tuple[Tensor, ...],
          formula: Formula) -> None:  # fmt: skip
    """The tolerance rule. Against the formula in float64, the RMS error is at most 2 times and
    the largest error at most 8 times that of the formula in the same dtype, both plus
    eps max|exact|."""
    exact = formula(*(x.double() for x in inputs))
    plain = formula(*(x.to(dtype) for x in inputs))
    for ours, theirs, true in zip(got, plain, exact, strict=True):
        assert ours.shape == true.shape
        error, allowed = (ours.double() - true).abs(), (theirs.double() - true).abs()
        slack = torch.finfo(dtype).eps * true.abs().max()
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt() + slack
        assert error.max() <= 8 * allowed.max() + slack


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# Grouped LoRA


def lora_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y, x, a, b, g and the arenas that gradients are added to, none of them zero."""
    (i, o), t, k, r = case.features, sum(case.lengths), len(case.ranks), max(case.ranks)
    a, b = draw(k, r, i, seed=3) * i**-0.5, draw(k, o, r, seed=4)
    for slot, rank in enumerate(case.ranks):
        a[slot, rank:], b[slot, :, rank:] = 0, 0
    return (
        draw(t, o, dtype=dtype, seed=1), draw(t, i, dtype=dtype, seed=2), a, b,
        draw(t, o, dtype=dtype, seed=5), draw(k, r, i, seed=6), draw(k, o, r, seed=7),
        draw(t, i, dtype=dtype, seed=8),
    )  # fmt: skip


SCALE = (0.7, 1.9, 0.3)


def run_lora(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    y, x, a, b, g, *arenas = (t.clone() for t in inputs)
    h = grouped_lora_ref(y, x, a, b, SCALE, case.segments)
    grouped_lora_backward_ref(g, x, h, a, b, SCALE, case.segments, *arenas)
    return y, *arenas


@each_dtype
@each_case
def test_grouped_lora(case: Case, dtype: torch.dtype) -> None:
    def formula(y: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor,
                *arenas: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        leaves = [t.clone().requires_grad_() for t in (a, b, x)]
        slot = case.rows()
        h = torch.einsum("tri,ti->tr", leaves[0][slot], leaves[2])
        update = torch.einsum("tor,tr->to", leaves[1][slot], h)
        out = y + torch.tensor(SCALE, dtype=y.dtype)[slot, None] * update
        grads = torch.autograd.grad(out, leaves, g)
        return out.detach(), *(old + new for old, new in zip(arenas, grads, strict=True))

    inputs = lora_inputs(case, dtype)
    check(dtype, run_lora(case, inputs), inputs, formula)


@each_case
def test_grouped_lora_touches_only_what_trains(case: Case) -> None:
    """Idle slots and ranks beyond a client's own keep their gradients to the bit."""
    inputs = lora_inputs(case, torch.float32)
    _, grad_a, grad_b, _ = run_lora(case, inputs)
    for slot, rank in enumerate(case.ranks):
        used = rank if slot in case.slots else 0
        assert torch.equal(grad_a[slot, used:], inputs[5][slot, used:])
        assert torch.equal(grad_b[slot, :, used:], inputs[6][slot, :, used:])


def test_grouped_lora_without_dx() -> None:
    case = CASES[3]
    y, x, a, b, g, grad_a, grad_b, _ = lora_inputs(case, torch.float32)
    want = run_lora(case, (y, x, a, b, g, grad_a, grad_b, torch.zeros_like(x)))
    h = grouped_lora_ref(y, x, a, b, SCALE, case.segments)
    grouped_lora_backward_ref(g, x, h, a, b, SCALE, case.segments, grad_a, grad_b, None)
    assert torch.equal(grad_a, want[1]) and torch.equal(grad_b, want[2])


# Packed attention


def attention_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v, g with the strides of a transpose, as a model hands them over."""
    hq, hkv, d = case.heads
    t = sum(case.lengths)
    return tuple(
        draw(t, h, d, dtype=dtype, seed=seed).transpose(0, 1)
        for seed, h in enumerate((hq, hkv, hkv, hq))
    )


def visible(case: Case) -> Tensor:
    """(T, T) bool from the definition: own sequence and ancestors, 0 <= distance < window."""
    parents = case.parents or (-1,) * len(case.lengths)
    sequence, position, chains = [], [], []
    for b, n in enumerate(case.lengths):
        chain, before = {b}, 0
        p = parents[b]
        while p >= 0:
            chain.add(p)
            before += case.lengths[p]
            p = parents[p]
        chains.append(chain)
        sequence += [b] * n
        position += range(before, before + n)
    limit = case.window or math.inf
    return torch.tensor([
        [sequence[j] in chains[sequence[t]] and 0 <= position[t] - position[j] < limit
         for j in range(len(position))] for t in range(len(position))
    ])  # fmt: skip


def run_attention(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *leaves, g = inputs
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
              for x in leaves]  # fmt: skip
    out = packed_attention_ref(
        *leaves, case.segments, scale=0.6, window=case.window, softcap=case.softcap
    )
    return out.detach(), *torch.autograd.grad(out, leaves, g)


@each_dtype
@each_case
def test_packed_attention(case: Case, dtype: torch.dtype) -> None:
    mask = visible(case)

    def formula(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
        head = torch.arange(q.shape[0]) // (q.shape[0] // k.shape[0])
        if q.dtype != torch.float64 and case.softcap is None:
            # Plain torch in the same dtype: its CPU kernel has an exponential of its own.
            out = F.scaled_dot_product_attention(q[None], k[None, head], v[None, head], mask,
                                                 scale=0.6)[0]  # fmt: skip
        else:
            z = 0.6 * q @ k[head].transpose(1, 2)
            if case.softcap is not None:
                z = case.softcap * torch.tanh(z / case.softcap)
            out = torch.softmax(z.masked_fill(~mask, -math.inf), -1) @ v[head]
        return out.detach(), *torch.autograd.grad(out, (q, k, v), g)

    inputs = attention_inputs(case, dtype)
    assert not inputs[0].is_contiguous() or case.heads[0] == 1 or sum(case.lengths) == 1
    got = run_attention(case, inputs)
    assert all(x.dtype == dtype for x in got)
    check(dtype, got, inputs, formula)


def test_packed_attention_refuses_other_segments() -> None:
    q, k, v, _ = attention_inputs(CASES[0], torch.float32)
    with pytest.raises(ValueError, match="segments cover 11 rows; expected 12"):
        packed_attention_ref(q, k, v, Segments.build([11], [0]), scale=1.0)


# The token loss; every row of a case is a label of its slot


def xent_inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """h, head, label weights and the gradient of each slot's loss."""
    (d, v), t = case.features, sum(case.lengths)
    return (draw(t, d, dtype=dtype, seed=1), draw(v, d, dtype=dtype, seed=2),
            draw(t, seed=3).exp() / t, draw(len(case.ranks), seed=4))  # fmt: skip


def run_xent(
    case: Case, inputs: tuple[Tensor, ...], divide: float, softcap: float | None
) -> tuple[Tensor, ...]:
    h, head, weight, g = inputs
    h = h.clone().requires_grad_()
    targets = torch.arange(len(h)) * 5 % len(head)
    loss = linear_xent_ref(
        h, head, targets, case.rows(), weight, len(g), divide=divide, softcap=softcap
    )
    return loss.detach(), *torch.autograd.grad(loss, h, g)


@pytest.mark.parametrize(("divide", "softcap"), [(1.0, None), (3.0, None), (1.0, 2.0), (3.0, 0.9)])
@each_dtype
@each_case
def test_linear_xent(
    monkeypatch: pytest.MonkeyPatch, case: Case, dtype: torch.dtype, divide: float,
    softcap: float | None,
) -> None:  # fmt: skip
    """Chunks of four rows, so that the cases lie on both sides of a chunk's edge."""
    monkeypatch.setattr(xent, "CHUNK", 4)
    slot = case.rows()

    def formula(h: Tensor, head: Tensor, weight: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        h = h.clone().requires_grad_()
        z = (h @ head.T) / divide
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        rows = torch.arange(len(h))
        nll = -torch.log_softmax(z, -1)[rows, rows * 5 % len(head)]
        loss = torch.zeros_like(g).index_add(0, slot, nll * weight)
        return loss.detach(), *torch.autograd.grad(loss, h, g)

    inputs = xent_inputs(case, dtype)
    got = run_xent(case, inputs, divide, softcap)
    check(dtype, got, inputs, formula)
    idle = [s for s in range(len(case.ranks)) if s not in case.slots]
    assert not got[0][idle].any()


def test_linear_xent_without_labels() -> None:
    h = torch.zeros(0, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = linear_xent_ref(h, torch.ones(6, 4), none, none, torch.zeros(0), 3)
    loss.sum().backward()
    assert loss.tolist() == [0, 0, 0] and h.grad is not None and h.grad.shape == (0, 4)


# A sick slot stays alone in every operation

RUNS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lora": run_lora, "attention": run_attention,
    "xent": lambda case, inputs: run_xent(case, inputs, 1.0, None),
}  # fmt: skip


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("case", [c for c in CASES if len(set(c.slots)) > 1],
                         ids=lambda c: c.name)  # fmt: skip
def test_poison_stays_in_its_slot(case: Case, name: str, poison: float) -> None:
    """Everything of one slot is poisoned; no bit of another's results changes."""
    sick = case.slots[-1]
    row = case.rows() == sick
    slot = torch.arange(len(case.ranks)) == sick
    head = (slice(None), row)
    build, poisoned, outputs = {
        "lora": (lora_inputs, (row, row, slot, slot, row, slot, slot, row), (row, slot, slot, row)),
        "attention": (attention_inputs, (head,) * 4, (head,) * 4),
        "xent": (xent_inputs, (row, None, row, slot), (slot, row)),
    }[name]
    inputs = build(case, torch.float32)
    before = RUNS[name](case, inputs)
    for x, where in zip(inputs, poisoned, strict=True):
        if where is not None:
            x[where] = poison
    after = RUNS[name](case, inputs)
    for old, new, where in zip(before, after, outputs, strict=True):
        assert not new[where].isfinite().all()
        old[where], new[where] = 0, 0
        assert torch.equal(old, new)


# AdamW

LAYOUT = AdapterLayout.build({"a": (5, 7), "b": (7, 3)}, 3)
GAPS = torch.ones(LAYOUT.size, dtype=torch.bool)
for _piece in LAYOUT.pieces:
    GAPS[_piece.offset : _piece.offset + _piece.size] = False
BETAS, EPS = (0.9, 0.999), 1e-8


def matrix(k: int, seed: int) -> Tensor:
    return draw(k, LAYOUT.size, seed=seed).masked_fill(GAPS, 0)


@pytest.mark.parametrize("max_norm", [1.0, 9.0, math.inf])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_follows_torch(weight_decay: float, max_norm: float) -> None:
    """Ten steps of rows with their own learning rates that rest at different steps."""
    k, lr = 4, torch.tensor([1e-2, 3e-3, 1e-1, 5e-5])
    rests = ((), (2, 5), (0, 1, 2), (9,))
    row, m, v = matrix(k, 0), torch.zeros(k, LAYOUT.size), torch.zeros(k, LAYOUT.size)
    factors = [
        [nn.Parameter(LAYOUT.view(row, p)[i].clone()) for p in LAYOUT.pieces] for i in range(k)
    ]
    optimisers = [
        torch.optim.AdamW(f, lr=float(lr[i]), betas=BETAS, eps=EPS, weight_decay=weight_decay)
        for i, f in enumerate(factors)
    ]
    done = torch.zeros(k)
    for step in range(10):
        grad = matrix(k, step + 1)
        active = torch.tensor([step not in rest for rest in rests])
        done += active
        for i in active.nonzero().flatten().tolist():
            for p, piece in zip(factors[i], LAYOUT.pieces, strict=True):
                p.grad = LAYOUT.view(grad, piece)[i].clone()
            want = nn.utils.clip_grad_norm_(factors[i], max_norm)
            optimisers[i].step()
            assert abs(torch.linalg.vector_norm(grad[i]) - want) <= 1e-6 * want
        adamw_ref(
            row, grad, m, v, lr=lr, step=done, active=active, betas=BETAS, eps=EPS,
            weight_decay=weight_decay, max_norm=max_norm,
        )  # fmt: skip
    for i in range(k):
        for p, piece in zip(factors[i], LAYOUT.pieces, strict=True):
            difference = LAYOUT.view(row, piece)[i] - p.detach()
            assert difference.norm() <= 1e-7 * p.detach().norm()
    assert GAPS.any() and not row[:, GAPS].any() and not m[:, GAPS].any() and not v[:, GAPS].any()


def test_adamw_leaves_resting_and_sick_rows() -> None:
    state = [matrix(5, seed) for seed in range(3)]
    state[2].abs_()
    before = [x.clone() for x in state]
    grad = matrix(5, 3)
    grad[1, 0], grad[2, 2], grad[3] = math.nan, -math.inf, 1e30
    norm = adamw_ref(
        state[0], grad, *state[1:], lr=torch.full((5,), 1e-2), step=torch.full((5,), 3.0),
        active=torch.tensor([True, True, True, True, False]), betas=BETAS, eps=EPS,
        weight_decay=0.1, max_norm=1.0,
    )  # fmt: skip
    assert torch.isfinite(norm).tolist() == [True, False, False, False, True]
    for old, new in zip(before, state, strict=True):
        assert torch.equal(old[1:], new[1:]) and not torch.equal(old[0], new[0])


# Segments


def test_segments() -> None:
    segments = Segments.build([2, 3, 1, 4], [5, 5, 0, 0], [-1, 0, -1, -1])
    assert segments.tokens == 10
    assert segments.spans == ((5, 0, 5), (0, 5, 10))
    chain = Segments.build([1] * 4, [0] * 4, [-1, 0, 1, 0])
    assert [chain.chain(i) for i in range(4)] == [[0], [0, 1], [0, 1, 2], [0, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 2], [0]), "2 lengths, 1 slots, 2 parents; expected equal counts"),
        (([1], [0], [-1, -1]), "1 lengths, 1 slots, 2 parents"),
        (([2, 0], [0, 1]), "sequence 1: got length 0; expected >= 1"),
        (([2, -3], [0, 1]), "sequence 1: got length -3"),
        (([1, 1, 1], [0, 1, 0]), "sequence 2: slot 0 appears in two places"),
        (([1, 1], [0, 0], [-1, 1]), "sequence 1: got parent 1; expected an earlier sequence"),
        (([1, 1], [0, 0], [1, -1]), "sequence 0: got parent 1"),
        (([1, 1], [0, 1], [-1, 0]), "sequence 1: got parent 0; expected an earlier .* of slot 1"),
    ],
)
def test_segments_refuse(arguments: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segments.build(*arguments)
