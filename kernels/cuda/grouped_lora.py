"""Grouped LoRA in Triton: one shrink, one expand and one gradient kernel, each for A and for B.

    shrink    small = wide f          h = A x,  u = scale B^T g       a program per 64 rows
    expand    wide += small f^T       y += scale B h,  dx += A^T u    per 64 rows x 64 columns
    outer     arena += small^T wide   dA += u^T x,  dB += scale g^T h per piece x 64 columns

`wide` is x, y, g or dx (model's dtype), `small` is h or u (fp32), f a slot's factor, fp32 and
converted on load. B always comes with the scale and A never, so IS_A says both. Four launches
for a site backward, six where a slot has several pieces, whatever its modules and slots.

No atomics: one program owns an element. A slot of several pieces (a long span, or several spans)
leaves one partial sum each; `sum_pieces` adds those of a span, then spans one after another.
"""

from __future__ import annotations

from functools import cache
from itertools import product as product_of
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.products import padded, product, upcast
from fedsim_kernels.cuda.tiles import ROWS, Tiles, column_parts
from fedsim_kernels.cuda.variant import DTYPES, Variant, dtype_name, pointer

COLUMNS = 64  # of wide that a program holds
SUMS = 1024  # elements of an arena per program of `sum_pieces`


@triton.jit
def factor_block(factor, slot, j, c, slot_stride, stride, mask, IS_A: tl.constexpr):
    """Elements (rank j, feature c) of a slot's factor: A is (n R, I), B is (O, R)."""
    at = j * stride + c if IS_A else c * stride + j
    return tl.load(factor + slot * slot_stride + at, mask=mask, other=0.0)


@triton.jit
def own_rank(at, r):
    """The rank that a table names, 0 meaning all r; never more than there is."""
    rank = tl.load(at)
    return tl.where(rank == 0, r, tl.minimum(rank, r))


@triton.jit
def round_up(rank):
    """To a multiple of 16, so that loads along ranks stay wide; factors are zero in between."""
    return tl.cdiv(rank, 16) * 16


@triton.jit
def part_of(at, EVEN: tl.constexpr):
    """(first column, first row of B, columns) of a part; EVEN promises multiples of 16, without
    which Triton loads bf16 one by one and cannot use asynchronous copies."""
    column, row, width = tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    if EVEN:
        column, width = tl.multiple_of(column, 16), tl.multiple_of(width, 16)
    return column, row, width


@triton.jit
def shrink(
    wide, small, factor, scale, tiles, parts, wide_stride, small_stride, slot_stride,
    factor_stride, r,
    IS_A: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """small[t, j] = sum_c wide[t, c] f[j, c], for rank columns j of all modules at once (A) or of
    one module (B, times the scale); 0 beyond the slot's rank and on padding rows.

    Grid: row tiles x (modules x blocks of BR rank columns).
    """
    ranks = small_stride if IS_A else r
    blocks = tl.cdiv(ranks, BR)
    tile = tiles + 4 * tl.program_id(0)
    part = parts + 4 * (tl.program_id(1) // blocks)
    slot = tl.load(tile).to(tl.int64)
    first, end = tl.load(tile + 1), tl.load(tile + 2)
    rank = tl.where(slot < 0, 0, own_rank(tile + 3, r))
    t = first + tl.arange(0, BT)
    j = (tl.program_id(1) % blocks) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    live = (j < ranks) & (j % r < rank)
    read = (j < ranks) & (j % r < round_up(rank))
    column, row, width = part_of(part, EVEN)
    # A block of ranks that the slot lacks reads nothing.
    stop = tl.where(tl.max(live.to(tl.int32), 0) > 0, width, 0)
    rows = wide + t.to(tl.int64)[:, None] * wide_stride + column + c[None, :]
    acc = tl.zeros((BT, BR), tl.float32)
    for c0 in range(0, stop, BC):
        inside = c0 + c < width
        x = tl.load(rows + c0, mask=(t < end)[:, None] & inside[None, :], other=0.0)
        f = factor_block(
            factor, slot, j[None, :], (row + c0 + c)[:, None], slot_stride, factor_stride,
            read[None, :] & inside[:, None], IS_A,
        )  # fmt: skip
        acc = product(x, f.to(x.dtype), acc, UPCAST)
    acc = tl.where(live[None, :], acc, 0.0)
    if not IS_A:
        acc *= tl.load(scale + slot, mask=slot >= 0, other=0.0)
    out = small + t.to(tl.int64)[:, None] * small_stride + tl.load(part) * r + j[None, :]
    tl.store(out, acc, mask=(t < end)[:, None] & (j < ranks)[None, :])


@triton.jit
def expand(
    wide, small, factor, scale, tiles, parts, wide_stride, small_stride, slot_stride,
    factor_stride, r,
    IS_A: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """wide[t, c] += sum_j small[t, j] f[j, c], over the rank columns of all modules (A) or of the
    module that column c belongs to (B, times the scale); rounded once.

    Grid: row tiles x parts of BC columns.
    """
    tile, part = tiles + 4 * tl.program_id(0), parts + 4 * tl.program_id(1)
    slot = tl.load(tile).to(tl.int64)
    if slot < 0:
        return
    first, end, rank = tl.load(tile + 1), tl.load(tile + 2), own_rank(tile + 3, r)
    t = first + tl.arange(0, BT)
    c = tl.arange(0, BC)
    column, row, width = part_of(part, EVEN)
    inside = c < width
    if IS_A:
        begin, modules = 0, small_stride // r
    else:
        begin, modules = tl.load(part) * r, 1
        by = tl.load(scale + slot)
    acc = tl.zeros((BT, BC), tl.float32)
    for m in range(modules):
        for r0 in range(0, rank, BR):
            k = r0 + tl.arange(0, BR)
            j = m * r + k
            at = small + t.to(tl.int64)[:, None] * small_stride + (begin + j)[None, :]
            s = tl.load(at, mask=(t < end)[:, None] & (k < r)[None, :], other=0.0)
            if not IS_A:
                s *= by
            f = factor_block(
                factor, slot, j[:, None], (row + c)[None, :], slot_stride, factor_stride,
                ((k < r) & (k < round_up(rank)))[:, None] & inside[None, :], IS_A,
            )  # fmt: skip
            kind = wide.dtype.element_ty
            acc = product(s.to(kind), f.to(kind), acc, UPCAST)
    at = wide + t.to(tl.int64)[:, None] * wide_stride + column + c[None, :]
    mask = (t < end)[:, None] & inside[None, :]
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (old + acc).to(wide.dtype.element_ty), mask=mask)


@triton.jit
def outer(
    wide, small, arena, partial, scale, pieces, parts, wide_stride, small_stride, slot_stride,
    partial_stride, factor_stride, r,
    IS_A: tl.constexpr, EVEN: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_t small[t, j] wide[t, c] over the rows of a piece (B: times the scale), added to the
    slot's arena or, where the slot has several pieces, left as a partial sum.

    Grid: pieces x (parts of BC columns x blocks of BR rank columns).
    """
    ranks = small_stride if IS_A else r
    blocks = tl.cdiv(ranks, BR)
    piece = pieces + 5 * tl.program_id(0)
    part = parts + 4 * (tl.program_id(1) // blocks)
    slot = tl.load(piece).to(tl.int64)
    first, end, rank = tl.load(piece + 1), tl.load(piece + 2), own_rank(piece + 3, r)
    index = tl.load(piece + 4).to(tl.int64)
    j = (tl.program_id(1) % blocks) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    live = (j < ranks) & (j % r < rank)
    if tl.max(live.to(tl.int32), 0) == 0:
        return
    column, row, width = part_of(part, EVEN)
    inside = c < width
    by = tl.load(scale + slot)
    from_small = small + (tl.load(part) * r + j)[None, :]
    from_wide = wide + (column + c)[None, :]
    acc = tl.zeros((BR, BC), tl.float32)
    for t0 in range(first, end, BT):
        t = t0 + tl.arange(0, BT)
        at, within = t.to(tl.int64)[:, None], (t < end)[:, None]
        s = tl.load(from_small + at * small_stride, mask=within & (j < ranks)[None, :], other=0.0)
        w = tl.load(from_wide + at * wide_stride, mask=within & inside[None, :], other=0.0)
        if not IS_A:
            # Before the rounding to the operand's dtype, and never fused into the last sum.
            s *= by
        acc = product(tl.trans(s.to(w.dtype)), w, acc, UPCAST)
    c += row
    if IS_A:
        at = j[:, None] * factor_stride + c[None, :]
    else:
        at = c[None, :] * factor_stride + j[:, None]
    mask = live[:, None] & inside[None, :]
    if index < 0:
        into = arena + slot * slot_stride + at
        tl.store(into, tl.load(into, mask=mask, other=0.0) + acc, mask=mask)
    else:
        tl.store(partial + index * partial_stride + at, acc, mask=mask)


@triton.jit
def sum_pieces(
    partial, arena, ends, sums, size, slot_stride, factor_stride, r,
    IS_A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """arena[slot] += the partial sums of each span, one span after another.

    Grid: slots of several pieces x blocks of the factor's elements.
    """
    entry = sums + 4 * tl.program_id(0)
    slot, rank = tl.load(entry).to(tl.int64), own_rank(entry + 3, r)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    j = e // factor_stride if IS_A else e
    mask = (e < size) & (j % r < rank)
    total = tl.load(arena + slot * slot_stride + e, mask=mask, other=0.0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(tl.load(entry + 1).to(tl.int64), tl.load(entry + 2)):
        acc += tl.load(partial + i * size + e, mask=mask, other=0.0)
        last = tl.load(ends + i) > 0
        total = tl.where(last, total + acc, total)
        acc = tl.where(last, 0.0, acc)
    tl.store(arena + slot * slot_stride + e, total, mask=mask)


# What launchers can select


def tile(
    kernel: str, is_a: bool, even: bool, ranks: int, dtype: torch.dtype
) -> tuple[dict[str, int], int, int]:
    """(constants, warps, stages) of `shrink`, `expand` or `outer` for blocks of that many rank
    columns.

    Smaller where registers would spill on sm_80: fp32 products, which have no matrix unit and
    unroll their inner dimension, and odd sizes, which need an address for every element.
    """
    fp32 = dtype == torch.float32
    most = 64 if even and not fp32 else 32
    out = {
        "IS_A": int(is_a), "EVEN": int(even), "UPCAST": upcast(dtype), "BT": ROWS,
        "BR": min(most, padded(ranks)), "BC": COLUMNS,
    }  # fmt: skip
    if kernel == "expand":  # a loop of one to four steps: nothing to overlap
        return (out | {"BR": 16, "BC": 32}, 8, 1) if fp32 else (out, 4, 1)
    if most == 32:
        out["BC" if kernel == "shrink" else "BT"] = 16 if fp32 and kernel == "outer" else 32
    return out, 4, 3


_KERNELS = {"shrink": shrink, "expand": expand, "outer": outer, "sum_pieces": sum_pieces}
_ARGUMENTS = {
    "shrink": "wide small factor scale tiles parts wide_stride small_stride slot_stride "
    "factor_stride r",
    "outer": "wide small arena partial scale pieces parts wide_stride small_stride slot_stride "
    "partial_stride factor_stride r",
    "sum_pieces": "partial arena ends sums size slot_stride factor_stride r",
}
_ARGUMENTS["expand"] = _ARGUMENTS["shrink"]


def _signature(kernel: str, constants: dict[str, int], dtype: torch.dtype) -> dict[str, str]:
    fp32 = ("small", "factor", "scale", "arena", "partial")
    types = {"wide": pointer(dtype)} | dict.fromkeys(fp32, "*fp32")
    types |= dict.fromkeys(("tiles", "parts", "pieces", "ends", "sums"), "*i32")
    if constants.get("EVEN"):
        types |= dict.fromkeys(("wide_stride", "partial_stride"), "i32:16")
        types |= {"factor_stride": "i32:16"} if constants["IS_A"] else {}
    types["slot_stride"] = "i32:16"  # rows of an adapter matrix
    names = _ARGUMENTS[kernel].split()
    return {n: types.get(n, "i32") for n in names} | dict.fromkeys(constants, "constexpr")


@cache
def _variant(kernel: str, is_a: bool, even: bool, ranks: int, dtype: torch.dtype) -> Variant:
    chosen, warps, stages = tile(kernel, is_a, even, ranks, dtype)
    signature = _signature(kernel, chosen, dtype)
    return Variant(_KERNELS[kernel], dtype_name(dtype), chosen, warps, stages, signature, True)


@cache
def _sums(is_a: bool) -> Variant:
    chosen = {"IS_A": int(is_a), "BLOCK": SUMS}
    signature = _signature("sum_pieces", chosen, torch.float32)
    return Variant(sum_pieces, "float32", chosen, 4, 1, signature, False)


def variants() -> list[Variant]:
    """Every form of the four kernels."""
    both = (True, False)
    forms = product_of(("shrink", "expand", "outer"), both, both, (16, 32, 64), DTYPES)
    found = [*(_variant(*form) for form in forms), *(_sums(is_a) for is_a in both)]
    return list({variant.key: variant for variant in found}.values())


# Launches


class Side(NamedTuple):
    """A or B of a site: where it meets the wide tensor, and its rank columns in one block row."""

    is_a: bool
    columns: tuple[int, ...]
    widths: tuple[int, ...]
    r: int
    ranks: int

    def variant(self, kernel: str, wide: Tensor, ranks: int) -> Variant:
        even = not any(n % 16 for n in (*self.columns, *self.widths, wide.stride(0)))
        return _variant(kernel, self.is_a, even, padded(min(64, ranks)), wide.dtype)


def _sides(x: Tensor, a: Tensor, columns: list[int], widths: list[int]) -> tuple[Side, Side]:
    """A spans all of x with the rank columns of all modules, B each module's columns of y."""
    r = a.shape[1] // len(columns)
    return (
        Side(True, (0,), (x.shape[1],), r, a.shape[1]),
        Side(False, tuple(columns), tuple(widths), r, r),
    )


def _rows(
    kernel: str, side: Side, wide: Tensor, small: Tensor, factor: Tensor, scale: Tensor,
    work: Tiles,
) -> None:  # fmt: skip
    """Launch `shrink` or `expand`."""
    shrinks = kernel == "shrink"
    variant = side.variant(kernel, wide, side.ranks if shrinks else side.r)
    block = 0 if shrinks else variant.tile["BC"]
    parts = column_parts(side.columns, side.widths, block, wide.device)
    blocks = triton.cdiv(side.ranks, variant.tile["BR"]) if shrinks else 1
    variant.launch(
        (len(work.rows), len(parts) * blocks), wide, small, factor, scale, work.rows, parts,
        wide.stride(0), small.shape[1], factor.stride(0), factor.stride(1), side.r,
    )  # fmt: skip


def _outer(
    side: Side, wide: Tensor, small: Tensor, arena: Tensor, scale: Tensor, work: Tiles
) -> None:
    if not len(work.pieces):
        return
    size = arena.shape[1] * arena.shape[2]
    partial = arena.new_empty(len(work.ends), size)
    variant = side.variant("outer", wide, side.ranks)
    parts = column_parts(side.columns, side.widths, variant.tile["BC"], wide.device)
    variant.launch(
        (len(work.pieces), len(parts) * triton.cdiv(side.ranks, variant.tile["BR"])),
        wide, small, arena, partial, scale, work.pieces, parts, wide.stride(0), small.shape[1],
        arena.stride(0), size, arena.stride(1), side.r,
    )  # fmt: skip
    if len(work.sums):
        _sums(side.is_a).launch(
            (len(work.sums), triton.cdiv(size, SUMS)), partial, arena, work.ends, work.sums, size,
            arena.stride(0), arena.stride(1), side.r,
        )  # fmt: skip


def grouped_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, tables: list[Tensor],
    columns: list[int], widths: list[int],
) -> Tensor:  # fmt: skip
    """Add each row's low-rank update to y in place; return h (T, n R) fp32.

    Arguments as in fedsim_kernels.grouped_lora; factors and arenas may be views of rows of a
    larger matrix, their last two dimensions contiguous.
    """
    work, (of_a, of_b) = Tiles(*tables[2:]), _sides(x, a, columns, widths)
    h = torch.empty(len(x), a.shape[1], dtype=torch.float32, device=x.device)
    _rows("shrink", of_a, x, h, a, scale, work)
    _rows("expand", of_b, y, h, b, scale, work)
    return h


def grouped_lora_backward(
    g: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, scale: Tensor, grad_a: Tensor,
    grad_b: Tensor, grad_x: Tensor | None, tables: list[Tensor], columns: list[int],
    widths: list[int],
) -> None:  # fmt: skip
    """Add the gradients of every slot to the arenas, and A^T u to `grad_x` when it is given."""
    work, (of_a, of_b) = Tiles(*tables[2:]), _sides(x, a, columns, widths)
    u = torch.empty_like(h)
    _rows("shrink", of_b, g, u, b, scale, work)
    _outer(of_b, g, h, grad_b, scale, work)
    _outer(of_a, x, u, grad_a, scale, work)
    if grad_x is not None:
        _rows("expand", of_a, grad_x, u, a, scale, work)
