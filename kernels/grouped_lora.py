"""Grouped LoRA: the linears of one input, each packed row updated by its own slot's adapters.

A site is n modules that read the same input, e.g. q, k and v. Their A lie below each other and
are applied in one shrink. With s(t) the slot of row t, W the frozen weights of the site below
each other, and B_m, columns(m) module m's factor and its columns of y:

    h[t] = A[s] x[t]      y[t] = W x[t] + bias + scale[s] B_m[s] h_m[t]   on columns(m)

Backward, for g = dL/dy, summed over the rows of each chunk, chunk by chunk in order:

    u_m[t] = scale[s] B_m[s]^T g_m[t]      dx[t] = W^T g[t] + A[s]^T u[t]
    dA[s] += sum_t u[t] x[t]^T             dB_m[s] += scale[s] sum_t g_m[t] h_m[t]^T

The gradients of A and B are added to arenas during the backward; no factor requires grad, so a
scalar `anchor` that does carries the graph.

Papers: Hu et al., LoRA, arXiv:2106.09685; Chen et al., Punica, arXiv:2310.18547 (segments).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import LIBRARY, define, differentiate
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw

# Reference: for tensors on any device, span by span.


def grouped_lora_ref(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, tables: list[Tensor],
    columns: list[int], widths: list[int],
) -> Tensor:  # fmt: skip
    """Add each row's low-rank update to y in place; return h for the backward.

    Args:
        y: (T, C) of any floating dtype, rows C' >= C apart.
        x: (T, I) same dtype.
        a: (K, n R, I), b: (K, O_1 + ... + O_n, R), both fp32, rows contiguous; zero beyond a
            slot's rank.
        scale: (K,) fp32, alpha / rank.
        tables: of `Segments.tables`.
        columns, widths: first column of y and number of columns O_m of each module.

    Returns:
        h (T, n R) fp32; zero where a row belongs to no slot.
    """
    r = a.shape[1] // len(columns)
    h = a.new_zeros(len(x), a.shape[1])
    for slot, start, end, _ in tables[0].tolist():
        rows = slice(start, end)
        torch.mm(x[rows].to(a.dtype), a[slot].T, out=h[rows])
        first = 0
        for m, (column, width) in enumerate(zip(columns, widths, strict=True)):
            factor = b[slot, first : first + width]
            update = torch.mm(h[rows, m * r : (m + 1) * r], factor.T) * scale[slot]
            part = y[rows, column : column + width]
            part.copy_(part.to(a.dtype) + update)
            first += width
    return h


def grouped_lora_backward_ref(
    g: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, scale: Tensor, grad_a: Tensor,
    grad_b: Tensor, grad_x: Tensor | None, tables: list[Tensor], columns: list[int],
    widths: list[int],
) -> None:  # fmt: skip
    """Add the gradients of every slot to the arenas, and A^T u to `grad_x` when it is given.

    Args:
        g: (T, C) dL/dy. x, h, a, b, scale, tables, columns, widths: as in the forward.
        grad_a: (K, n R, I), grad_b: (K, O_1 + ... + O_n, R), both fp32, changed in place.
        grad_x: (T, I) or None, changed in place.
    """
    r = a.shape[1] // len(columns)
    for slot, start, end, _ in tables[0].tolist():
        rows = slice(start, end)
        u = torch.empty_like(h[rows])
        first = 0
        for m, (column, width) in enumerate(zip(columns, widths, strict=True)):
            gs = g[rows, column : column + width].to(a.dtype) * scale[slot]
            mine = slice(m * r, (m + 1) * r)
            torch.mm(gs, b[slot, first : first + width], out=u[:, mine])
            grad_b[slot, first : first + width].addmm_(gs.T, h[rows, mine])
            first += width
        grad_a[slot].addmm_(u.T, x[rows].to(a.dtype))
        if grad_x is not None:
            grad_x[rows] = (grad_x[rows].to(a.dtype) + torch.mm(u, a[slot])).to(grad_x.dtype)


# C++


def _suffix(x: Tensor) -> str:
    return "bf16" if x.dtype == torch.bfloat16 else "f32"


def _site(a: Tensor, b: Tensor, columns: list[int], widths: list[int]) -> tuple[Any, ...]:
    """The arguments that describe a site; the tensors among them must outlive the call."""
    if a.stride()[1:] != (a.shape[2], 1) or b.stride()[1:] != (b.shape[2], 1):
        raise ValueError("grouped LoRA: expected factors whose slots are contiguous.")
    if a.dtype != torch.float32 or b.dtype != torch.float32:
        raise ValueError(f"grouped LoRA: got {a.dtype} and {b.dtype} factors; expected float32.")
    return (
        a.shape[2], len(columns), b.shape[2], torch.tensor(columns), torch.tensor(widths),
        a.stride(0), b.stride(0),
    )  # fmt: skip


def _native(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, tables: list[Tensor],
            columns: list[int], widths: list[int]) -> Tensor:  # fmt: skip
    # Rows of no slot, and ranks beyond a slot's own, are zero.
    h = a.new_zeros(len(x), a.shape[1])
    x = x.contiguous()
    site = _site(a, b, columns, widths)
    native.call(
        f"grouped_lora_{_suffix(x)}", y, y.stride(0), x, a, b, scale, h, tables[0],
        len(tables[0]), *site,
    )  # fmt: skip
    return h


def _native_backward(
    g: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, scale: Tensor, grad_a: Tensor,
    grad_b: Tensor, grad_x: Tensor | None, tables: list[Tensor], columns: list[int],
    widths: list[int],
) -> None:  # fmt: skip
    g, x = g.contiguous(), x.contiguous()
    if grad_a.stride() != a.stride() or grad_b.stride() != b.stride():
        raise ValueError("grouped LoRA: expected gradient arenas laid out as the factors.")
    site = _site(a, b, columns, widths)
    native.call(
        f"grouped_lora_backward_{_suffix(x)}", g, g.stride(0), x, h, a, b, scale, grad_a, grad_b,
        grad_x, tables[0], len(tables[0]), len(x), *site,
    )  # fmt: skip


define(
    "grouped_lora(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor scale, Tensor[] tables, "
    "int[] columns, int[] widths) -> Tensor",
    "grouped_lora",
    reference=grouped_lora_ref,
    native=_native,
    fake=lambda y, x, a, *_: a.new_empty(len(x), a.shape[1]),
)
define(
    "grouped_lora_backward(Tensor g, Tensor x, Tensor h, Tensor a, Tensor b, Tensor scale, "
    "Tensor(a!) grad_a, Tensor(b!) grad_b, Tensor(c!)? grad_x, Tensor[] tables, int[] columns, "
    "int[] widths) -> ()",
    "grouped_lora",
    reference=grouped_lora_backward_ref,
    native=_native_backward,
    fake=lambda *_: None,
)


# The linear: frozen product (none without a weight) and adapters as one differentiable operation


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: int) -> Tensor:
    """x W^T + bias; with a tile > 0, as products of exactly `tile` rows.

    A library picks its kernel by the number of rows, so only products of one size give a row the
    same bits in every packing. T must be a multiple of the tile.
    """
    if not tile:
        return F.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for part, out in zip(x.split(tile), y.split(tile), strict=True):
        torch.mm(part, weight.T, out=out)
    return y if bias is None else y.add_(bias)


def whole(weight: Tensor) -> Tensor:
    """A weight as it was in the forward; one whose memory others have used since is made anew."""
    renew = getattr(weight, "renew", None)
    return weight if renew is None else renew()


def _linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, anchor: Tensor, a: Tensor, b: Tensor,
    grad_a: Tensor, grad_b: Tensor, scale: Tensor, tables: list[Tensor], columns: list[int],
    widths: list[int], tile: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = x.new_zeros(len(x), sum(widths)) if weight is None else tiled_linear(x, weight, bias, tile)
    h = torch.ops.fedsim.grouped_lora(y, x, a, b, scale, tables, columns, widths)
    return y, h


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, _, a, b, grad_a, grad_b, scale, tables, columns, widths, tile = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1])
    # Arenas change between the backwards of two modules, so they are no saved tensors.
    ctx.frozen = (weight, a, b, grad_a, grad_b, scale, tables, columns, widths, tile)


def _backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
    x, h = ctx.saved_tensors
    weight, a, b, grad_a, grad_b, scale, tables, columns, widths, tile = ctx.frozen
    g = g.contiguous()
    gx = None
    # Without an input that needs a gradient, this is the first adapter: nothing below it learns.
    if ctx.needs_input_grad[0]:
        gx = torch.zeros_like(x) if weight is None else tiled_linear(g, whole(weight).T, None, tile)
    torch.ops.fedsim.grouped_lora_backward(
        g, x, h, a, b, scale, grad_a, grad_b, gx, tables, columns, widths
    )
    return gx, *(None,) * 8, [None] * len(tables), None, None, None


LIBRARY.define(
    "lora_linear(Tensor x, Tensor? weight, Tensor? bias, Tensor anchor, Tensor a, Tensor b, "
    "Tensor grad_a, Tensor grad_b, Tensor scale, Tensor[] tables, int[] columns, int[] widths, "
    "int tile) -> (Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("lora_linear", _linear, _key)
torch.library.register_fake(
    "fedsim::lora_linear",
    lambda x, weight, bias, anchor, a, *rest: (
        x.new_empty(len(x), sum(rest[6]) if weight is None else len(weight)),
        a.new_empty(len(x), a.shape[1]),
    ),
    lib=LIBRARY,
)  # fmt: skip
differentiate("lora_linear", _backward, _setup)


# Inputs and definition

_SCALE = (0.7, 1.9, 0.3)


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """y, x, a, b, g, scale and the arenas that gradients are added to."""
    (i, o), t, k, r = case.features, case.rows, len(case.ranks), max(case.ranks)
    n = len(case.widths) or 1
    a, b = draw(k, n * r, i, seed=3) * i**-0.5, draw(k, o, r, seed=4)
    for slot, rank in enumerate(case.ranks):
        a.view(k, n, r, i)[slot, :, rank:], b[slot, :, rank:] = 0, 0
    return (
        draw(t, o, dtype=dtype, seed=1), draw(t, i, dtype=dtype, seed=2), a, b,
        draw(t, o, dtype=dtype, seed=5), torch.tensor(_SCALE[:k]), draw(k, n * r, i, seed=6),
        draw(k, o, r, seed=7), draw(t, i, dtype=dtype, seed=8),
    )  # fmt: skip


def _columns(case: Case) -> tuple[list[int], list[int]]:
    widths = list(case.widths or (case.features[1],))
    return [sum(widths[:m]) for m in range(len(widths))], widths


def _run(case: Case, inputs: Tensors) -> Tensors:
    """y and the three gradients, each added to what was there."""
    y, x, a, b, g, scale, *arenas = inputs
    y, arenas = y.clone(), [t.clone() for t in arenas]
    tables = case.segments.tables(y.device)
    h = torch.ops.fedsim.grouped_lora(y, x, a, b, scale, tables, *_columns(case))
    torch.ops.fedsim.grouped_lora_backward(g, x, h, a, b, scale, *arenas, tables, *_columns(case))
    return y, *arenas


def _formula(case: Case, inputs: Tensors) -> Tensors:
    y, x, a, b, g, scale, *arenas = inputs
    slot = case.slot_of_row()
    real, slot = (slot >= 0)[:, None], slot.clamp(min=0)
    leaves = [t.clone().requires_grad_() for t in (a, b, x)]
    r = max(case.ranks)
    h = torch.einsum("tri,ti->tr", leaves[0][slot], leaves[2])
    of = torch.arange(len(_columns(case)[1])).repeat_interleave(torch.tensor(_columns(case)[1]))
    update = torch.einsum("tor,tor->to", leaves[1][slot], h.view(len(h), -1, r)[:, of])
    out = y + torch.where(real, scale[slot, None].to(y.dtype) * update.to(y.dtype), 0)
    grads = torch.autograd.grad(out, leaves, g)
    return out.detach(), *(old + new for old, new in zip(arenas, grads, strict=True))


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Six products of T R (I + O); x and g are read and y and dx updated at least once."""
    (i, o), t, r = case.features, case.rows, max(case.ranks)
    size, n = dtype.itemsize, len(case.widths) or 1
    factors = 4 * len(case.ranks) * r * (n * i + o)
    return 6.0 * t * r * (n * i + o), float(3 * t * (i + o) * size + 3 * factors)


KERNEL = KernelSpec(
    "grouped_lora", ("grouped_lora", "grouped_lora_backward"), _inputs, _run, _formula, _work
)
