"""The C++ library: what it exports, how it is chosen, and that it stays inside its memory.

The slow test compiles csrc/ with the address and undefined-behaviour sanitizers and runs every case
of every kernel on it: three minutes of processor time. The others take two seconds.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim_kernels import dispatch, native
from fedsim_kernels.spec import CASES, draw
from tests.conftest import require
from tests.implementations import DTYPES, ISAS, KERNELS, using

ROOT = Path(__file__).parents[1]


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at the environment at every call."""
    require("native", bool(ISAS), "the C++ kernels are not built")
    for name in ("library", "isa"):
        monkeypatch.setattr(native, name, getattr(native, name).__wrapped__)


def test_every_function_for_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is what operations call, and exists for processors that are not here."""
    require("native", bool(ISAS), "the C++ kernels are not built")
    require("nm", shutil.which("nm") is not None, "nm is not installed")
    call, called = native.call, set()

    def record(name: str, *arguments: Any) -> None:
        called.add(name)
        call(name, *arguments)

    monkeypatch.setattr(native, "call", record)
    with using(ISAS[0]):
        for dtype in DTYPES:
            for kernel in KERNELS.values():
                kernel.run(CASES[0], kernel.inputs(CASES[0], dtype))
        x = draw(3, 16, dtype=torch.bfloat16).requires_grad_()
        q = x.view(3, 2, 8)
        torch.ops.fedsim.rms_norm(x, torch.ones(16), 1e-5)[0].sum().backward()
        torch.ops.fedsim.rotary(q, q, draw(3, 8), draw(3, 8))[0].sum().backward()
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", native.library()._name], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    names = {line.split()[-1] for line in listed.stdout.splitlines()} - {"fedsim_isa"}
    exported = {name for name in names if not name.startswith("_Z")}  # std::vector's own
    assert exported == {f"{name}_{isa}" for name in called for isa in native.ISAS}


@pytest.mark.usefixtures("uncached")
def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSIM_ISA", raising=False)
    assert native.isa() == ISAS[0]
    for isa in ISAS:
        monkeypatch.setenv("FEDSIM_ISA", isa)
        assert native.isa() == isa
    for wrong in ("sse2", "AVX2"):
        monkeypatch.setenv("FEDSIM_ISA", wrong)
        with pytest.raises(ValueError, match=f"FEDSIM_ISA: got {wrong}; expected one of .*avx2"):
            native.available()


@pytest.mark.usefixtures("uncached")
def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """FEDSIM_NATIVE=0: every operation runs in PyTorch, and says so when asked."""
    assert dispatch.chosen(torch.device("cpu")) == "native"
    monkeypatch.setenv("FEDSIM_NATIVE", "0")
    monkeypatch.setattr(native, "call", None)
    assert not native.available()
    assert dispatch.chosen(torch.device("cpu")) == "reference"
    for kernel in KERNELS.values():
        assert kernel.run(CASES[0], kernel.inputs(CASES[0], torch.float32))


@pytest.mark.parametrize(("dtype", "there"), [(torch.float16, False), (torch.float64, False),
                                              (torch.bfloat16, True)])  # fmt: skip
def test_other_dtypes_run_in_pytorch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, there: bool
) -> None:
    require("native", bool(ISAS), "the C++ kernels are not built")
    call, called = native.call, []
    monkeypatch.setattr(native, "call", lambda *a: (called.append(a[0]), call(*a)))
    y = draw(5, 12, dtype=dtype)
    gate, up = y.float().chunk(2, 1)
    out = torch.ops.fedsim.swiglu(y)
    assert bool(called) == there and out.dtype == dtype
    want = torch.nn.functional.silu(gate) * up
    assert (out.float() - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max() + 1e-6


CHILD = """
import torch
from fedsim_kernels import native
from tests.implementations import ISAS, KERNELS, dtypes, using
from tests.test_kernels import WIDE
assert native.library()._name.endswith("sanitized.so")
torch.set_num_threads(2)
for isa in ISAS:
    for kernel in KERNELS.values():
        for case in (*kernel.cases, WIDE):
            for dtype in dtypes(kernel):
                with using(isa):
                    kernel.run(case, kernel.inputs(case, dtype))
print("done", *ISAS)
"""
SANITIZE = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def sanitized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """csrc/ with setup.py's flags and the sanitizers, for the instruction sets of this machine."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    flags: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"))
    jobs = [
        ["g++", *flags["COMMON"], *extra, *SANITIZE, f"-DFEDSIM_ISA={isa}", "-c", str(source),
         "-o", str(folder / f"{source.stem}_{isa}.o")]
        for source in (ROOT / "csrc").glob("*.cpp")
        for isa, extra in flags["ISAS"].items()
        if isa in ISAS and (source.stem != "isa" or isa == "avx2")
    ]  # fmt: skip
    run: Callable[..., Any] = subprocess.run
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: run(job, check=True, capture_output=True), jobs))
    target = folder / "sanitized.so"
    run(["g++", "-shared", *SANITIZE, "-o", str(target), *(job[-1] for job in jobs)], check=True)
    return target


def runtime(library: str) -> str:
    """Where the compiler keeps one of its libraries."""
    found = subprocess.run(["g++", f"-print-file-name={library}"], capture_output=True, text=True)
    return found.stdout.strip()


@pytest.mark.slow
def test_no_case_leaves_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors have poisoned ground on both sides; a report ends the process."""
    require("native", bool(ISAS), "the C++ kernels are not built")
    there = shutil.which("g++") is not None and Path(runtime("libasan.so")).is_absolute()
    require("sanitizers", there, "g++ with libasan is not installed")
    library = sanitized(tmp_path, monkeypatch)
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {
            "FEDSIM_NATIVE": str(library), "PYTHONPATH": str(ROOT),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it allocates until it ends
            # libstdc++ too: without it the sanitizer does not find what torch's exceptions need.
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        },
    )  # fmt: skip
    assert child.returncode == 0 and child.stdout.split() == ["done", *ISAS], child.stderr[-4000:]
    assert "runtime error" not in child.stderr
