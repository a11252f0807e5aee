"""The kernels that there are, and the implementations of them that this processor can run."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import fedsim_kernels
from fedsim_kernels import dispatch, native
from fedsim_kernels.spec import CASES, KernelSpec

_FILES = [m.name for m in pkgutil.iter_modules(fedsim_kernels.__path__) if m.name != "_csrc"]
KERNELS: dict[str, KernelSpec] = {
    name: module.KERNEL
    for name, module in ((n, importlib.import_module(f"fedsim_kernels.{n}")) for n in _FILES)
    if hasattr(module, "KERNEL")
}
OPERATIONS = sorted(name for kernel in KERNELS.values() for name in kernel.operations)
_LIBRARY = native.library()
ISAS = native.ISAS[len(native.ISAS) - _LIBRARY.fedsim_isa() :] if _LIBRARY else ()
IMPLEMENTATIONS = ("reference", *ISAS)
DTYPES = (torch.float32, torch.bfloat16)


@contextmanager
def using(implementation: str) -> Iterator[None]:
    """PyTorch, or C++ for one instruction set."""
    forced = "reference" if implementation == "reference" else "native"
    with pytest.MonkeyPatch.context() as patch, dispatch.use(forced):
        patch.setattr(native, "isa", lambda: implementation)
        yield


def dtypes(kernel: KernelSpec) -> list[torch.dtype]:
    """Those that its inputs come in: optimisers and sums have one only."""
    return [d for d in DTYPES if any(x.dtype == d for x in kernel.inputs(CASES[0], d))]
