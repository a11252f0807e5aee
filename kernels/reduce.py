"""Weighted sum of rows in fp64, in one pass over memory.

    total += sum_k weights[k] (rows[k] - start)

k ascending, so that the result depends on the order of the rows alone. A row of weight 0 is
skipped: it may hold NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim_kernels import native
from fedsim_kernels.dispatch import define
from fedsim_kernels.spec import Case, KernelSpec, Tensors, draw


def _check(total: Tensor, rows: Tensor, start: Tensor | None, weights: Tensor) -> None:
    if total.dtype != torch.float64 or total.ndim != 1 or not total.is_contiguous():
        raise ValueError(
            f"weighted_rows: got total {tuple(total.shape)} {total.dtype}; expected contiguous "
            "(P,) fp64."
        )
    fits = rows.ndim == 2 and rows.shape[1:] == total.shape and rows.dtype == torch.float32
    if not fits or (rows.stride(1) != 1 and rows.numel()):
        raise ValueError(
            f"weighted_rows: got rows {tuple(rows.shape)} {rows.dtype} with strides "
            f"{rows.stride()}; expected (k, {len(total)}) fp32, rows contiguous."
        )
    if start is not None and not (
        start.shape == total.shape and start.dtype == torch.float32 and start.is_contiguous()
    ):
        raise ValueError(
            f"weighted_rows: got start {tuple(start.shape)} {start.dtype}; expected contiguous "
            f"({len(total)},) fp32."
        )
    if not (
        weights.shape == rows.shape[:1]
        and weights.dtype == torch.float64
        and weights.is_contiguous()
    ):
        raise ValueError(
            f"weighted_rows: got weights {tuple(weights.shape)} {weights.dtype}; expected "
            f"contiguous ({len(rows)},) fp64."
        )


def weighted_rows_ref(total: Tensor, rows: Tensor, start: Tensor | None, weights: Tensor) -> None:
    """Add the weighted rows to `total` in place.

    Args:
        total: (P,) fp64. rows: (k, P) fp32, P or more apart. start: (P,) fp32 or None for 0.
        weights: (k,) fp64, on the device of the rows.

    Raises:
        ValueError: other shapes, dtypes or strides.
    """
    _check(total, rows, start, weights)
    for row, weight in zip(rows, weights, strict=True):
        difference = row.double() if start is None else row.double() - start
        total.add_(torch.where(weight != 0, weight * difference, 0))


def _native(total: Tensor, rows: Tensor, start: Tensor | None, weights: Tensor) -> None:
    _check(total, rows, start, weights)
    native.call("weighted_rows", total, rows, start, weights, *rows.shape, rows.stride(0))


define(
    "weighted_rows(Tensor(a!) total, Tensor rows, Tensor? start, Tensor weights) -> ()",
    "reduce",
    reference=weighted_rows_ref,
    native=_native,
    fake=lambda *_: None,
    dtypes=(torch.float64,),
)


# Inputs and definition: a row for each slot; the second counts nothing


def _inputs(case: Case, dtype: torch.dtype) -> Tensors:
    """total, rows, start, weights: fp64 and fp32 whatever the dtype, as aggregation is."""
    k, p = len(case.ranks), case.features[0] * case.features[1] * max(case.ranks)
    weights = torch.tensor([0.3, 0.0, 0.45], dtype=torch.float64)[:k]
    return draw(p, seed=1).double(), draw(k, p, seed=2), draw(p, seed=3), weights


def _run(case: Case, inputs: Tensors) -> Tensors:
    total = inputs[0].clone()
    torch.ops.fedsim.weighted_rows(total, *inputs[1:])
    return (total,)


def _formula(case: Case, inputs: Tensors) -> Tensors:
    total, rows, start, weights = inputs
    return (total + weights @ (rows - start),)


def _work(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Rows of a weight and start are read, total is read and written."""
    k, p = len(case.ranks), case.features[0] * case.features[1] * max(case.ranks)
    return 3.0 * k * p, 4.0 * p * (k + 5)


KERNEL = KernelSpec("reduce", ("weighted_rows",), _inputs, _run, _formula, _work)
