"""What do the kernels do on a real GPU? One table and one JSON line, in less than 8 minutes.

    python bench/gpu.py [--save] [--seconds 460]
    python bench/gpu.py --device cpu --tiny        the same on the CPU, to check this script

Needs this checkout, a GPU, torch >= 2.11, triton >= 3.6 (which asks for a C compiler), transformers
>= 5.16 and peft; no network, no model files, and fedsim need not be installed. Its parts, each in
processes of its own, those that tell most first:

    cases    every kernel case against float64 in bf16, fp32 and fp16, side by side (gpu_cases.py)
    smollm2  a whole round on a SmolLM2-shaped model against B0 and B1 (gpu_step.py)
    ops      the time of every operation and its share of what the card can do (gpu_ops.py)
    8b       a round on four layers of an 8 B model

A part that crashes is started again behind the item that did it; one that hangs is stopped when its
time is over. What failed is reported in a line, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("bfloat16", "float32", "float16")
# Parts that run side by side, and their share of the time; what they leave goes to the others.
STAGES = (
    (tuple(f"cases {dtype}" for dtype in DTYPES), 0.40),
    (("smollm2",), 0.25),
    (("ops",), 0.15),
    (("8b",), 0.20),
)
GRACE = 20  # seconds for an item under way when its part's time is over
Record = dict[str, Any]


def open_checkout() -> None:
    """Make this checkout importable as `fedsim` and `fedsim_kernels`, installed or not.

    It does not go on the path: there, kernels/ would shadow a package that transformers asks for.
    """
    sys.path.insert(0, str(ROOT / "bench"))
    if "fedsim" in sys.modules:
        return
    kernels = ModuleType("fedsim_kernels")
    kernels.__path__ = [str(ROOT / "kernels")]
    sys.modules["fedsim_kernels"] = kernels
    if importlib.util.find_spec("pydantic") is None:
        # The engine needs no more of fedsim.config than the names of types for its annotations.
        stand_in = ModuleType("fedsim.config")
        for name in ("Adapter", "Config", "Data", "Train"):
            setattr(stand_in, name, object)
        sys.modules["fedsim.config"] = stand_in
    folder = ROOT / "fedsim"
    spec = importlib.util.spec_from_file_location(
        "fedsim", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules["fedsim"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["fedsim"])


def items(part: str, device: Any, tiny: bool) -> Iterator[Any]:
    """(name, callable) of everything that a part does."""
    import torch

    if part.startswith("cases "):
        from gpu_cases import cases

        return cases(getattr(torch, part.removeprefix("cases ")), device, tiny)
    if part == "ops":
        from gpu_ops import ops

        return ops(device, tiny)
    from gpu_ops import SHAPES, TINY
    from gpu_step import Model

    model = Model("tiny", TINY, device) if tiny else Model(part, SHAPES[part], device)
    return model.items()


def one_line(failure: BaseException) -> str:
    """Where it was raised, its type and the beginning of its message."""
    frames = traceback.extract_tb(failure.__traceback__)
    own = [f for f in frames if str(ROOT) in f.filename and ".venv" not in f.filename] or frames
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"
    return f"{at}: {type(failure).__name__}: {' '.join(str(failure).split())}"[:300]


def work(part: str, log: Path, until: float, device_name: str, tiny: bool) -> int:
    """A part, in its own process: a line before and after each item. 3: the device is lost."""
    open_checkout()
    import torch

    device = torch.device(device_name)
    begun = {json.loads(line)["item"] for line in log.read_text(encoding="utf-8").splitlines()}
    with log.open("a", encoding="utf-8") as out:

        def tell(item: str, state: str, **more: Any) -> None:
            out.write(json.dumps({"item": item, "state": state, **more}) + "\n")
            out.flush()

        for name, run in items(part, device, tiny):
            if name in begun:
                continue
            if time.time() > until:
                tell(name, "left out")
                continue
            tell(name, "began")
            try:
                # What is not finite becomes a word: JSON has no number for it.
                result = json.loads(json.dumps(run()), parse_constant=str)
            except Exception as failure:  # whatever it is, the next item is worth trying
                tell(name, "failed", why=one_line(failure))
                try:  # an illegal access ends everything that this process could still do
                    torch.empty(1, device=device).add_(1).cpu()
                except Exception:
                    return 3
            else:
                tell(name, "done", **result)
    return 0


def run_part(part: str, until: float, folder: Path, options: Sequence[str]) -> dict[str, Record]:
    """Run a part to its end, in as many processes as it takes; its last word on each item."""
    log = folder / f"{part.replace(' ', '-')}.jsonl"
    log.touch()
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--part", part, "--log",
               str(log), "--until", str(until), *options]  # fmt: skip
    why = ""
    while True:
        known = log.read_text(encoding="utf-8")
        try:
            left = max(1.0, until + GRACE - time.time())
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=left
            )
            ended = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
            code = done.returncode
        except subprocess.TimeoutExpired:
            ended, code = "stopped: it ran past its time", 0
        found = {r["item"]: r for r in map(json.loads, log.read_text("utf-8").splitlines())}
        for record in found.values():
            if record["state"] == "began":
                record |= {"state": "failed", "why": f"the process ended: {ended}"}
                with log.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(record) + "\n")
        if code and log.read_text("utf-8") == known:
            why = f"the process could not begin: {ended}"
        if not code or why or time.time() > until:
            break
    if why or not found:
        found[part] = {"item": part, "state": "failed", "why": why or ended}
    print(f"{part}: {sum(r['state'] == 'done' for r in found.values())} of {len(found)} done",
          file=sys.stderr, flush=True)  # fmt: skip
    return found


def run(seconds: float, device: str, tiny: bool, only: Sequence[str]) -> dict[str, Any]:
    """Every part in turn, or those named; returns the whole record."""
    open_checkout()
    import harness
    import torch

    options = ["--device", device, *(["--tiny"] if tiny else [])]
    began, share, parts = time.time(), 1.0, {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(DTYPES)) as pool:
        for names, part in STAGES:
            now = time.time()
            until = now + (began + seconds - now - GRACE) * part / share
            share -= part
            jobs = {
                name: pool.submit(run_part, name, until, Path(folder), options)
                for name in names
                if not only or name in only
            }
            parts |= {name: job.result() for name, job in jobs.items()}
    machine = harness.machine(torch.device(device))
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        machine |= {"compute_capability": f"{card.major}.{card.minor}",
                    "memory_gib": card.total_memory / 2**30}  # fmt: skip
    return {"machine": machine, "seconds": time.time() - began, "parts": parts}


def summarise(parts: dict[str, dict[str, Record]]) -> dict[str, Any]:
    """What the JSON line says: counts of cases, shares of limits, speeds and ratios."""
    out: dict[str, Any] = {"cases": {}, "ops": {}, "rounds": {}, "failures": 0}
    for part, found in parts.items():
        done = {name: r for name, r in found.items() if r["state"] == "done"}
        wrong = [r for r in done.values() if "kernel" in r and r["error"] > 1]
        out["failures"] += len(wrong) + sum(r["state"] == "failed" for r in found.values())
        if part.startswith("cases "):
            out["cases"][part.removeprefix("cases ")] = {
                "right": len(done) - len(wrong), "of": len(found)
            }  # fmt: skip
        elif part == "ops":
            out["ops"] = {n: round(r["of_limit"], 3) for n, r in done.items() if "of_limit" in r}
        else:
            out["rounds"] |= {
                f"{part} {name}": {"tokens_per_second": round(r["tokens_per_second"], 1)}
                | {k: round(v["median"], 3) for k, v in r["ratios"].items()}
                for name, r in done.items() if "ratios" in r
            }  # fmt: skip
    return out


def speed(r: Record) -> str:
    """An operation's time, rates and share of its limit."""
    return (
        f"{r['ms']:.3f} ms {r['gb_per_second']:,.0f} GB/s {r['tflop_per_second']:,.1f} TFLOP/s, "
        f"{r['of_limit']:.0%} of the {r['bound']} limit, host {r['host_us']:.0f} us"
    )


def rows(parts: dict[str, dict[str, Record]]) -> Iterator[tuple[str, str, str]]:
    """The table: part, item, result."""
    for part, found in parts.items():
        for name, r in found.items():
            if r["state"] != "done":
                yield part, name, r["state"] + (f": {r['why']}" if "why" in r else "")
            elif "kernel" in r:
                if r["error"] > 1:
                    yield part, name, f"WRONG: {r['error']:.3g} of what is allowed"
            elif "ratios" in r:
                times = ", ".join(f"{k} {v['median']:.2f} ({v['low']:.2f} to {v['high']:.2f})"
                                  for k, v in r["ratios"].items())  # fmt: skip
                yield part, name, f"{r['tokens_per_second']:,.0f} tokens/s; {times}; b0: {r['b0']}"
            elif "of_limit" in r:
                yield part, name, speed(r)
            elif "most" in r:
                yield part, name, (f"busy {r['busy']:.0%}, {r['launches']} launches, "
                                   f"peak {r['peak_memory_mib']:,.0f} MiB")  # fmt: skip
                for key, share, count in r["most"]:
                    yield part, "", f"{share:6.1%} {count:5d} x {key}"
            else:
                yield part, name, ", ".join(
                    f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                    for k, v in r.items() if k not in ("item", "state")
                )  # fmt: skip
        if part.startswith("cases "):
            done = [r for r in found.values() if r["state"] == "done" and "kernel" in r]
            for kernel in sorted({r["kernel"] for r in done}):
                errors = [r["error"] for r in done if r["kernel"] == kernel]
                yield part, kernel, f"{len(errors)} cases, worst {max(errors):.3g} of the allowed"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; also of the parts' own processes. 1 where anything failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="few cases, tiny shapes")
    parser.add_argument("--save", action="store_true", help="write bench/results/gpu.json")
    parser.add_argument("--seconds", type=float, default=460, help="for everything")
    parser.add_argument("--only", nargs="+", default=[], help="parts, e.g. 'cases bfloat16' ops")
    for name in ("--part", "--log", "--until"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.part:
        return work(given.part, Path(given.log), float(given.until), given.device, given.tiny)
    import torch

    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch sees no GPU here. `--device cpu --tiny` checks this script without one.")
    os.environ["PYTHONSAFEPATH"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    result = run(given.seconds, given.device, given.tiny, given.only)
    table = list(rows(result["parts"]))
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    print(f"{result['machine']['device']}, {result['seconds']:.0f} s")
    for part, name, text in table:
        print(f"{part:<{widths[0]}}  {name:<{widths[1]}}  {text}")
    summary = {"device": result["machine"]["device"], **summarise(result["parts"])}
    import harness

    harness.finish("gpu", result, summary, given.save)
    return min(1, summary["failures"])


if __name__ == "__main__":
    sys.exit(main())
