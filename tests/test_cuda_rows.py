"""The Triton kernels that work row by row, in Triton's interpreter on CPU tensors.

Proved here: norm, rotary, SwiGLU, dropout, token loss, AdamW and the weighted sum of rows keep the
one tolerance rule in fp32, bf16 and fp16, also beyond one block; a broken kernel does not keep it;
dropout equals `masks.keep_mask` bit for bit; a sick, resting or weightless row changes no other row
and keeps every bit of its own; AdamW judges overflow as the reference does; a norm of thousands
of blocks is the same whatever lies beside it. About 60 seconds.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim_kernels import adamw as adamw_op
from fedsim_kernels import dispatch
from fedsim_kernels.reduce import weighted_rows_ref
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw, errors
from tests.conftest import require
from tests.masks import keep_mask

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Rows know nothing of their packing: those cases that differ in sizes, and one with padding.
NAMES = ("one-token", "mixed-ranks", "ranks-over-a-tile", "odd-sizes", "chunks", "softcap",
         "grouped-queries", "one-key-head")  # fmt: skip
# The interpreter computes in numpy, which warns of the infinities and NaN that tests are about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|All-NaN slice) encountered:RuntimeWarning"
)
FLT_MAX = torch.finfo(torch.float32).max
OPS = torch.ops.fedsim


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    require("triton", importlib.util.find_spec("triton") is not None, "Triton is not installed")
    with dispatch.use("triton"):
        yield


def cuda(file: str) -> Any:
    return importlib.import_module(f"fedsim_kernels.cuda.{file}")


def spec(file: str) -> KernelSpec:
    found: KernelSpec = importlib.import_module(f"fedsim_kernels.{file}").KERNEL
    return found


# A block holds 1,024 columns of SwiGLU and dropout and 16 heads of 128. Most cases of the other
# kernels, of up to 52,800 numbers in a row of AdamW, are beyond theirs.
BEYOND = Case("beyond-a-block", (2, 1), (0, 1), features=(1300, 1037), ranks=(5, 2, 4),
              heads=(34, 17, 66))  # fmt: skip
WIDE_ROWS = tuple(Case(f"rows-of-{n}", (2, 9), (0, 1), features=(n, 3)) for n in (257, 1025, 4097))


def chosen(file: str) -> list[tuple[str, Case, torch.dtype]]:
    cases = [c for c in spec(file).cases if c.name in NAMES]
    assert len(cases) == len(NAMES)
    cases += [BEYOND] if file in ("rotary", "swiglu", "dropout") else []
    cases += WIDE_ROWS if file == "rms_norm" else ()
    dtypes = FLOATS[:1] if file in ("adamw", "reduce") else FLOATS
    return [(file, c, dtype) for c in cases for dtype in dtypes]


FILES = ("rms_norm", "rotary", "swiglu", "dropout", "linear_xent", "adamw", "reduce")
ALL = [entry for file in FILES for entry in chosen(file)]


@pytest.mark.parametrize(
    ("file", "case", "dtype"), ALL, ids=[f"{f}-{c.name}-{str(d)[6:]}" for f, c, d in ALL]
)
def test_within_the_tolerance_rule(file: str, case: Case, dtype: torch.dtype) -> None:
    assert all(max(e) <= 1 for e in errors(spec(file), case, dtype))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=["bfloat16", "float16"])
def test_fp32_weights_and_angles_beside_half_precision(dtype: torch.dtype) -> None:
    """Norm weights, cos and sin may stay in fp32."""

    def norm(case: Case, dtype: torch.dtype) -> Tensors:
        x, _, g = spec("rms_norm").inputs(case, dtype)
        return x, 1 + 0.3 * draw(x.shape[1]), g

    def turn(case: Case, dtype: torch.dtype) -> Tensors:
        q, k, cos, _, *g = spec("rotary").inputs(case, dtype)
        angle = 3 * draw(*cos.shape, seed=9)
        return q, k, angle.cos(), angle.sin(), *g

    for file, inputs in (("rms_norm", norm), ("rotary", turn)):
        kernel = spec(file)
        case = next(c for c in kernel.cases if c.name == "softcap")
        mixed = replace(kernel, inputs=inputs)
        assert all(max(e) <= 1 for e in errors(mixed, case, dtype))


# The token loss over several blocks of a vocabulary: 4,096 logits each


def _logits(case: Case, dtype: torch.dtype) -> Tensors:
    t, v = case.rows, case.features[1]
    weight = draw(t, seed=2).exp()
    weight[1] = 0
    return 5 * draw(t, v, dtype=dtype), torch.tensor([0, 1, v - 1, v // 2, 4095]) % v, weight


def _loss(case: Case, inputs: Tensors) -> Tensors:
    z = inputs[0].clone()
    nll = OPS.softmax_xent(z, *inputs[1:], 1.7, case.softcap or 0.0)
    return nll, z


def _loss_formula(case: Case, inputs: Tensors) -> Tensors:
    z, targets, weight = inputs
    z = z.clone().requires_grad_()
    s = z / 1.7
    if case.softcap:
        s = case.softcap * torch.tanh(s / case.softcap)
    nll = weight * torch.nn.functional.cross_entropy(s, targets, reduction="none").to(weight.dtype)
    return nll.detach(), *torch.autograd.grad(nll.sum(), z)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("vocabulary", [2, 4096, 9001])
def test_token_loss_over_blocks(vocabulary: int, softcap: float | None, dtype: torch.dtype) -> None:
    loss = KernelSpec("loss", (), _logits, _loss, _loss_formula, lambda *_: (0.0, 0.0))
    case = Case("blocks", (5,), (0,), features=(1, vocabulary), softcap=softcap)
    assert all(max(e) <= 1 for e in errors(loss, case, dtype))


def test_rows_too_wide_for_a_program_are_refused() -> None:
    with pytest.raises(ValueError, match="rms_norm: got rows of 16385; expected at most 16384"):
        OPS.rms_norm(torch.ones(1, 16385), torch.ones(16385), 1e-6)
    q = torch.ones(1, 1, 514)
    with pytest.raises(ValueError, match="rotary: got heads of 514; expected an even size up to"):
        OPS.rotary(q, q, q[0], q[0])


# A kernel that is wrong does not pass


def _scaled(by: float) -> Callable[..., Any]:
    """The last result off by a little."""

    def breaks(right: Callable[..., Any], *arguments: Any) -> Any:
        found = right(*arguments)
        if found is None:
            return None
        return (*found[:-1], found[-1] * by) if isinstance(found, tuple) else found * by

    return breaks


def _with(position: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """An argument changed on the way in."""

    def breaks(right: Callable[..., Any], *arguments: Any) -> Any:
        given = list(arguments)
        given[position] = change(given[position])
        return right(*given)

    return breaks


MUTANTS = {
    "rms_norm eps": ("rms_norm", "rms_norm", _with(2, lambda e: 1e3 * e)),
    "rms_norm gradient without weight": (
        "rms_norm", "rms_norm_backward", _with(2, torch.ones_like)
    ),
    "rotary the other way": ("rotary", "rotary", _with(3, torch.neg)),
    "rotary not transposed": (
        "rotary", "rotary_backward", lambda right, *a: cuda("rotary").rotary(*a)
    ),
    "rotary equal halves": (
        "rotary", "rotary_backward", _with(3, lambda s: torch.cat([s.chunk(2, 1)[0]] * 2, 1))
    ),
    "swiglu gate and up swapped": (
        "swiglu", "swiglu", _with(0, lambda y: y.roll(y.shape[1] // 2, 1))
    ),
    "swiglu gradient": ("swiglu", "swiglu_backward", _scaled(1.001)),
    "dropout module": ("dropout", "dropout", _with(3, lambda m: m + 1)),
    "dropout key": ("dropout", "dropout", _with(2, lambda k: k ^ 1 << 32)),
    "dropout padding": ("dropout", "dropout", _with(1, lambda c: c.clamp(min=0))),
    "loss weight": ("linear_xent", "softmax_xent", _with(2, lambda w: w * 1.001)),
    "loss target": ("linear_xent", "softmax_xent", _with(1, lambda t: t * 0)),
    "loss without softcap": ("linear_xent", "softmax_xent", _with(4, lambda c: 0.0)),
    "adamw step": ("adamw", "adamw", _with(5, lambda n: n + 1)),
    "adamw resting row": ("adamw", "adamw", _with(6, torch.ones_like)),
    "adamw lr_scale": ("adamw", "adamw", _with(7, lambda s: None)),
    "adamw decay": ("adamw", "adamw", _with(11, lambda d: 0.0)),
    "adamw clipping": ("adamw", "adamw", _with(12, lambda c: c / 2)),
    "reduce start": ("reduce", "weighted_rows", _with(2, lambda s: None)),
    "reduce weight": ("reduce", "weighted_rows", _with(3, lambda w: w * 1.001)),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_kernel_is_noticed(
    mutant: tuple[str, str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name, breaks = mutant
    right, module = getattr(cuda(file), name), cuda(file)
    monkeypatch.setattr(module, name, lambda *arguments: breaks(right, *arguments))
    kernel = spec(file)
    cases = [c for c in kernel.cases if c.name in ("softcap", "chunks")]
    worst = max(max(e) for c in cases for e in errors(kernel, c, torch.float32))
    assert worst > 1


# Dropout, bit for bit


@pytest.mark.parametrize("key", [0, 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2**64 - 1])
@pytest.mark.parametrize(("features", "p"), [(1030, 0.1), (37, 0.9), (4, 0.0), (3, 1 - 2**-32)])
def test_dropout_equals_the_seeds(key: int, features: int, p: float) -> None:
    """Counters at both ends of their ranges; NaN, once dropped, is 0."""
    position = torch.tensor([0, 1, 2**22 - 1, 77, -1])
    sequence = torch.tensor([0, 2**16 - 1, 5, 2**15, 0])
    step = torch.tensor([0, 2**16 - 1, 1, 2**15, 0])
    client = torch.tensor([0, 2**28 - 1, 9, 2**27, 0])
    for module, round in ((0, 0), (2**16 - 1, 2**16 - 1)):
        counters = torch.stack([position, sequence << 16, round << 16 | step, 2 << 28 | client], 1)
        kept = keep_mask(
            key, p, features, client=client, round=round, step=step, sequence=sequence,
            position=position.clamp(min=0), module=module,
        ) & (position >= 0)[:, None]  # fmt: skip
        x = draw(len(position), features).masked_fill(~kept, float("nan"))
        y = OPS.dropout(x, counters, key - (key >> 63 << 64), module, p)
        assert torch.equal(y, torch.where(kept, x / (1 - p), 0))


# What one row holds stays in it


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def same(x: Tensor, y: Tensor, rows: Any = slice(None)) -> bool:
    return torch.equal(bits(x)[rows], bits(y)[rows])


def test_nan_stays_in_its_row() -> None:
    x, w = draw(9, 40, seed=1), draw(40, seed=2)
    sick = x.index_fill(0, torch.tensor(4), float("nan"))
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    counters = torch.zeros(9, 4, dtype=torch.int64)
    targets, weight = torch.arange(9), torch.ones(9)
    turned = (x[:, :10], x[:, 10:20])

    def everything(x: Tensor) -> Iterator[Tensor]:
        y, rstd = OPS.rms_norm(x, w, 1e-6)
        heads = x.view(9, 4, 10)
        z = x.clone()
        yield from (y, rstd, OPS.rms_norm_backward(x, x, w, rstd))
        yield from OPS.rotary(heads, heads[:, :2], *turned)
        yield from OPS.rotary_backward(heads, heads[:, :2], *turned)
        yield from (OPS.swiglu(x), OPS.swiglu_backward(x[:, :20].contiguous(), x))
        yield from (OPS.dropout(x, counters, 1, 0, 0.5), OPS.softmax_xent(z, targets, weight, 1, 0))
        yield z

    for a, b in zip(everything(x), everything(sick), strict=True):
        assert same(a, b, others) and not b[4].isfinite().all()


def test_a_label_of_weight_zero_counts_nothing() -> None:
    z, targets, weight = 5 * draw(3, 5000), torch.tensor([3, -100, 4999]), torch.tensor([1.0, 0, 2])
    z[1] = float("nan")
    nll = OPS.softmax_xent(z, targets, weight, 1.0, 30.0)
    assert nll[1] == 0 and torch.equal(z[1], torch.zeros(5000))
    assert nll.isfinite().all() and z[[0, 2]].abs().amax(1).min() > 0


def test_weighted_rows_skips_and_keeps_the_order() -> None:
    """As the reference, bit for bit; rows lie further apart than they are long."""
    rows, start = draw(6, 4000)[:, :2500], draw(2500, seed=2)
    rows *= torch.logspace(-6, 6, 6)[:, None]
    rows[[1, 4]] = float("nan")
    weights = torch.tensor([0.1, 0, 0.7, -3.0, 0, 1e-9], dtype=torch.float64)
    for first in (None, start):
        total = draw(2500, seed=3).double()
        expected = total.clone()
        weighted_rows_ref(expected, rows, first, weights)
        OPS.weighted_rows(total, rows, first, weights)
        assert torch.equal(total, expected)


# AdamW

SETTINGS = (0.9, 0.999, 1e-8, 0.1, 2.0)


def state(k: int, p: int) -> tuple[Tensor, ...]:
    """row, grad, m, v: rows of wider matrices."""
    whole = [draw(k, p + 32, seed=s) for s in (1, 2, 3, 4)]
    whole[3].square_()
    return tuple(x[:, :p] for x in whole)


def test_adamw_leaves_resting_and_sick_rows_and_minds_no_neighbour() -> None:
    k, p = 8, 4100  # over a block of every launch
    row, grad, m, v = state(k, p)
    active = torch.arange(k) != 2
    lr, step = torch.full((k,), 1e-2), torch.tensor([1, 2, 3, 10, 1, 1, 100, 7])
    scale = draw(p, seed=5).exp()
    grad[0, 4099], grad[3, 0], grad[4] = float("nan"), float("inf"), 1e19  # norm^2 overflows
    row[5, 4098], row[6, 1], grad[2] = FLT_MAX, float("nan"), float("nan")
    before = [x.clone() for x in (row, grad, m, v)]
    norm = OPS.adamw(row, grad, m, v, lr, step, active, scale, *SETTINGS)

    assert norm[0].isnan() and torch.isinf(norm[[3, 4, 5, 6]]).all() and norm[2] == 0
    assert norm[[1, 7]].isfinite().all()
    for now, then in zip((row, m, v), (before[0], before[2], before[3]), strict=True):
        assert same(now, then, [0, 2, 3, 4, 5, 6])
        assert (now != then)[[1, 7]].any(1).all()
    for i in (1, 7):
        alone = [x[i : i + 1].clone() for x in before]
        part = slice(i, i + 1)
        OPS.adamw(*alone, lr[part], step[part], active[part], scale, *SETTINGS)
        assert all(same(a, b[part]) for a, b in zip(alone, (row, grad, m, v), strict=True)
                   if a is not alone[1])  # fmt: skip


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999), (0.9, 0.95), (0.95, 0.90251)])
@pytest.mark.parametrize("kind", [torch.float32, torch.int64], ids=["fp32-step", "int64-step"])
def test_adamw_judges_overflow_as_the_reference(
    betas: tuple[float, float], kind: torch.dtype
) -> None:
    """Rows and rates on both sides of the limit, at steps from 1 to 100,000; which side is the
    same. Each limit is approached to 1 part in 1,000."""
    steps = torch.tensor([1, 2, 10, 1000, 100_000])
    bound = adamw_op.bound(steps, *betas)
    near = torch.tensor([0.5, 0.999, 1.001, 2.0], dtype=torch.float64)
    for scale in (None, torch.tensor([0.5, 3.0])):
        peak = 1.0 if scale is None else 3.0
        flushed = 1 + 2.0**-56 / 1e-8
        # by the row: |x| (1 + r wd); by the rate: r BOUND, |x| counted as 1 at least
        size = near[:, None] * FLT_MAX / 1.001 / (1 + 0.1 * peak * 0.01) * torch.ones(5)
        rate = near[:, None] * (FLT_MAX / 1.001 / (bound * flushed + 0.01) / peak)
        lr = torch.cat([torch.full_like(size, 0.1), rate]).float().view(-1)
        row = torch.cat([size, torch.zeros_like(rate)]).clamp(max=FLT_MAX).float().view(-1, 1)
        row = row.repeat(1, 2)
        n = steps.repeat(8).to(kind)
        given = (row, torch.ones_like(row), torch.zeros_like(row), torch.zeros_like(row))
        rest = (lr, n, torch.ones(40, dtype=torch.bool), scale, *betas, 1e-8, 0.01, 1.0)
        ours, theirs = [x.clone() for x in given], [x.clone() for x in given]
        norm = OPS.adamw(*ours, *rest)
        expected = adamw_op.adamw_ref(*theirs, *rest)
        assert torch.equal(norm, expected)
        sick = expected.isinf()
        assert 10 <= sick.sum() <= 30 and ours[0].isfinite().all()
        assert same(ours[0], row, sick)


def test_adamw_norm_of_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More partial sums than the second launch reads at once: both sizes made small."""
    module = cuda("adamw")
    for name, size in (("_BLOCK", 4), ("_PARTS", 16)):
        monkeypatch.setattr(module, name, size)
    for choice in (module._partials, module._plan):
        choice.cache_clear()
    try:
        row, grad, m, v = state(2, 4 * 35 + 3)
        grad[1] *= 100
        row[1, -1] = FLT_MAX  # the last block's
        exact = torch.linalg.vector_norm(grad[0].double())
        one = torch.ones(2)
        norm = OPS.adamw(row, grad, m, v, one, one, one > 0, None, *SETTINGS)
        assert abs(norm[0].double() / exact - 1) <= 2 * torch.finfo(torch.float32).eps
        assert norm[1].isinf()
    finally:
        for choice in (module._partials, module._plan):
            choice.cache_clear()
