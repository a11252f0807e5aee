"""What do two processes of one thread give over one process of two threads, and what do they cost?

SmolLM2-135M-Instruct on FinGPT sentiment, 12 clients x batch 2, rank 32 on q_proj and v_proj: whole
rounds of `fedsim run`, plan to checkpoint, without evaluation; a round's seconds are those between
the lines that it and the one before it add to rounds.jsonl, the first being warm-up. The arms are
started in turn. First, both must have learnt the same: their last adapters may differ as packings
may, by 1e-3 of what was learnt.

`efficiency_2` is one process's seconds over those of two. Memory is proportional set size behind
the first round, where pages that processes share are divided among them; the base's size is that of
its weights in the computing dtype.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tomli_w

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import torch
from bench_clients import data_folder
from safetensors import safe_open
from safetensors.torch import load_file

from fedsim import weights
from fedsim.config import Config
from fedsim.core import pick_device
from fedsim.errors import FedSimError, RunError
from fedsim.pretrained import compute_dtype

CLIENTS, BATCH, STEPS = 12, 2, 2
FULL, QUICK = (6, 3), (4, 2)  # rounds, repeats
BOUND = 1e-3  # of what was learnt, in fast mode
MIB = 1 << 20


@dataclass(frozen=True)
class Seen:
    """Seconds of each round but the first, PSS in MiB by kind of page, and the last adapter."""

    rounds: tuple[float, ...]
    memory: dict[str, float]
    adapter: dict[str, torch.Tensor]


def write(folder: Path, model: str, data: Path, rounds: int) -> Path:
    """The run's file."""
    values = {
        "run": {"name": "run", "out": str(folder)}, "model": {"name": model},
        "adapter": {"rank": 32, "alpha": 64.0, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "directory", "dir": str(data)},
        "clients": {"number": CLIENTS},
        "server": {"fraction": 1.0, "rounds": rounds, "export_every": rounds},
        "train": {"batch": BATCH, "steps": STEPS, "slots": CLIENTS}, "evaluate": {"limit": 0},
    }  # fmt: skip
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps(values))
    return file


def family(process: int) -> list[int]:
    """A process and those that it has started."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *map(int, children)]


def memory(processes: list[int]) -> dict[str, float]:
    """PSS in MiB: of private pages, of mapped files, and all."""
    total = dict.fromkeys(("Pss", "Pss_Anon", "Pss_File"), 0.0)
    for process in processes:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0]) / 1024
    return total


def whole_run(model: str, data: Path, rounds: int, processes: int, threads: int) -> Seen:
    """Run once in its own folder. Raises RunError where it fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "fedsim", "run", str(write(folder, model, data, rounds))]
        started = subprocess.Popen(
            [*command, "--devices", str(processes)], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"},
        )  # fmt: skip
        lines, at, used = folder / "run" / "rounds.jsonl", [], dict[str, float]()
        while started.poll() is None:
            done = lines.read_text().count("\n") if lines.is_file() else 0
            at += [time.perf_counter()] * (done - len(at))
            if at and not used:
                members = family(started.pid)
                # With several, the first has only started them.
                used = memory(members[1:] if processes > 1 else members)
            time.sleep(0.005)
        assert started.stderr is not None
        if started.returncode or len(at) != rounds:
            raise RunError(f"{processes} processes: {started.stderr.read()[-500:]}")
        last = folder / "run" / "adapters" / f"round_{rounds:05d}" / "adapter_model.safetensors"
        seconds = tuple(b - a for a, b in pairwise(at))
        return Seen(seconds, used, load_file(last))


def apart(a: Seen, b: Seen) -> float:
    """||a - b|| / ||b|| of the products' factors B, which start at 0."""
    names = [n for n in a.adapter if "lora_B" in n]
    one, two = (torch.cat([s.adapter[n].flatten() for n in names]).double() for s in (a, b))
    return float((one - two).norm() / two.norm())


def main() -> None:
    given = harness.options(str(__doc__).partition("\n")[0]).parse_args()
    rounds, repeats = QUICK if given.quick else FULL
    arms = {"1 x 2": (1, 2), "2 x 1": (2, 1)}
    seen: dict[str, list[Seen]] = {name: [] for name in arms}
    try:
        data = data_folder(given.data)
        found = weights.find(given.model)
        for repeat in range(repeats):
            for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
                seen[name].append(whole_run(given.model, data, rounds, *arms[name]))
                harness.say(f"{repeat + 1}/{repeats} {name}: {seen[name][-1].rounds}")
        error = apart(seen["2 x 1"][0], seen["1 x 2"][0])
        if not error <= BOUND:
            raise RunError("adapters of one and two processes", got=error, expected=f"<= {BOUND}")
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    flat = {name: [s for run in runs for s in run.rounds] for name, runs in seen.items()}
    efficiency = harness.ratio(flat["1 x 2"], flat["2 x 1"])
    used = {name: runs[0].memory for name, runs in seen.items()}
    dtype = compute_dtype(Config(), pick_device("cpu"))
    files = [safe_open(file, "pt") for file in found.path.glob("*.safetensors")]
    numbers = sum(math.prod(f.get_slice(k).get_shape()) for f in files for k in f.offset_keys())
    base = numbers * dtype.itemsize / MIB
    extra = used["2 x 1"]["Pss"] - used["1 x 2"]["Pss"]
    result = {
        "machine": harness.machine(torch.device("cpu")), "seconds": flat, "memory_mib": used,
        "base_mib": base, "efficiency_2": efficiency, "apart": error,
    }  # fmt: skip
    harness.show(
        "whole rounds", ("processes x threads", "s a round", "PSS MiB", "private", "mapped"),
        [[name, f"{sorted(flat[name])[len(flat[name]) // 2]:.2f}",
          *(f"{used[name][k]:,.0f}" for k in ("Pss", "Pss_Anon", "Pss_File"))] for name in arms],
    )  # fmt: skip
    figures = {
        "efficiency_2": efficiency["median"], "extra_process_mb_over_base_mb": extra / base,
        "base_mb": base,
    }  # fmt: skip
    harness.finish("workers", result, figures, not given.quick or given.save)


if __name__ == "__main__":
    main()
