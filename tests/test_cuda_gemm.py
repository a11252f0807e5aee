"""Grouped LoRA and packed attention in Triton, in its interpreter on CPU tensors.

Proved here: both keep the one tolerance rule in fp32, fp16 and bf16, over ranks 1 to 256 in one
pass, spans of several pieces, chains of parents, heads of every block; a broken launch does not
keep it; NaN of a slot and of padding stay there; a chunk's bits do not depend on what it is packed
with; chunks add up one after another, as in separate passes. About 80 seconds.
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

from fedsim_kernels import dispatch, grouped_lora, packed_attention
from fedsim_kernels.cuda.tiles import PIECE, Tiles
from fedsim_kernels.segments import Segments
from fedsim_kernels.spec import CASES, Case, KernelSpec, Tensors, draw, errors
from tests.conftest import require

# The interpreter computes in numpy, which warns of the NaN that tests are about.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
OPS = torch.ops.fedsim
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    require("triton", importlib.util.find_spec("triton") is not None, "Triton is not installed")
    with dispatch.use("triton"):
        yield


def cuda(file: str) -> Any:
    return importlib.import_module(f"fedsim_kernels.cuda.{file}")


def named(*names: str) -> list[Case]:
    found = [c for c in CASES if c.name in names]
    assert len(found) == len(names)
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN like NaN."""
    return torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


# The tolerance rule

LORA = [
    *named("one-token", "skewed", "slots-in-any-order", "ranks-over-a-tile", "odd-sizes",
           "three-modules", "tile-edges", "chunks"),
    Case("ranks-1-16-256", (2, 3, 2), (0, 1, 2), ranks=(1, 16, 256), widths=(7, 5),
         features=(9, 12)),
    Case("ranks-17-64-256", (2, 3, 2), (0, 1, 2), ranks=(17, 64, 256), widths=(16, 32),
         features=(16, 48)),
    Case("several-columns", (70, 3), (0, 2), ranks=(5, 9, 20), widths=(80, 16, 16),
         features=(144, 112)),
    Case("pieces", (2 * PIECE + 3, 5), (0, 2), features=(16, 16)),
    Case("pieces-of-odd-sizes", (PIECE - 1, 2, 9), (0, 0, 1), features=(9, 5), ranks=(3, 2, 1)),
]  # fmt: skip
ATTENTION = [
    *named("one-token", "tile-edges", "chunks-with-prefix", "prefix-chain", "window",
           "window-of-one", "softcap-window-chain", "one-key-head"),
    Case("long-window", (90, 71, 5), (0, 0, 1), (-1, 0, -1), heads=(2, 1, 8), window=68),
    Case("small-scores", (9, 4, 12), (0, 0, 1), softcap=30.0, heads=(3, 3, 5)),
    Case("heads-of-80", (11, 5, 6), (0, 0, 1), (-1, 0, -1), heads=(2, 1, 80)),
    Case("heads-of-130", (11, 5, 6), (0, 0, 1), (-1, 0, -1), heads=(1, 1, 130), softcap=2.0),
]  # fmt: skip
# bf16 differs from fp16 in conversions only: a few cases.
BFLOAT16 = ("three-modules", "ranks-17-64-256", "softcap-window-chain", "heads-of-130")
ALL = [
    (kernel, case, dtype)
    for kernel, cases in ((grouped_lora.KERNEL, LORA), (packed_attention.KERNEL, ATTENTION))
    for case in cases
    for dtype in FLOATS
    if dtype != torch.bfloat16 or case.name in BFLOAT16
]


@pytest.mark.parametrize(
    ("kernel", "case", "dtype"), ALL, ids=[f"{k.name}-{c.name}-{str(d)[6:]}" for k, c, d in ALL]
)
def test_within_the_tolerance_rule(kernel: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    assert all(max(e) <= 1 for e in errors(kernel, case, dtype))


def test_scores_far_below_zero() -> None:
    """About -235: a zero beyond the end of a block or tile that is not masked is exp(235)."""

    def inputs(case: Case, dtype: torch.dtype) -> Tensors:
        q, k, v, g = packed_attention.KERNEL.inputs(case, dtype)
        return 7 + 0.1 * q, -7 + 0.1 * k, v, g

    (case,) = named("prefix-chain")
    assert all(max(e) <= 1 for e in errors(
        replace(packed_attention.KERNEL, inputs=inputs), case, torch.float32
    ))  # fmt: skip


def _with(position: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A launch with one argument changed on the way in."""

    def breaks(right: Callable[..., Any], *arguments: Any) -> Any:
        given = list(arguments)
        given[position] = change(given[position])
        return right(*given)

    return breaks


def _table(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor]], Any]:
    def changed(tables: list[Tensor]) -> list[Tensor]:
        work = Tiles(*tables[2:])
        return [*tables[:2], *work._replace(**{name: change(getattr(work, name).clone())})]

    return changed


def _columns(*values: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    """A table whose columns hold these values in every row."""

    def change(table: Tensor) -> Tensor:
        for column, value in values:
            table[:, column] = value
        return table

    return change


def orphans(tables: list[Tensor]) -> list[Tensor]:
    return [tables[0], _columns((2, -1))(tables[1].clone()), *tables[2:]]


MUTANTS: dict[str, tuple[str, str, str, Callable[..., Any]]] = {
    "scale": ("grouped_lora", "grouped_lora", "chunks", _with(4, lambda s: s * 1.001)),
    "scale of gradients": (
        "grouped_lora", "grouped_lora_backward", "chunks", _with(5, lambda s: s * 1.001)
    ),
    "modules in another order": (
        "grouped_lora", "grouped_lora", "three-modules", _with(6, lambda c: [c[0], c[2], c[1]])
    ),
    "rank of another slot": (
        "grouped_lora", "grouped_lora", "ranks-17-64-256",
        _with(5, _table("rows", _columns((3, 16)))),
    ),
    "tiles of another slot": (
        "grouped_lora", "grouped_lora_backward", "skewed",
        _with(9, _table("rows", _columns((0, 0)))),
    ),
    "spans without an end": (
        "grouped_lora", "grouped_lora_backward", "chunks",
        _with(9, _table("ends", torch.zeros_like)),
    ),
    "a piece too few": (
        "grouped_lora", "grouped_lora_backward", "pieces",
        _with(9, _table("sums", lambda s: s - torch.tensor([0, 0, 1, 0]))),
    ),
    "window": ("packed_attention", "packed_attention", "window", _with(5, lambda w: w + 1)),
    "no parents": ("packed_attention", "packed_attention", "prefix-chain", _with(3, orphans)),
    "positions begin again": (
        "packed_attention", "packed_attention", "long-window",
        _with(3, _table("sequences", _columns((3, 0)))),
    ),
    "no soft-cap": (
        "packed_attention", "packed_attention", "small-scores", _with(6, lambda _: 0.0)
    ),
    "norms of other rows": (
        "packed_attention", "packed_attention_backward", "window", _with(5, lambda n: n.roll(1, 0))
    ),
    "delta of another output": (
        "packed_attention", "packed_attention_backward", "window", _with(4, lambda o: o * 1.01)
    ),
    "no descendants": (
        "packed_attention", "packed_attention_backward", "prefix-chain",
        _with(6, _table("descendants", lambda d: torch.full_like(d, 4))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_broken_launch_is_noticed(
    mutant: tuple[str, str, str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, name, case_name, breaks = mutant
    module, kernel = cuda(file), importlib.import_module(f"fedsim_kernels.{file}").KERNEL
    case = next(c for c in (*LORA, *ATTENTION, *CASES) if c.name == case_name)
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: breaks(right, *arguments))
    assert max(max(e) for e in errors(kernel, case, torch.float32)) > 1


def test_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the soft-cap: within 2 ulp, on both sides of where the series ends."""
    import triton
    import triton.language as tl

    # The interpreter looks names up where the kernel is defined, not in its closure.
    monkeypatch.setitem(globals(), "tanh", cuda("attention_scores").tanh)

    @triton.jit
    def kernel(x, y, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(y + at, tanh(tl.load(x + at)))  # noqa: F821

    x = torch.cat([torch.linspace(-0.4, 0.4, 1022), torch.tensor([-90.0, 90.0])])
    y = torch.empty_like(x)
    kernel[(1,)](x, y, BLOCK=1024)
    exact = x.double().tanh()
    assert ((y - exact).abs() <= 2 * torch.finfo(torch.float32).eps * exact.abs()).all()


def test_heads_beyond_the_largest_block() -> None:
    q = draw(3, 1, 257)
    tables = Segments.build((3,), (0,)).tables(CPU)
    with pytest.raises(ValueError, match="heads of 257 features; expected at most 256 on CUDA"):
        OPS.packed_attention(q, q, q, tables, 1.0, 0, 0.0)


# Grouped LoRA: what a slot gets


def run_lora(case: Case, inputs: Tensors) -> Tensors:
    return grouped_lora.KERNEL.run(case, inputs)


STRICT = Case("strict", (70, 9, 66, 8), (0, 0, 1, 2), chunks=(0, 0, 1, 2), starts=(0, 70, 128, 256),
              total=320, ranks=(3, 5, 4), features=(16, 24), widths=(16, 8))  # fmt: skip


def test_a_sick_slot_stays_alone() -> None:
    """Everything that slot 1 and the padding bring is NaN; no bit of slots 0 and 2 changes."""
    inputs = grouped_lora.KERNEL.inputs(STRICT, torch.float32)
    clean = run_lora(STRICT, inputs)
    sick = tuple(x.clone() for x in inputs)
    y, x, a, b, g, scale, grad_a, grad_b, grad_x = sick
    slot = STRICT.slot_of_row()
    for rows in (y, x, g, grad_x):
        rows[(slot == 1) | (slot == -1)] = torch.nan
    for each in (a, b, scale, grad_a, grad_b):
        each[1] = torch.nan
    got = run_lora(STRICT, sick)
    healthy = (slot == 0) | (slot == 2)
    for of_rows in (0, 3):
        assert torch.equal(got[of_rows][healthy], clean[of_rows][healthy])
    for arena in (1, 2):
        assert torch.equal(got[arena][[0, 2]], clean[arena][[0, 2]])
        assert got[arena][1].isnan().all()
    # Padding is left as it was, and the shrink leaves zeros there.
    assert torch.equal(clean[0][slot == -1], inputs[0][slot == -1])
    h = OPS.grouped_lora(y, x, a, b, scale, STRICT.segments.tables(CPU), [0, 16], [16, 8])
    assert (h[slot == -1] == 0).all()


def test_a_slot_does_not_feel_another_ones_data() -> None:
    inputs = grouped_lora.KERNEL.inputs(STRICT, torch.float16)
    clean = run_lora(STRICT, inputs)
    slot = STRICT.slot_of_row()
    other = [x.clone() for x in inputs]
    for i in (0, 1, 4, 8):
        other[i][slot != 0] *= -3
    for i in (2, 3, 5, 6, 7):
        other[i][1:] *= 5
    for i, (mine, was) in enumerate(zip(run_lora(STRICT, tuple(other)), clean, strict=True)):
        kept = slot == 0 if i in (0, 3) else 0
        assert torch.equal(mine[kept], was[kept]) and not torch.equal(mine, was)


def test_ranks_beyond_a_slots_own_stay_untouched() -> None:
    """Arenas keep what they hold there, and h is zero, be the slot sick or not."""
    case = replace(STRICT, ranks=(1, 17, 5))
    inputs = tuple(x.clone() for x in grouped_lora.KERNEL.inputs(case, torch.float32))
    sick = case.slot_of_row() == 2
    for rows in (inputs[1], inputs[4]):
        rows[sick] = torch.inf
    _, *arenas, _ = run_lora(case, inputs)
    for slot, rank in enumerate(case.ranks):
        for new, old, shape in zip(arenas, inputs[6:8], ((2, 17, 16), (24, 17)), strict=True):
            beyond = (slice(None), slice(rank, None))
            assert torch.equal(new[slot].view(shape)[beyond], old[slot].view(shape)[beyond])
    y, x, a, b, _, scale = inputs[:6]
    h = OPS.grouped_lora(y, x, a, b, scale, case.segments.tables(CPU), [0, 16], [16, 8])
    assert (h[sick].view(-1, 2, 17)[:, :, 5:] == 0).all()


def backward(segments: Segments, rows: slice, inputs: Tensors, arenas: list[Tensor]) -> None:
    """Add the gradients of those rows' chunks to the arenas."""
    _, x, a, b, g, scale = inputs
    tables = segments.tables(CPU)
    y = torch.zeros_like(g[rows])
    h = OPS.grouped_lora(y, x[rows], a, b, scale, tables, [0], [g.shape[1]])
    OPS.grouped_lora_backward(
        g[rows], x[rows], h, a, b, scale, *arenas, None, tables, [0], [g.shape[1]]
    )


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=["float32", "float16"])
def test_chunks_in_one_pass_are_chunks_in_passes(dtype: torch.dtype) -> None:
    """A chunk of two pieces, then one of a part of a tile, and another slot between passes."""
    first, second, other = PIECE + 70, 9, 5
    lengths, slots = (first, second, other), (1, 1, 0)
    case = Case("chunks", lengths, slots, chunks=(0, 1, 2), ranks=(2, 3), features=(16, 8))
    inputs = grouped_lora.KERNEL.inputs(case, dtype)[:6]
    start = [draw(2, 3, 16, seed=9), draw(2, 8, 3, seed=10)]
    together, apart = ([t.clone() for t in start] for _ in range(2))
    backward(case.segments, slice(0, case.rows), inputs, together)
    begin = 0
    for n, slot in zip(lengths, slots, strict=True):
        one = Segments.build((n,), (slot,), ranks=case.ranks)
        backward(one, slice(begin, begin + n), inputs, apart)
        begin += n
    assert all(map(torch.equal, together, apart))
    assert not any(map(torch.equal, together, start))
    # A chunk is summed by itself and added once, whatever was there before.
    alone, added = [torch.zeros_like(t) for t in start], [t.clone() for t in start]
    for arenas in (alone, added):
        one = Segments.build((first,), (1,), ranks=case.ranks)
        backward(one, slice(0, first), inputs, arenas)
    assert all(torch.equal(s + a, n) for s, a, n in zip(start, alone, added, strict=True))


def test_a_chunk_has_the_same_bits_in_every_packing() -> None:
    """Alone, and behind another slot's rows at the next tile."""
    n, lead = 150, 70
    one = Case("alone", (n,), (1,), ranks=(4, 3), widths=(16, 16), features=(32, 32))
    inputs = grouped_lora.KERNEL.inputs(one, torch.float16)
    y, x, a, b, g, scale, grad_a, grad_b, grad_x = inputs
    two = replace(one, lengths=(lead, n), slots=(0, 1), starts=(0, 128), chunks=(0, 1))
    front = [draw(128, t.shape[1], dtype=t.dtype, seed=20) for t in (y, x, g, grad_x)]
    moved = [torch.cat(pair) for pair in zip(front, (y, x, g, grad_x), strict=True)]
    packed = run_lora(two, (*moved[:2], a, b, moved[2], scale, grad_a, grad_b, moved[3]))
    alone = run_lora(one, inputs)
    for of_rows in (0, 3):
        assert torch.equal(packed[of_rows][128:], alone[of_rows])
    for arena in (1, 2):
        assert torch.equal(packed[arena][1], alone[arena][1])


def test_factors_may_lie_in_rows_of_a_matrix() -> None:
    """And y in the columns of a wider tensor."""
    case = Case("matrix", (20, 11), (0, 2), widths=(16, 8), features=(16, 24))
    inputs = grouped_lora.KERNEL.inputs(case, torch.float32)
    wanted = run_lora(case, inputs)
    y, x, a, b, g, scale, grad_a, grad_b, grad_x = inputs
    size = a[0].numel()

    def matrix(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.full((3, 400), torch.nan)
        views = whole[:, 16 : 16 + size], whole[:, 200 : 200 + b[0].numel()]
        of_a, of_b = views[0].view(a.shape), views[1].view(b.shape)
        return of_a.copy_(first), of_b.copy_(second)

    factors, arenas = matrix(a, b), matrix(grad_a, grad_b)
    tables, site = case.segments.tables(CPU), ([0, 16], [16, 8])
    wide = torch.full((case.rows, 40), torch.nan)
    out = wide[:, :24].copy_(y)
    h = OPS.grouped_lora(out, x, *factors, scale, tables, *site)
    OPS.grouped_lora_backward(g, x, h, *factors, scale, *arenas, grad_x, tables, *site)
    for got, want in zip((out, *arenas, grad_x), wanted, strict=True):
        assert torch.equal(got, want)
    assert wide[:, 24:].isnan().all()


# Packed attention: what a sequence gets

PACKED = Case("packed", (70, 9, 20, 8), (0, 0, 1, 2), (-1, 0, -1, -1), chunks=(0, 0, 1, 2),
              starts=(0, 70, 128, 192), total=256, heads=(2, 1, 8))  # fmt: skip


def run_attention(case: Case, inputs: Tensors) -> Tensors:
    return packed_attention.KERNEL.run(case, inputs)


def test_attention_of_a_sick_sequence_stays_there() -> None:
    """NaN in slot 1 and in the padding: nobody else's bits change, and padding gets zeros."""
    inputs = packed_attention.KERNEL.inputs(PACKED, torch.float32)
    clean = run_attention(PACKED, inputs)
    slot = PACKED.slot_of_row()
    sick = tuple(x.clone() for x in inputs)
    for x in sick:
        x[(slot == 1) | (slot == -1)] = torch.nan
    for got, was in zip(run_attention(PACKED, sick), clean, strict=True):
        healthy = (slot == 0) | (slot == 2)
        assert torch.equal(got[healthy], was[healthy])
        assert got[slot == 1].isnan().any() and (got[slot == -1] == 0).all()
    _, lse = OPS.packed_attention(*sick[:3], PACKED.segments.tables(CPU), 0.6, 0, 0.0)
    assert (lse[slot == -1] == 0).all()


def test_a_sequence_has_the_same_bits_in_every_packing() -> None:
    """A prefix and what follows it: alone, and behind and before other rows."""
    alone = Case("alone", (70, 9), (0, 0), (-1, 0), heads=(2, 1, 8), window=40)
    packed = replace(alone, lengths=(3, 70, 9, 5), slots=(2, 0, 0, 1), parents=(-1, -1, 1, -1),
                     total=90)  # fmt: skip
    inputs = packed_attention.KERNEL.inputs(packed, torch.float16)
    mine = run_attention(alone, tuple(x[3:82] for x in inputs))
    for got, want in zip(run_attention(packed, inputs), mine, strict=True):
        assert same(got[3:82], want)
