"""How a call finds its implementation: native C++ on CPU, Triton on CUDA, or the reference.

Each operation is `torch.ops.fedsim.<name>`. Its Triton form is the function of the same name in
`fedsim_kernels.cuda.<file>`, imported at the first call on a CUDA tensor.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim_kernels import native

Implementation = Literal["reference", "native", "triton"]
LIBRARY = torch.library.Library("fedsim", "DEF")
_forced: list[Implementation] = []


@contextmanager
def use(implementation: Implementation) -> Iterator[None]:
    """Force one implementation inside the block, e.g. Triton in its interpreter on CPU tensors."""
    _forced.append(implementation)
    try:
        yield
    finally:
        _forced.pop()


def chosen(device: torch.device) -> Implementation:
    """Which implementation a call on this device gets."""
    if _forced:
        return _forced[-1]
    if device.type == "cuda":
        return "triton" if _has_triton() else "reference"
    return "native" if native.available() else "reference"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def define(
    schema: str,
    file: str,
    *,
    reference: Callable[..., Any],
    native: Callable[..., Any],
    fake: Callable[..., Any],
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> None:
    """Define `fedsim::<schema>` with its three implementations and its meta form.

    Native code has `dtypes` of the first argument, a tensor; others on CPU take the reference.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)

    def run(first: Tensor, *rest: Any) -> Any:
        which = chosen(first.device)
        if which == "triton":
            module = importlib.import_module(f"fedsim_kernels.cuda.{file}")
            return getattr(module, name)(first, *rest)
        if which == "native" and first.dtype in dtypes:
            return native(first, *rest)
        return reference(first, *rest)

    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fedsim::{name}", fake, lib=LIBRARY)


def differentiate(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Register the backward of `fedsim::<name>`."""
    torch.library.register_autograd(
        f"fedsim::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )
