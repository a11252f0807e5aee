"""Variant: one compiled form of a Triton kernel, and the only way to launch one.

Each file of this folder lists in `variants()` exactly what its launchers can select, so that
bench/aot.py can compile everything that a GPU will ever be asked to run, without a GPU. Nothing is
tuned at run time: a choice by timing would change the order of sums from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16", a Variant's `dtype`."""
    return str(dtype).removeprefix("torch.")


def pointer(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "*bf16", Triton's name for a pointer to it."""
    return f"*{_TYPES[dtype]}"


@dataclass(frozen=True)
class Variant:
    """A kernel with its constants.

    Attributes:
        kernel: the `@triton.jit` function.
        dtype: "float32", "bfloat16" or "float16", of the activations.
        tile: constexpr argument -> value.
        num_warps, num_stages: of the compiled program.
        signature: argument -> Triton type: "*bf16", "i32", "fp32", or "constexpr" for those of
            `tile`; every argument, in order. Pointers are 16-byte aligned; an integer that is a
            multiple of 16 for every model of practical size is "i32:16".
        uses_dot: the kernel multiplies matrices, on tensor cores in bf16 and fp16.
    """

    kernel: Any
    dtype: str
    tile: dict[str, int]
    num_warps: int
    num_stages: int
    signature: dict[str, str]
    uses_dot: bool

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells two variants apart; hashable."""
        return (
            self.kernel.__name__, self.dtype, tuple(sorted(self.tile.items())), self.num_warps,
            self.num_stages, tuple(self.signature.items()),
        )  # fmt: skip

    def launch(self, grid: tuple[int, ...] | Callable[..., Any], *arguments: Any) -> None:
        """Run it with the arguments that are no constants, in the signature's order."""
        # FP fusion is named because its default changes in Triton 3.10, and with it the results.
        self.kernel[grid](
            *arguments, **self.tile, num_warps=self.num_warps, num_stages=self.num_stages,
            enable_fp_fusion=True,
        )  # fmt: skip
