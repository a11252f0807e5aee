"""Dropout: the mask of the run's own generator, bit for bit, in every implementation.

Proved in PyTorch and in C++: the mask is masks.keep_mask, for any key, module and position; kept
elements are rounded as torch rounds x / (1 - p); dropped elements are 0 whatever they hold. About 3
seconds on one thread.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedsim import seeds
from fedsim_kernels.spec import draw
from tests.implementations import DTYPES, IMPLEMENTATIONS, using
from tests.masks import keep_mask

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


def signed(key: int) -> int:
    """The int64 with these 64 bits, as an operation's argument has to be."""
    return key - (key >> 63 << 64)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("key", [0, 1, seeds.run_key(0), 2**63, 2**64 - 1])
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.05, 0.5, 1 - 2.0**-33])
@pytest.mark.parametrize("features", [1, 13, 64, 200])
@each_dtype
@each_implementation
def test_mask_is_that_of_seeds(
    implementation: str, dtype: torch.dtype, features: int, p: float, key: int
) -> None:
    """Positions at both ends of what 32 bits can count, largest sequence, round, step, client."""
    last = 2**32 // ((features + 3) // 4) - 1
    position = torch.tensor([0, 1, 7, last // 2, last // 2 + 1, last])
    rows = {
        "client": torch.tensor([0, 5, 2**28 - 1, 1, 2, 3]),
        "step": torch.tensor([0, 1, 2**16 - 1, 2, 3, 4]),
        "sequence": torch.tensor([0, 2**16 - 1, 3, 4, 5, 6]),
    }
    round, module = 2**16 - 1, 2**16 - 1
    kept = keep_mask(
        key, p, features, round=round, position=position, module=module, **rows
    )  # fmt: skip
    counters = seeds.row_counters(round=round, position=position, **rows)
    x = draw(6, features, dtype=dtype)
    with using(implementation):
        y = torch.ops.fedsim.dropout(x, counters, signed(key), module, p)
    assert torch.equal(bits(y), bits(torch.where(kept, x / (1 - p), 0)))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
@each_implementation
def test_every_bf16_number_is_rounded_as_torch_does(implementation: str, p: float) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).view(64, -1)
    counters = torch.arange(64)[:, None] * torch.tensor([1, 0, 0, 0])
    with using(implementation):
        y = torch.ops.fedsim.dropout(x, counters, 7, 3, p)
        ones = torch.ops.fedsim.dropout(torch.ones_like(x), counters, 7, 3, p)
    want = torch.where(ones != 0, x / (1 - p), 0)
    numbers = ~want.isnan()
    assert torch.equal(bits(y)[numbers], bits(want)[numbers]) and y[~numbers].isnan().all()
    assert abs((ones != 0).float().mean() - (1 - p)) < 0.01  # 5 sigma


@each_dtype
@each_implementation
def test_dropped_elements_and_padding_are_zero(implementation: str, dtype: torch.dtype) -> None:
    """NaN stays where it is kept, and nowhere else."""
    counters = torch.tensor([[0, 0, 0, 0], [-1, 0, 0, 0], [4, 0, 0, 0]])
    with using(implementation):
        kept = torch.ops.fedsim.dropout(torch.ones(3, 90, dtype=dtype), counters, 1, 2, 0.5) != 0
        y = torch.ops.fedsim.dropout(
            torch.full((3, 90), math.nan, dtype=dtype), counters, 1, 2, 0.5
        )
    assert torch.equal(y.isnan(), kept) and not bits(y)[~kept].any()
    assert not kept[1].any() and kept[0].any() and not torch.equal(kept[0], kept[2])
