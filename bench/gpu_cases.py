"""Part `cases` of gpu.py: is every kernel right on this device?"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import fedsim_kernels
from fedsim_kernels.spec import Case, KernelSpec, errors

Item = tuple[str, Callable[[], dict[str, Any]]]


def kernels() -> dict[str, KernelSpec]:
    """The KERNEL of every file that has one."""
    names = [m.name for m in pkgutil.iter_modules(fedsim_kernels.__path__) if m.name != "_csrc"]
    modules = {name: importlib.import_module(f"fedsim_kernels.{name}") for name in names}
    return {name: m.KERNEL for name, m in modules.items() if hasattr(m, "KERNEL")}


# Tiles as large as those of real models, and their edges.
_SIZES: dict[str, Any] = {"lengths": (130, 64, 65), "slots": (0, 0, 1), "ranks": (16, 9)}
REAL = (
    Case("smollm2", **_SIZES, features=(576, 960), widths=(576, 192, 192), heads=(9, 3, 64)),
    Case("8b", **_SIZES, features=(4096, 6144), widths=(4096, 1024, 1024), heads=(32, 8, 128)),
)
FLAT = ("adamw", "reduce")  # their rows would have 400 M numbers at the size of 8b


def cases(dtype: torch.dtype, device: torch.device, tiny: bool) -> Iterator[Item]:
    """Each kernel on each case; all kernels meet the first case before any meets the last."""
    found = {
        name: [
            *spec.cases[: 3 if tiny else None],
            *(() if tiny else REAL[: 1 + (name not in FLAT)]),
        ]
        for name, spec in kernels().items()
        if any(x.dtype == dtype for x in spec.inputs(spec.cases[0], dtype))
    }
    for number in range(max(map(len, found.values()))):
        for name, listed in found.items():
            if number < len(listed):
                case = listed[number]
                yield f"{name} {case.name}", partial(check, kernels()[name], case, dtype, device)


def check(
    kernel: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """The one tolerance rule: the worst of all outputs, at most 1 when right."""
    worst = max(map(max, errors(kernel, case, dtype, device)))
    return {"kernel": kernel.name, "error": worst if math.isfinite(worst) else 1e30}
