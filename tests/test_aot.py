"""The record of what the Triton kernels compile to, held to the code and to budgets.

Proved here: bench/results/aot.json has every variant of today's kernels, from today's sources, for
both architectures; launchers select every listed variant and no other, over grids of sizes, ranks
and dtypes, with arguments of the compiled types, without asking the device for anything; nothing
spills or outgrows shared memory, and half-precision products run on tensor cores while fp32 ones
stay IEEE; compiling a kernel again gives what was recorded. About 20 seconds.

Run as a script, in a process where kernels are not interpreted, this file prints what is listed and
what launchers select: both differ where another test has chosen the interpreter.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import aot

from fedsim_kernels.cuda.variant import DTYPES, Variant, pointer
from fedsim_kernels.segments import Segments

ROOT = Path(__file__).parents[1]
IDENTITY = ("kernel", "dtype", "tile", "num_warps", "num_stages", "signature", "uses_dot")
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that a program may have
FP32, FP64, INT64 = torch.float32, torch.float64, torch.int64


# What launchers select: each is driven over sizes with tensors that have no memory


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def with_fp32() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """(activations, weights): the same dtype, or fp32 weights."""
    for dtype in DTYPES:
        yield from ((dtype, other) for other in dict.fromkeys((dtype, FP32)))


def drive_rms_norm(module: ModuleType) -> None:
    sizes = (1, 64, 256, 257, 576, 1024, 1025, 4096, 4097, 16384)
    for (dtype, other), d, t in product(with_fp32(), sizes, (1, 4096)):
        x, w = meta(t, d, dtype=dtype), meta(d, dtype=other)
        module.rms_norm(x, w, 1e-6)
        module.rms_norm_backward(x, x, w, meta(t))


def drive_rotary(module: ModuleType) -> None:
    sizes = (2, 64, 66, 80, 128, 130, 256, 258, 512)
    for (dtype, other), d, heads in product(with_fp32(), sizes, (1, 2, 9, 64)):
        whole = meta(128, 3 * heads, d, dtype=dtype)  # q, k and v are views of one projection
        q, k = whole[:, : 2 * heads], whole[:, 2 * heads :]
        for turn in (module.rotary, module.rotary_backward):
            turn(q, k, meta(128, d, dtype=other), meta(128, d, dtype=other))


def drive_swiglu(module: ModuleType) -> None:
    for dtype, f, t in product(DTYPES, (1, 1536, 28672), (1, 16384)):
        y = meta(t, 2 * f, dtype=dtype)
        module.swiglu(y)
        module.swiglu_backward(meta(t, f, dtype=dtype), y)


def drive_dropout(module: ModuleType) -> None:
    keys = (0, 1, 2**31, 2**63, 2**64 - 1, -1, -(2**63))
    for dtype, i, key, p in product(DTYPES, (1, 576, 28672), keys, (0.0, 0.1, 1 - 2**-32)):
        module.dropout(meta(7, i, dtype=dtype), meta(7, 4, dtype=INT64), key, 65535, p)


def drive_linear_xent(module: ModuleType) -> None:
    for dtype, v, softcap in product(DTYPES, (1, 384, 49152, 262144), (0.0, 30.0)):
        labels = (meta(256, dtype=INT64), meta(256))
        module.softmax_xent(meta(256, v, dtype=dtype), *labels, 1.0, softcap)


def drive_adamw(module: ModuleType) -> None:
    for step, scaled, p in product((FP32, INT64), (False, True), (1, 4097, 2**27)):
        k = 16
        rows = [meta(k, 2 * p)[:, :p] for _ in range(4)]
        vectors = meta(k), meta(k, dtype=step), meta(k, dtype=torch.bool)
        scale = meta(p) if scaled else None
        module.adamw(*rows, *vectors, scale, 0.9, 0.999, 1e-8, 0.0, float("inf"))


def drive_reduce(module: ModuleType) -> None:
    for p, start in product((1, 1025, 2**27), (False, True)):
        rows = meta(7, 2 * p)[:, :p]
        first = meta(p) if start else None
        module.weighted_rows(meta(p, dtype=FP64), rows, first, meta(7, dtype=FP64))


def packings(ranks: tuple[int, ...]) -> list[Segments]:
    """One short slot; and slots of several pieces, chunks, padding and parents."""
    long = Segments.build(
        (700, 5, 64, 3, 9), (0, 0, 1, 1, 2), (-1, 0, -1, -1, -1), chunks=(0, 0, 1, 2, 3),
        starts=(0, 700, 768, 832, 896), ranks=ranks, rows=960,
    )  # fmt: skip
    return [Segments.build((3,), (0,), ranks=ranks), long]


def drive_grouped_lora(module: ModuleType) -> None:
    from fedsim_kernels.cuda.tiles import tile_tables

    ranks = (1, 8, 16, 17, 32, 33, 64, 65, 128, 200)
    sizes = ((37, 24), (576, 4096))
    for dtype, r, n, (i, width) in product(DTYPES, ranks, (1, 3), sizes):
        widths = [width] * n
        columns = [width * m for m in range(n)]
        for segments in packings((r, 1, r)):
            t = segments.rows
            tables = [segments.span_table, segments.sequence_table, *tile_tables(segments)]
            a, b, scale = meta(3, n * r, i), meta(3, n * width, r), meta(3)
            x, y = meta(t, i, dtype=dtype), meta(t, n * width, dtype=dtype)
            h = module.grouped_lora(y, x, a, b, scale, tables, columns, widths)
            for grad_x in (None, x):
                module.grouped_lora_backward(
                    y, x, h, a, b, scale, a, b, grad_x, tables, columns, widths
                )


def drive_packed_attention(module: ModuleType) -> None:
    from fedsim_kernels.cuda.tiles import tile_tables

    sizes = (5, 16, 17, 32, 64, 65, 80, 96, 128, 192, 256)
    heads = ((1, 1), (6, 2), (9, 3), (8, 8))
    masks = ((0, 0.0), (4, 0.0), (0, 30.0), (4096, 30.0))
    for dtype, d, (hq, hkv), (window, cap) in product(DTYPES, sizes, heads, masks):
        for segments in packings((4, 4, 4)):
            tables = [segments.span_table, segments.sequence_table, *tile_tables(segments)]
            whole = meta(segments.rows, hq + 2 * hkv, d, dtype=dtype)
            q, k, v = whole.split((hq, hkv, hkv), 1)
            rest = (tables, d**-0.5, window, cap)
            o, lse = module.packed_attention(q, k, v, *rest)
            module.packed_attention_backward(torch.empty_like(o), q, k, v, o, lse, *rest)


def fits(kind: str, x: Any) -> bool:
    """Would a launch give this argument the type that it was compiled for?"""
    if kind.startswith("*"):
        return isinstance(x, Tensor) and pointer(x.dtype) == kind
    if kind == "fp32":
        return isinstance(x, float)
    return kind.split(":")[0] == "i32" and isinstance(x, int) and -(2**31) <= x < 2**31


def selected() -> list[dict[str, Any]]:
    """Every variant that a launcher launches when driven; also checks each launch."""
    found: dict[Any, Variant] = {}

    def launch(variant: Variant, grid: tuple[int, ...], *arguments: Any) -> None:
        kinds = {n: k for n, k in variant.signature.items() if n not in variant.tile}
        assert len(arguments) == len(kinds), variant
        wrong = [(n, x) for (n, k), x in zip(kinds.items(), arguments) if not fits(k, x)]
        assert wrong == [], (variant, wrong)
        # More blocks than this in y or z and the launch fails.
        assert all(isinstance(n, int) for n in grid) and max(grid[1:], default=0) <= 65535, grid
        found[variant.key] = variant

    Variant.launch = launch  # type: ignore[method-assign]
    for name, drive in list(globals().items()):
        if name.startswith("drive_"):
            drive(importlib.import_module(f"fedsim_kernels.cuda.{name.removeprefix('drive_')}"))
    return [aot.describe(variant) for variant in found.values()]


def constants(kernel: Any) -> tuple[list[str], list[str]]:
    """Names of a kernel's arguments, and of those that are constants."""
    return kernel.arg_names, [p.name for p in kernel.params if p.is_constexpr]


def report() -> dict[str, Any]:
    variants = [variant for _, variant in aot.listed()]
    return {
        "listed": [aot.describe(v) for v in variants],
        "arguments": [constants(v.kernel) for v in variants],
        "selected": selected(),
    }


# The tests


def key(entry: dict[str, Any], *more: str) -> str:
    return json.dumps([entry[name] for name in (*IDENTITY, *more)], sort_keys=True)


def process(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which kernels are not interpreted."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False,
        env=clean | {"PYTHONPATH": str(ROOT / "bench")} | environment,
    )  # fmt: skip


@cache
def now() -> dict[str, Any]:
    from tests.conftest import require

    require("triton", importlib.util.find_spec("triton") is not None, "Triton is not installed")
    done = process(__file__)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@cache
def record() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(aot.RECORD.read_text(encoding="utf-8"))
    return entries


AGAIN = "bench/results/aot.json is not of today's kernels: run bench/aot.py"


def test_the_record_has_every_variant_once_per_architecture() -> None:
    for arch in ("sm_80", "sm_90"):
        recorded = sorted(key(e) for e in record() if e["arch"] == arch)
        assert recorded == sorted(key(e) for e in now()["listed"]), AGAIN
    assert {e["arch"] for e in record()} == {"sm_80", "sm_90"}


def test_the_record_is_of_these_sources() -> None:
    today = {key(e): e["source"] for e in now()["listed"]}
    stale = {e["kernel"] for e in record() if e["source"] != today.get(key(e))}
    assert stale == set(), AGAIN


def test_launchers_select_what_is_listed_and_nothing_else() -> None:
    listed, chosen = ({key(e) for e in now()[name]} for name in ("listed", "selected"))
    assert chosen - listed == set() and listed - chosen == set()
    assert len(listed) == len(now()["listed"])


def test_signatures_name_every_argument() -> None:
    for entry, (names, constant) in zip(now()["listed"], now()["arguments"], strict=True):
        signature = entry["signature"]
        assert list(signature) == names
        assert [n for n, kind in signature.items() if kind == "constexpr"] == constant
        assert sorted(entry["tile"]) == sorted(constant)


def over(limit: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [f"{e['kernel']} {e['dtype']} {e['tile']} {e['arch']}" for e in record() if limit(e)]


def test_nothing_spills() -> None:
    """But for fp32 queries of heads of 256 features, three registers on sm_80."""

    def allowed(e: dict[str, Any]) -> int:
        known = e["kernel"] == "attention_queries" and e["dtype"] == "float32"
        return 24 if known and e["tile"]["BD"] == 256 else 0

    assert over(lambda e: e["spill_bytes"] > allowed(e) or not 0 < e["registers"] <= 255) == []


def test_shared_memory_fits() -> None:
    assert over(lambda e: e["shared_bytes"] > SHARED[e["arch"]]) == []


def test_products_run_where_they_should() -> None:
    """Half precision on tensor cores, fp32 as IEEE products, everything else without."""
    half = ("bfloat16", "float16")
    assert over(lambda e: e["mma"] not in ("none", "mma", "wgmma")) == []
    assert over(lambda e: (e["mma"] != "none") != (e["uses_dot"] and e["dtype"] in half)) == []


COMPILE = """
import json, aot
file, variant = next((f, v) for f, v in aot.listed() if v.kernel.__name__ == "weighted_rows_kernel")
print(json.dumps(aot.compiled(aot.listed().index((file, variant)), 90)))
"""


def test_compiling_again_gives_the_record(tmp_path: Path) -> None:
    wanted = key(next(e for e in now()["listed"] if e["kernel"] == "weighted_rows_kernel"))
    done = process("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert any(tmp_path.rglob("*.cubin"))
    mine = json.loads(done.stdout)
    (theirs,) = (e for e in record() if key(e) == wanted and e["arch"] == "sm_90")
    if mine["compiler"] == theirs["compiler"]:
        assert mine == theirs
    assert key(mine) == wanted and mine["spill_bytes"] == 0


ONES = """
import aot
kernels = {}
for _, variant in aot.listed():
    if variant.dtype == "bfloat16" or variant.kernel.__name__ not in kernels:
        kernels[variant.kernel.__name__] = variant
for name, variant in kernels.items():
    print(name, flush=True)
    free = {p.name for p in variant.kernel.params if p.do_not_specialize}
    ones = [n for n, kind in variant.signature.items() if kind.startswith("i32") and n not in free]
    aot.program(variant, 90, ones)
"""


def test_sizes_of_one_compile() -> None:
    """A launch makes constants of integers that are 1, and a constant has no `.to`; the
    interpreter would not notice."""
    now()
    done = process("-c", ONES)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {done.stderr[-2000:]}"


class Jit:
    """What `source` reads of a jit function."""

    def __init__(self, text: str, **used: Any) -> None:
        self.text, self.__globals__ = text, used
        self.__name__ = ast.parse(text).body[0].name  # type: ignore[attr-defined]

    def parse(self) -> ast.Module:
        return ast.parse(self.text)


def test_source_changes_with_the_code_alone() -> None:
    def of(body: str, inner: str, size: int) -> str:
        part = Jit(f"def part(x):\n    {inner}")
        text = f"def k(x):\n    part(x)\n    return {body} + SIZE"
        return aot.source(Jit(text, part=part, SIZE=SimpleNamespace(value=size)))

    first = of("x", "return x", 8)
    assert first == of("x", "return x", 8) == of("( x )", "return x  # as it is", 8)
    assert len({first, of("x * 2", "return x", 8), of("x", "return -x", 8),
                of("x", "return x", 16)}) == 4  # fmt: skip


@pytest.mark.parametrize(
    ("ptx", "found"),
    [
        ("add.f32 %f1, %f2;\n// ---- mma.py ----", "none"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1}", "mma"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}", "wgmma"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}", "tf32"),
        ("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {%f1}", "tf32"),
    ],
)
def test_instructions(ptx: str, found: str) -> None:
    assert aot.instructions(ptx) == found


def test_one_kernel_again_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aot, "RECORD", tmp_path / "aot.json")
    old = [dict.fromkeys(("dtype", "arch", "tile", "signature"), 0) | {"kernel": k, "n": 1}
           for k in ("a", "b")]  # fmt: skip
    aot.save(old, None)
    aot.save([old[1] | {"n": 2}], {"b"})
    assert [(e["kernel"], e["n"]) for e in json.loads(aot.RECORD.read_text())] == [
        ("a", 1), ("b", 2)
    ]  # fmt: skip


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="got TRITON_INTERPRET set; expected it unset"):
        aot.main([])


if __name__ == "__main__":
    print(json.dumps(report()))
