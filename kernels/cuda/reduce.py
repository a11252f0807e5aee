"""Weighted sum of rows in fp64, one pass over memory; see fedsim_kernels.reduce."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedsim_kernels.cuda.variant import Variant, pointer

_BLOCK = 1024  # columns of a program: 8 a thread


@triton.jit(do_not_specialize=["count"])
def weighted_rows_kernel(
    total_ptr, rows_ptr, start_ptr, weights_ptr, count, P, stride, FROM_START: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = cols < P
    total = tl.load(total_ptr + cols, mask=there, other=0.0)
    if FROM_START:
        start = tl.load(start_ptr + cols, mask=there, other=0.0).to(tl.float64)
    rows = rows_ptr + cols  # moved row by row: k x stride could pass 2^31
    # Four rows in flight: a row's load does not wait for the sum of the row before it.
    for k in tl.range(0, count, loop_unroll_factor=4):
        weight = tl.load(weights_ptr + k)
        # A row of weight 0 may hold NaN: it is neither read nor added. As a block, because Triton's
        # interpreter makes a number of a scalar condition that meets a mask.
        counts = there & (tl.full([BLOCK], 0, tl.float64) + weight != 0)
        row = tl.load(rows, mask=counts, other=0.0).to(tl.float64)
        if FROM_START:
            row -= start
        total = tl.where(counts, total + weight * row, total)
        rows += stride
    tl.store(total_ptr + cols, total, mask=there)


@cache
def _variant(from_start: bool) -> Variant:
    wide, narrow = pointer(torch.float64), pointer(torch.float32)
    signature = {
        "total_ptr": wide, "rows_ptr": narrow, "start_ptr": narrow, "weights_ptr": wide,
        "count": "i32", "P": "i32:16", "stride": "i32:16", "FROM_START": "constexpr",
        "BLOCK": "constexpr",
    }  # fmt: skip
    tile = {"FROM_START": int(from_start), "BLOCK": _BLOCK}
    return Variant(weighted_rows_kernel, "float32", tile, 4, 1, signature, uses_dot=False)


def variants() -> list[Variant]:
    """With a start row and without."""
    return [_variant(False), _variant(True)]


def weighted_rows(total: Tensor, rows: Tensor, start: Tensor | None, weights: Tensor) -> None:
    """total (P,) fp64 += sum_k weights[k] (rows[k] - start), k ascending; rows (k, P) fp32."""
    p = len(total)
    _variant(start is not None).launch(
        (triton.cdiv(p, _BLOCK),), total, rows, rows if start is None else start, weights,
        len(rows), p, rows.stride(0),
    )  # fmt: skip
