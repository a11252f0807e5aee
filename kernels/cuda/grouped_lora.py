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
    if IS_A:
        at = j * stride + c
    else:
        at = c * stride + j
    return tl.load(factor + slot * slot_stride + at, mask=mask, other=0.0)


@triton.jit
def own_rank(at, r):
    """The rank that a table names, 0 meaning all r; never more than there is."""
    rank = tl.load(at)
    return tl.where(rank == 0, r, tl.minimum(rank, r))


@triton.jit
def shrink(
    wide, small, factor, scale, tiles, parts, wide_stride, small_stride, slot_stride,
    factor_stride, r,
    IS_A: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """small[t, j] = sum_c wide[t, c] f[j, c], for rank columns j of all modules at once (A) or of
    one module (B, times the scale); 0 beyond the slot's rank and on padding rows.

    Grid: row tiles x (modules x blocks of BR rank columns).
    """
    if IS_A:
        ranks = small_stride
    else:
        ranks = r
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
    # A block of ranks that the slot lacks reads nothing.
    width = tl.where(tl.max(live.to(tl.int32), 0) > 0, tl.load(part + 3), 0)
    rows = wide + t.to(tl.int64)[:, None] * wide_stride + tl.load(part + 1) + c[None, :]
    row = tl.load(part + 2)
    acc = tl.zeros((BT, BR), tl.float32)
    for c0 in range(0, width, BC):
        inside = c0 + c < width
        x = tl.load(rows + c0, mask=(t < end)[:, None] & inside[None, :], other=0.0)
        f = factor_block(
            factor, slot, j[None, :], (row + c0 + c)[:, None], slot_stride, factor_stride,
            live[None, :] & inside[:, None], IS_A,
        )  # fmt: skip
        acc = product(x, f.to(x.dtype), acc, UPCAST)
    if not IS_A:
        acc *= tl.load(scale + slot, mask=slot >= 0, other=0.0)
    out = small + t.to(tl.int64)[:, None] * small_stride + tl.load(part) * r + j[None, :]
    tl.store(out, acc, mask=(t < end)[:, None] & (j < ranks)[None, :])


@triton.jit
def expand(
    wide, small, factor, scale, tiles, parts, wide_stride, small_stride, slot_stride,
    factor_stride, r,
    IS_A: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
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
    inside = c < tl.load(part + 3)
    row = tl.load(part + 2)
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
            s = tl.load(at, mask=(t < end)[:, None] & (k < rank)[None, :], other=0.0)
            if not IS_A:
                s *= by
            f = factor_block(
                factor, slot, j[:, None], (row + c)[None, :], slot_stride, factor_stride,
                (k < rank)[:, None] & inside[None, :], IS_A,
            )  # fmt: skip
            kind = wide.dtype.element_ty
            acc = product(s.to(kind), f.to(kind), acc, UPCAST)
    at = wide + t.to(tl.int64)[:, None] * wide_stride + tl.load(part + 1) + c[None, :]
    mask = (t < end)[:, None] & inside[None, :]
    old = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, (old + acc).to(wide.dtype.element_ty), mask=mask)


@triton.jit
def outer(
    wide, small, arena, partial, scale, pieces, parts, wide_stride, small_stride, slot_stride,
    partial_stride, factor_stride, r,
    IS_A: tl.constexpr, UPCAST: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """sum_t small[t, j] wide[t, c] over the rows of a piece (B: times the scale), added to the
    slot's arena or, where the slot has several pieces, left as a partial sum.

    Grid: pieces x (parts of BC columns x blocks of BR rank columns).
    """
    if IS_A:
        ranks = small_stride
    else:
        ranks = r
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
    inside = c < tl.load(part + 3)
    by = tl.load(scale + slot)
    from_small = small + (tl.load(part) * r + j)[None, :]
    from_wide = wide + (tl.load(part + 1) + c)[None, :]
    acc = tl.zeros((BR, BC), tl.float32)
    for t0 in range(first, end, BT):
        t = t0 + tl.arange(0, BT)
        row = t.to(tl.int64)[:, None]
        within = (t < end)[:, None]
        s = tl.load(from_small + row * small_stride, mask=within & live[None, :], other=0.0)
        w = tl.load(from_wide + row * wide_stride, mask=within & inside[None, :], other=0.0)
        if not IS_A:
            # Before the rounding to the operand's dtype, and never fused into the last sum.
            s *= by
        acc = product(tl.trans(s.to(w.dtype)), w, acc, UPCAST)
    c += tl.load(part + 2)
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
    if IS_A:
        j = e // factor_stride
    else:
        j = e
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


def tile(kernel: str, is_a: bool, ranks: int, dtype: torch.dtype) -> dict[str, int]:
    """Constants of `shrink`, `expand` or `outer` for that many rank columns: of all modules
    where A is concerned, except in `expand`; else of one module."""
    most = 64 if kernel == "expand" else 128
    return {
        "IS_A": int(is_a), "UPCAST": upcast(dtype), "BT": ROWS, "BR": min(most, padded(ranks)),
        "BC": COLUMNS,
    }  # fmt: skip


_KERNELS = {"shrink": shrink, "expand": expand, "outer": outer}
_ARGUMENTS = {
    "shrink": "wide small factor scale tiles parts wide_stride small_stride slot_stride "
    "factor_stride r",
    "outer": "wide small arena partial scale pieces parts wide_stride small_stride slot_stride "
    "partial_stride factor_stride r",
}
_ARGUMENTS["expand"] = _ARGUMENTS["shrink"]
_TABLES = ("tiles", "parts", "pieces", "ends", "sums")


def _type(name: str, dtype: torch.dtype) -> str:
    if name in _TABLES:
        return "*i32"
    if name in ("wide_stride", "slot_stride", "partial_stride"):
        return "i32:16"
    if name in ("small_stride", "factor_stride", "size", "r"):
        return "i32"
    return pointer(dtype if name == "wide" else torch.float32)


@cache
def _variant(kernel: str, is_a: bool, ranks: int, dtype: torch.dtype) -> Variant:
    chosen = tile(kernel, is_a, ranks, dtype)
    signature = {name: _type(name, dtype) for name in _ARGUMENTS[kernel].split()}
    signature |= dict.fromkeys(chosen, "constexpr")
    stages = 3 if chosen["BR"] <= 64 else 2
    return Variant(_KERNELS[kernel], dtype_name(dtype), chosen, 4, stages, signature, True)


@cache
def _sums(is_a: bool) -> Variant:
    chosen = {"IS_A": int(is_a), "BLOCK": SUMS}
    names = "partial arena ends sums size slot_stride factor_stride r".split()
    signature = {name: _type(name, torch.float32) for name in names}
    signature |= dict.fromkeys(chosen, "constexpr")
    return Variant(sum_pieces, "float32", chosen, 4, 1, signature, False)


def variants() -> list[Variant]:
    """Every form of the four kernels."""
    return [
        *(
            _variant(kernel, is_a, ranks, dtype)
            for kernel, most in (("shrink", 128), ("expand", 64), ("outer", 128))
            for is_a in (True, False)
            for ranks in (16, 32, 64, 128)
            for dtype in DTYPES
            if ranks <= most
        ),
        *(_sums(is_a) for is_a in (True, False)),
    ]


# Launches


def _grid(variant: Variant, work: Tensor, parts: Tensor, ranks: int) -> tuple[int, int]:
    return len(work), len(parts) * triton.cdiv(ranks, variant.tile["BR"])


def _shrink(
    wide: Tensor, small: Tensor, factor: Tensor, scale: Tensor, work: Tiles, r: int, is_a: bool,
    columns: tuple[int, ...], widths: tuple[int, ...],
) -> None:  # fmt: skip
    ranks = small.shape[1] if is_a else r
    variant = _variant("shrink", is_a, ranks, wide.dtype)
    parts = column_parts(columns, widths, 0, wide.device)
    variant.launch(
        _grid(variant, work.rows, parts, ranks), wide, small, factor, scale, work.rows, parts,
        wide.stride(0), small.shape[1], factor.stride(0), factor.stride(1), r,
    )  # fmt: skip


def _expand(
    wide: Tensor, small: Tensor, factor: Tensor, scale: Tensor, work: Tiles, r: int, is_a: bool,
    columns: tuple[int, ...], widths: tuple[int, ...],
) -> None:  # fmt: skip
    variant = _variant("expand", is_a, r, wide.dtype)
    parts = column_parts(columns, widths, COLUMNS, wide.device)
    variant.launch(
        (len(work.rows), len(parts)), wide, small, factor, scale, work.rows, parts,
        wide.stride(0), small.shape[1], factor.stride(0), factor.stride(1), r,
    )  # fmt: skip


def _outer(
    wide: Tensor, small: Tensor, arena: Tensor, scale: Tensor, work: Tiles, r: int, is_a: bool,
    columns: tuple[int, ...], widths: tuple[int, ...],
) -> None:  # fmt: skip
    if not len(work.pieces):
        return
    ranks = small.shape[1] if is_a else r
    size = arena.shape[1] * arena.shape[2]
    variant = _variant("outer", is_a, ranks, wide.dtype)
    parts = column_parts(columns, widths, COLUMNS, wide.device)
    partial = arena.new_empty(len(work.ends), size)
    variant.launch(
        _grid(variant, work.pieces, parts, ranks), wide, small, arena, partial, scale,
        work.pieces, parts, wide.stride(0), small.shape[1], arena.stride(0), size,
        arena.stride(1), r,
    )  # fmt: skip
    if len(work.sums):
        _sums(is_a).launch(
            (len(work.sums), triton.cdiv(size, SUMS)), partial, arena, work.ends, work.sums, size,
            arena.stride(0), arena.stride(1), r,
        )  # fmt: skip


def grouped_lora(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, tables: list[Tensor],
    columns: list[int], widths: list[int],
) -> Tensor:  # fmt: skip
    """Add each row's low-rank update to y in place; return h (T, n R) fp32.

    Arguments as in fedsim_kernels.grouped_lora; factors and arenas may be views of rows of a
    larger matrix, their last two dimensions contiguous.
    """
    work, r = Tiles(*tables[2:]), a.shape[1] // len(columns)
    h = torch.empty(len(x), a.shape[1], dtype=torch.float32, device=x.device)
    _shrink(x, h, a, scale, work, r, True, (0,), (x.shape[1],))
    _expand(y, h, b, scale, work, r, False, tuple(columns), tuple(widths))
    return h


def grouped_lora_backward(
    g: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, scale: Tensor, grad_a: Tensor,
    grad_b: Tensor, grad_x: Tensor | None, tables: list[Tensor], columns: list[int],
    widths: list[int],
) -> None:  # fmt: skip
    """Add the gradients of every slot to the arenas, and A^T u to `grad_x` when it is given."""
    work, r = Tiles(*tables[2:]), a.shape[1] // len(columns)
    site, inputs = (tuple(columns), tuple(widths)), ((0,), (x.shape[1],))
    u = torch.empty_like(h)
    _shrink(g, u, b, scale, work, r, False, *site)
    _outer(g, h, grad_b, scale, work, r, False, *site)
    _outer(x, u, grad_a, scale, work, r, True, *inputs)
    if grad_x is not None:
        _expand(grad_x, u, a, scale, work, r, True, *inputs)
