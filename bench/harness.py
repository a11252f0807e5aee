"""What every bench shares: the machine, interleaved timing, paired ratios and one JSON line.

Every repeat runs all arms in turn, and every second repeat runs them backwards, so that a slow
minute of the machine falls on all of them. A ratio pairs the i-th repeat of both arms of one run;
its median and range are over these pairs. Seconds of different runs are never compared.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As fedsim sets it; here, because benches import torch first, after this file.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch

from fedsim.record import surroundings

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
Figure = dict[str, Any]  # value, low, high, n and whatever explains them
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Arm:
    """One contestant: `warm_up` runs once, untimed; `run` is timed in the first `repeats`.

    One that a check of its results has just run needs no other warming up.
    """

    run: Callable[[], Any]
    warm_up: Callable[[], object] = lambda: None
    repeats: int | None = None  # None: in all of them


@dataclass(frozen=True)
class Timed:
    """Seconds of an arm's repeats, in order, and what its last one returned."""

    seconds: tuple[float, ...]
    value: Any

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def options(description: str) -> argparse.ArgumentParser:
    """The options that all benches have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="at most 8 minutes; writes nothing")
    parser.add_argument("--save", action="store_true", help="write the results of --quick too")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="alias or folder")
    parser.add_argument("--data", help="data folder (default: FEDSIM_DATA, else ../shared/data)")
    return parser


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, device, threads, versions and commit: what the figures of a run depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    cpu = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    changed = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return surroundings(device) | {
        "cpu": cpu.get("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in cpu.get("flags", "").split()],
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def time_arms(arms: Mapping[str, Arm], repeats: int, label: str = "") -> dict[str, Timed]:
    """Warm every arm up, then time all of them, repeat by repeat."""
    for arm in arms.values():
        arm.warm_up()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    values: dict[str, Any] = {}
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            limit = arms[name].repeats
            if limit is not None and repeat >= limit:
                continue
            gc.collect()  # one arm's garbage is not another's time
            began = time.perf_counter()
            values[name] = arms[name].run()
            seconds[name].append(time.perf_counter() - began)
            say(f"{label} {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.3g} s")
    return {name: Timed(tuple(seconds[name]), values[name]) for name in arms}


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Median seconds of a short operation, after one to warm up."""
    run()
    spent = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def ratio(slow: Sequence[float], fast: Sequence[float], factor: float = 1) -> dict[str, float]:
    """How many times faster, times the factor, from paired repeats: see `summary`.

    By hand: (6, 8, 10) over (2, 4, 5) are 3, 2, 2: median 2 in 2 to 3. An arm with fewer repeats
    is paired as far as it goes.
    """
    return summary([factor * s / f for s, f in zip(slow, fast)])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest, highest, and how many there are."""
    return {
        "median": statistics.median(values), "low": min(values), "high": max(values),
        "n": len(values),
    }  # fmt: skip


def figure(found: Mapping[str, float], **more: Any) -> Figure:
    """A summary as a figure of a table, its median called `value`, with what belongs to it."""
    return {"value": found["median"], "low": found["low"], "high": found["high"],
            "n": found["n"], **more}  # fmt: skip


def spread(found: Mapping[str, float] | None) -> str:
    """A ratio as text, median and range; empty for None."""
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})" if found else ""


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; all columns but the first two are figures."""
    from rich.console import Console  # bench/gpu.py runs where rich is not installed
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


def finish(name: str, result: Mapping[str, Any], summary: Mapping[str, Any], save: bool) -> None:
    """Write bench/results/<name>.json when asked to; print the summary as the last line."""
    if save:
        RESULTS.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**result, "summary": summary}, indent=2, allow_nan=False)
        (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(summary, allow_nan=False), flush=True)
