"""What do the Triton kernels compile to on the GPUs we have not got?

Compiles every variant that a launcher can select (kernels/cuda/*.py, `variants()`) for sm_80 and
sm_90, without a GPU, and writes registers, spills, shared memory and the matrix instructions found
to results/aot.json. tests/test_aot.py holds that record to budgets, and to the variants and sources
of today: whoever edits a kernel runs this again.

Pointers are compiled as 16-byte aligned and integers as the signature says, which is how a launch
would specialise them for models of practical size. `mma` is "wgmma", "mma" or "none"; products of
fp32 numbers are IEEE products, so "tf32" would be an error and the budgets allow it nowhere.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness

import fedsim_kernels.cuda
from fedsim_kernels.cuda.variant import Variant

ARCHITECTURES = (80, 90)
RECORD = harness.RESULTS / "aot.json"
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)")
Entry = dict[str, Any]


def files() -> list[str]:
    """The files of kernels/cuda that hold kernels."""
    names = sorted(m.name for m in pkgutil.iter_modules(fedsim_kernels.cuda.__path__))
    return [n for n in names if hasattr(_module(n), "variants")]


def _module(name: str) -> Any:
    return importlib.import_module(f"fedsim_kernels.cuda.{name}")


@cache
def listed() -> list[tuple[str, Variant]]:
    """(file, variant) of everything that a launcher can select."""
    return [(name, variant) for name in files() for variant in _module(name).variants()]


def describe(variant: Variant) -> Entry:
    """What identifies a variant in the record, and the source it was compiled from."""
    return {
        "kernel": variant.kernel.__name__,
        "dtype": variant.dtype,
        "tile": variant.tile,
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "signature": variant.signature,
        "uses_dot": variant.uses_dot,
        "source": source(variant.kernel),
    }


@cache
def source(kernel: Any) -> str:
    """Hash of a kernel's syntax, of the kernels that it calls and of the constants that it reads.

    Neither comments nor the place in the file count, so that only an edit asks for a new record.
    """
    digest = hashlib.sha256()
    for part in sorted(_parts(kernel, set())):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _parts(kernel: Any, seen: set[str]) -> Iterator[str]:
    tree = kernel.parse()
    seen.add(kernel.__name__)
    yield ast.dump(tree)
    for name in sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}):
        found = kernel.__globals__.get(name)
        if hasattr(found, "parse") and name not in seen:
            yield from _parts(found, seen)
        elif hasattr(found, "value"):  # a tl.constexpr
            yield f"{name}={found.value}"


def program(variant: Variant, arch: int, ones: Sequence[str] = ()) -> Any:
    """Compile a variant; `ones` are integers that are 1, which a launch takes for constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = variant.signature | dict.fromkeys(ones, "constexpr")
    aligned = [i for i, kind in enumerate(kinds.values()) if kind[0] == "*" or kind[-3:] == ":16"]
    return triton.compile(
        ASTSource(
            variant.kernel,
            {name: kind.removesuffix(":16") for name, kind in kinds.items()},
            constexprs=variant.tile | dict.fromkeys(ones, 1),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        ),
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": True,
        },
    )


def compiled(index: int, arch: int) -> Entry:
    """The record's entry of one variant for one architecture."""
    variant = listed()[index][1]
    found = program(variant, arch)
    registers, spill = usage(found.asm["cubin"])
    entry = describe(variant)
    first = {key: entry.pop(key) for key in ("kernel", "dtype", "tile")}
    return first | {
        "arch": f"sm_{arch}",
        "registers": registers,
        "spill_bytes": spill,
        "shared_bytes": found.metadata.shared,
        "mma": instructions(found.asm["ptx"]),
        **entry,
        "compiler": f"triton {version('triton')}",
    }


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a thread: the latter are spills."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(n) for n in _USAGE.findall(text)[0])
    return registers, stack + local


def instructions(ptx: str) -> str:
    """Which matrix instructions a program uses."""
    found = re.findall(r"\b(wgmma\.mma_async|mma\.sync)(\S*)", ptx)
    if any("tf32" in shape for _, shape in found):
        return "tf32"
    return next((name.partition(".")[0] for name, _ in found), "none")


def _order(entry: Entry) -> str:
    return json.dumps([entry[k] for k in ("kernel", "dtype", "arch", "tile", "signature")])


def save(entries: list[Entry], names: set[str] | None) -> None:
    """Write the record; with names, in place of those kernels' old entries only."""
    old = json.loads(RECORD.read_text()) if names is not None and RECORD.is_file() else []
    kept = [entry for entry in old if entry["kernel"] not in (names or ())]
    lines = [json.dumps(entry) for entry in sorted(kept + entries, key=_order)]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def summarise(entries: list[Entry]) -> Entry:
    """The result line: counts, and the largest of what has a budget."""
    return {
        "compiled": len(entries),
        "spilling": sum(e["spill_bytes"] > 0 for e in entries),
        "registers_max": max(e["registers"] for e in entries),
        "shared_bytes_max": {
            f"sm_{arch}": max(e["shared_bytes"] for e in entries if e["arch"] == f"sm_{arch}")
            for arch in ARCHITECTURES
        },
        "tf32": sum(e["mma"] == "tf32" for e in entries),
    }


def show(entries: list[Entry]) -> None:
    """A line for each kernel, dtype and architecture: its variants' largest figures."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for e in sorted(entries, key=_order):
        groups.setdefault((e["kernel"], e["dtype"], e["arch"]), []).append(e)
    harness.show(
        "Compiled ahead of time; largest of each group's variants",
        ("kernel", "dtype", "arch", "variants", "registers", "spill bytes", "shared bytes", "mma"),
        [
            (
                *key, str(len(group)),
                *(str(max(e[k] for e in group)) for k in ("registers", "spill_bytes",
                                                          "shared_bytes")),
                ", ".join(sorted({e["mma"] for e in group})),
            )
            for key, group in groups.items()
        ],
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", metavar="NAME", help="only this file of kernels/cuda or kernel")
    only = parser.parse_args(arguments).kernel
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit(
            "aot: got TRITON_INTERPRET set; expected it unset: interpreted, they have no code."
        )
    chosen = [
        (i, arch)
        for i, (file, variant) in enumerate(listed())
        for arch in ARCHITECTURES
        if only in (None, file, variant.kernel.__name__)
    ]
    if not chosen:
        known = sorted({*files(), *(variant.kernel.__name__ for _, variant in listed())})
        sys.exit(f"aot: got --kernel {only}; expected one of {', '.join(known)}.")

    began, entries = time.perf_counter(), []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done, entry in enumerate(pool.map(compiled, *zip(*chosen)), 1):
            entries.append(entry)
            seconds = time.perf_counter() - began
            harness.say(
                f"{done}/{len(chosen)} {seconds:.0f} s {entry['kernel']} {entry['dtype']} "
                f"{entry['tile']} {entry['arch']}: {entry['registers']} registers, "
                f"{entry['spill_bytes']} spilled, {entry['shared_bytes']} shared, {entry['mma']}"
            )
    save(entries, None if only is None else {e["kernel"] for e in entries})
    show(entries)
    print(json.dumps(summarise(entries)), flush=True)


if __name__ == "__main__":
    main()
