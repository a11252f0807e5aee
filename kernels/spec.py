"""What every operation brings along so that tests and benches can hold it to one rule.

A kernel file's KERNEL names seeded inputs, how to run the operation forward and backward, and the
dense formula it must equal. One list of cases serves all; each operation takes what it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsim_kernels.segments import Segments

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One packing and one set of sizes."""

    name: str
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    parents: tuple[int, ...] | None = None
    starts: tuple[int, ...] | None = None
    chunks: tuple[int, ...] | None = None
    total: int | None = None  # packed rows, padding at the end included
    ranks: tuple[int, ...] = (4, 4, 4)  # of each slot; R is the largest
    features: tuple[int, int] = (16, 24)  # I and O, or hidden size and vocabulary
    widths: tuple[int, ...] = ()  # O of each module of a site; () is (O,)
    heads: tuple[int, int, int] = (2, 2, 8)  # Hq, Hkv, D
    window: int | None = None
    softcap: float | None = None

    @property
    def segments(self) -> Segments:
        return Segments.build(
            self.lengths, self.slots, self.parents, starts=self.starts, chunks=self.chunks,
            ranks=self.ranks, rows=self.total,
        )  # fmt: skip

    @property
    def rows(self) -> int:
        rows: int = self.segments.rows
        return rows

    def slot_of_row(self) -> Tensor:
        """(T,) int64 slot of each packed row; -1 for padding."""
        out = torch.full((self.rows,), -1)
        for slot, start, end in self.segments.spans:
            out[start:end] = slot
        return out


_CHAIN: dict[str, Any] = {
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
    Case("ranks-over-a-tile", (18, 17), (0, 1), ranks=(40, 17), features=(40, 33)),
    Case("odd-sizes", (5, 11, 3), (0, 1, 1), ranks=(3, 3, 2), features=(13, 7), heads=(3, 3, 5)),
    Case("three-modules", (9, 4, 12), (0, 0, 1), widths=(24, 8, 8), features=(16, 40)),
    Case("tile-edges", (16, 17, 15, 64, 65, 63), (0, 0, 1, 1, 2, 2), heads=(2, 1, 16)),
    Case("chunks", (5, 4, 7, 3), (0, 0, 0, 1), chunks=(0, 0, 1, 2), starts=(0, 5, 16, 32),
         total=48),
    Case("chunks-with-prefix", (5, 4, 7, 3, 6), (0, 0, 0, 0, 1), parents=(-1, 0, -1, 2, -1),
         chunks=(0, 0, 1, 1, 2), starts=(0, 5, 16, 23, 32), total=40),
    Case("prefix-chain", **_CHAIN),
    Case("window", (9, 4, 12), (0, 0, 1), window=4),
    Case("window-of-one", (5, 3), (0, 1), window=1),
    Case("window-chain", **_CHAIN, window=5),
    Case("softcap", (9, 4, 12), (0, 0, 1), softcap=1.5),
    Case("softcap-window-chain", **_CHAIN, window=5, softcap=1.5, heads=(4, 2, 8)),
    Case("grouped-queries", (9, 4, 12), (0, 0, 1), heads=(6, 2, 8)),
    Case("one-key-head", **_CHAIN, heads=(4, 1, 8)),
)  # fmt: skip


@dataclass(frozen=True)
class KernelSpec:
    """One hot operation.

    Attributes:
        name: its file.
        operations: names under `torch.ops.fedsim`.
        inputs: (case, dtype) -> seeded CPU tensors; arenas that are added to are never zero.
        run: (case, inputs) -> outputs and every gradient, through the dispatched operation.
        formula: the same from the definition, written densely, in any dtype and on any device.
        work: (case, dtype) -> (FLOPs, bytes moved at the least) of one `run`.
        cases: those of CASES that differ for this operation.
    """

    name: str
    operations: tuple[str, ...]
    inputs: Callable[[Case, torch.dtype], Tensors]
    run: Callable[[Case, Tensors], Tensors]
    formula: Callable[[Case, Tensors], Tensors]
    work: Callable[[Case, torch.dtype], tuple[float, float]]
    cases: tuple[Case, ...] = CASES


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def errors(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> list[tuple[float, float]]:
    """The one tolerance rule, for each output: (RMS error, largest error) over what is allowed.

    Against the formula in float64, an operation's RMS error may be 2 times and its largest error
    8 times that of the formula in the same dtype in plain torch, both plus eps max|exact|; an
    output that is zero everywhere (the gradient of a softmax over one key) counts as if plain
    torch had erred by eps times the largest of the others. At most 1 is right; inf means a NaN or
    a wrong shape.
    """
    inputs = kernel.inputs(case, dtype)
    exact = kernel.formula(case, tuple(_cast(x, torch.float64) for x in inputs))
    # Plain torch in the same dtype, adapters and arenas too: what a user would write.
    plain = kernel.formula(case, tuple(_cast(x, dtype) for x in inputs))
    moved = tuple(x.clone(memory_format=torch.preserve_format).to(device) for x in inputs)
    largest = max(float(x.abs().max()) for x in exact)
    out: list[tuple[float, float]] = []
    for ours, theirs, true in zip(kernel.run(case, moved), plain, exact, strict=True):
        if ours.shape != true.shape:
            out.append((float("inf"), float("inf")))
            continue
        error, allowed = (ours.cpu().double() - true).abs(), (theirs.double() - true).abs()
        slack = torch.finfo(dtype).eps * float(true.abs().max())
        if not slack:
            slack = torch.finfo(dtype).eps * largest
            allowed = allowed + slack
        rms = error.square().mean().sqrt() / (2 * allowed.square().mean().sqrt() + slack)
        peak = error.max() / (8 * allowed.max() + slack)
        over = [float(e) if e == e else float("inf") for e in (rms, peak)]
        out.append((over[0], over[1]))
    return out


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x
