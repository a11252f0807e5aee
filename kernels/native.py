"""The C++ kernels of csrc/, loaded with ctypes.

Every function exists once for each instruction set, `<name>_<isa>`; the best one that this
processor has is used, or the one that FEDSIM_ISA names. FEDSIM_NATIVE=0 leaves the library out.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ISAS = ("avx512bf16", "avx512", "avx2")  # best first


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it was not built or is switched off.

    Raises:
        ValueError: FEDSIM_NATIVE names a file that is not there.
    """
    given = os.environ.get("FEDSIM_NATIVE")  # a path: a build with sanitizers, for example
    if given == "0":
        return None
    spec = importlib.util.find_spec("fedsim_kernels._csrc")
    path = given or (spec.origin if spec else None)
    if given and not Path(given).is_file():
        raise ValueError(f"FEDSIM_NATIVE: got {given}; expected 0 or the file of a library.")
    if path is None:
        return None
    try:
        # torch has loaded its OpenMP runtime for everybody; sharing it shares its threads. Two
        # runtimes would spin against each other.
        return ctypes.CDLL(path)
    except OSError:
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(path)
        except OSError:
            return None


@cache
def isa() -> str | None:
    """The instruction set in use, or None without a library or on a processor without AVX2."""
    lib = library()
    if lib is None:
        return None
    level = int(lib.fedsim_isa())  # 0: none, 1: avx2, 2: avx512, 3: avx512bf16
    found = ISAS[len(ISAS) - level :]
    wanted = os.environ.get("FEDSIM_ISA")
    if wanted and wanted not in found:
        raise ValueError(
            f"FEDSIM_ISA: got {wanted}; expected one of {list(found)}, which this processor has."
        )
    return wanted or (found[0] if found else None)


def available() -> bool:
    """May native code run here?"""
    return isa() is not None


@cache
def _function(name: str, which: str) -> Any:
    lib = library()
    function = getattr(lib, f"{name}_{which}")
    function.restype = None
    return function


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call `<name>_<isa>`: tensors as pointers, int as int64, float as double, None as null.

    Callers check shapes, strides and dtypes; the library does not.
    """
    which = isa()
    assert which is not None
    _function(name, which)(*(_convert(x) for x in arguments), ctypes.c_int64(_threads()))


def _convert(x: Tensor | int | float | None) -> Any:
    if x is None:
        return ctypes.c_void_p(None)
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)


def _threads() -> int:
    return torch.get_num_threads()
