"""bench/gpu.py before there is a GPU: all of its logic, on the CPU and with tiny shapes.

Proved: it runs without fedsim, pydantic and rich; a part goes on behind an item that fails, kills
its process or hangs; what its operations count as work is what their kernels count; its table and
JSON line. About 40 seconds on one thread, most of it starting processes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedsim_kernels import grouped_lora, packed_attention
from fedsim_kernels.spec import Case
from tests.test_bench import BENCH, script

gpu: ModuleType = script("gpu")

# The packages of this environment that a machine with torch, triton, transformers and peft may
# lack, fedsim itself included.
LACKING = """
import sys
from importlib.machinery import PathFinder
ABSENT = {"fedsim", "fedsim_kernels", "pydantic", "rich", "datasets", "gguf", "matplotlib"}
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        lacking = name.partition(".")[0] in ABSENT and path is None
        return None if lacking else PathFinder.find_spec(name, path, target)
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", "")]
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
sys.path[:] = [p for p in sys.path if "__editable__" not in p]
"""


@pytest.fixture
def lacking(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python lacks them."""
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    return os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}


def test_needs_nothing_but_the_checkout(lacking: dict[str, str], tmp_path: Path) -> None:
    probe = "import importlib.util as u; print([u.find_spec(n) for n in ('fedsim', 'pydantic')])"
    seen = subprocess.run([sys.executable, "-P", "-c", probe], env=lacking, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert seen.stdout.strip() == "[None, None]", seen.stderr
    parts = ["cases float16", "smollm2", "ops"]
    command = [sys.executable, str(BENCH / "gpu.py"), "--device", "cpu", "--tiny", "--seconds",
               "400", "--only", *parts]  # fmt: skip
    done = subprocess.run(command, env=lacking, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *table, last = done.stdout.splitlines()
    found = json.loads(last)
    assert found["failures"] == 0 and found["device"] == "cpu"
    cases = found["cases"]["float16"]
    assert cases["right"] == cases["of"] == 21  # 7 kernels x 3 cases: two have fp32 rows only
    assert set(found["rounds"]) == {"smollm2 round small", "smollm2 round large"}
    for speed in found["rounds"].values():
        assert set(speed) == {"tokens_per_second", "vs_b1", "vs_b0"} and min(speed.values()) > 0
    operations = {name.split()[1] for name in found["ops"]}
    every = {
        name for kernel in script("gpu_cases").kernels().values() for name in kernel.operations
    }
    assert operations >= every
    text = "\n".join(table)
    for word in ("equality", "busy", "of the", "cases, worst", "vs_b0", "waits 0"):
        assert word in text


# Its torch is a stand-in, for the sake of time: what a part needs of it, and a device to lose.
FAKE = """
import importlib.util, os, sys, time
from types import SimpleNamespace
class Tensor:
    def add_(self, n): return self
    def cpu(self): return self
torch = sys.modules["torch"] = SimpleNamespace(device=str, empty=lambda *_, **__: Tensor())
spec = importlib.util.spec_from_file_location("gpu", {path!r})
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)
def items(part, device, tiny):
    if part == "broken":
        raise RuntimeError("no such library")
    def fail():
        raise ValueError("a\\nlong story")
    def lose():
        del torch.empty
        raise RuntimeError("illegal access")
    yield "fine", lambda: {{"value": 1, "loss": float("nan")}}
    yield "fails", fail
    yield "kills", lambda: os._exit(9)
    yield "loses", lose
    yield "after", lambda: {{"value": 2 if torch.empty(1) else 0}}
    yield "hangs", lambda: time.sleep(600)
    yield "never", lambda: {{}}
gpu.items = items
sys.exit(gpu.main())
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in the place of gpu.py, whose items do all that items can do."""
    path = tmp_path / "fake.py"
    path.write_text(FAKE.format(path=str(BENCH / "gpu.py")))
    monkeypatch.setattr(gpu, "__file__", str(path))
    monkeypatch.setattr(gpu, "GRACE", 0)
    return tmp_path


def test_a_part_outlives_its_items(fake: Path) -> None:
    began = time.time()
    found = gpu.run_part("any", began + 8, fake, ["--device", "cpu"])
    states = {name: record["state"] for name, record in found.items()}
    assert states == {
        "fine": "done", "fails": "failed", "loses": "failed", "kills": "failed", "after": "done",
        "hangs": "failed",
    }  # fmt: skip
    assert found["fine"]["value"] == 1 and found["fine"]["loss"] == "NaN"
    assert re.fullmatch(r"gpu.py:\d+ in work: ValueError: a long story", found["fails"]["why"])
    assert "the process ended" in found["kills"]["why"]
    assert "ran past its time" in found["hangs"]["why"]
    assert gpu.summarise({"any": found})["failures"] == 4
    assert len(list(gpu.rows({"any": found}))) == 6


def test_a_part_that_cannot_begin_says_why(fake: Path) -> None:
    found = gpu.run_part("broken", time.time() + 60, fake, ["--device", "cpu"])
    assert list(found) == ["broken"] and "no such library" in found["broken"]["why"]


def test_items_behind_the_time_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "items", lambda *_: [("late", lambda: {})])
    log = tmp_path / "log"
    log.touch()
    assert gpu.work("ops", log, time.time() - 1, "cpu", True) == 0
    assert json.loads(log.read_text()) == {"item": "late", "state": "left out"}


def test_wrong_cases_count_as_failures() -> None:
    """Of three cases one is wrong, one was not run: 1 of 3 is right, and the wrong one is named."""
    found = {
        "a x": {"item": "a x", "state": "done", "kernel": "a", "error": 0.5},
        "a y": {"item": "a y", "state": "done", "kernel": "a", "error": 1.5},
        "b x": {"item": "b x", "state": "left out"},
    }
    parts = {"cases float32": found}
    assert gpu.summarise(parts)["cases"] == {"float32": {"right": 1, "of": 3}}
    assert gpu.summarise(parts)["failures"] == 1
    assert ("cases float32", "a y", "WRONG: 1.5 of what is allowed") in list(gpu.rows(parts))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main([])


def test_work_is_what_the_kernels_count() -> None:
    """Forward and backward together, of a site of three modules and of grouped-query attention;
    P of SmolLM2 at rank 16: 30 x 16 x (2 x (576 + 576) + 2 x (576 + 192) + 3 x (576 + 1536))."""
    ops, cpu = script("gpu_ops"), torch.device("cpu")
    shape = ops.TINY
    n = shape.tokens // shape.sequence
    site = shape.sites["qkv"]
    case = Case(
        "as-timed", (shape.sequence,) * n, tuple(b * shape.clients // n for b in range(n)),
        ranks=(shape.rank,) * shape.clients, features=(site[0], sum(site[1])),
        widths=tuple(site[1]), heads=(shape.heads, shape.key_heads, shape.head),
    )  # fmt: skip
    for kernel, builds in (
        (grouped_lora, [ops.lora(shape, *site, way, cpu) for way in (False, True)]),
        (packed_attention, [ops.attention(shape, way, cpu) for way in (False, True)]),
    ):
        want = kernel.KERNEL.work(case, torch.bfloat16)[0]
        assert sum(flops for _, flops, _ in builds) == want
    assert ops.SHAPES["smollm2"].parameters == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112) == 4884480
