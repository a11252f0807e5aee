"""What does a step of the engine cost beyond the base model's own products?

SmolLM2-135M-Instruct, rank 16 on every linear, embedded finance examples (about 72 tokens, 2 of
them labels), no shared prefixes, budget 2048 unless said; every arm in the dtype that the table
names: bf16 where the processor has instructions for it, else fp32. Losses are compared before
anything is timed. Figures of single operations are described in bench_ops.py; the others are

    vs_b1_small, vs_b1_large  a round of 16 clients with <= 256 tokens a step, of 3 with >= 2,000,
                              packed, against one client per pass (whole steps in one pass, too)
    base_share  seconds in products with frozen weights, head included, over those of a whole
                profiled step (8 clients in one pass, packing to AdamW)
    base_rate   FLOP/s of these products over that of one F.linear, 2048 x 576 -> 3072
    multi_lora_over_frozen  forward + backward of 16 clients in one pass over the same without
                adapters but for rank 1 on the first linear of the first layer, so that dX flows
                through all layers
    k32_over_k1  a step of 32 clients over a step of one client on the same examples
    memory_per_client  growth of the peak resident set from 8 to 24 clients on the same examples,
                per client, over 18 bytes x P
    strict_over_fast  throughput of a round of 5 clients x batch 16
    beside_busy  throughput of the same round beside one process that keeps a core busy, of that
                 alone
    start_seconds  a fresh process from its start to the end of its first step, everything cached
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import bench_ops
import bench_step
import harness
import psutil
import torch
from bench_clients import Work, engine_round
from bench_ops import TOLERANCE, must_agree
from bench_step import KEY, Step, configure
from harness import Arm, Figure

from fedsim.errors import FedSimError, RunError
from fedsim.world import World, describe, load_world

SMALL, LARGE = 256, 2000  # tokens of a client's step
QUICK, FULL = (5, 3), (15, 7)  # repeats of what takes little and of what takes long
# name -> (title, target, stretch, whether more is better), as the README's table has them
FIGURES: dict[str, tuple[str, float, float, bool]] = {
    "vs_b1_small": ("round, <= 256 tokens a client step, x B1", 1.3, 1.6, True),
    "vs_b1_large": ("round, >= 2,000 tokens a client step, x B1", 1.0, 1.05, True),
    "base_share": ("share of a step in base products", 0.6, 0.75, True),
    "base_rate": ("their rate over a plain large `F.linear`", 0.8, 0.95, True),
    "multi_lora_over_frozen": ("multi-LoRA / frozen base, forward + dX, K = 16", 1.2, 1.1, False),
    "k32_over_k1": ("step at K = 32 / K = 1, same tokens", 1.05, 1.02, False),
    "lora_vs_loop": ("grouped LoRA, x a loop over adapters, K = 32", 3, 10, True),
    "adamw_vs_foreach": ("AdamW + clip, x torch's foreach, K = 32", 5, 15, True),
    "reduce_over_copy": ("weighted sum of rows / copy bandwidth", 0.8, 0.9, True),
    "memory_per_client": ("memory per extra client / (18 bytes x P)", 1.15, 1.05, False),
    "utilisation": ("rows / budget, log-normal clients", 0.92, 0.97, True),
    "strict_over_fast": ("strict / fast throughput", 0.8, 0.9, True),
    "beside_busy": ("beside one busy process / alone", 0.45, 0.5, True),
    "start_seconds": ("start of the process to first step, seconds", 10, 5, False),
}


def rounds(what: str, work: Work, other: Work, repeats: int) -> Figure:
    """Seconds of the other way to train the same round over the work's own."""
    got, want = (torch.as_tensor(engine_round(w)[1]) for w in (work, other))
    must_agree(f"{what}: losses", got, want, TOLERANCE[work.world.base.dtype])
    arms = {n: Arm(partial(engine_round, w)) for n, w in (("engine", work), ("other", other))}
    timed = harness.time_arms(arms, repeats, what)
    tokens = [int(work.world.data.store.lengths[b].sum()) for steps in work.batches for b in steps]
    return harness.figure(
        harness.ratio(timed["other"].seconds, timed["engine"].seconds), clients=len(work.plan),
        tokens_per_step=[min(tokens), max(tokens)],
        tokens_per_second=sum(tokens) / timed["engine"].median,
    )  # fmt: skip


def vs_b1(world: World, name: str, clients: int, batch: int, repeats: int) -> Figure:
    """Packed over one client per pass. Raises RunError where steps are not of the named size."""
    work = Work.build(configure("", clients, batch), world)
    longest = max(int(world.data.store.lengths[b].sum()) for steps in work.batches for b in steps)
    # A pass that ends just before its client's step does would be a handicap of the budget's.
    alone = work.train(slots=1, budget_tokens=max(2048, longest))
    found = rounds(name, work, alone, repeats)
    low, high = found["tokens_per_step"]
    if not (high <= SMALL if name == "vs_b1_small" else low >= LARGE):
        raise RunError(f"{name}: got steps of {low} to {high} tokens")
    return found


def beside_busy(work: Work, repeats: int) -> Figure:
    """Seconds of a round alone over those beside a process that never waits."""

    def beside() -> None:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            engine_round(work)
        finally:
            busy.kill()
            busy.wait()

    arms = {"alone": Arm(partial(engine_round, work)), "beside": Arm(beside)}
    timed = harness.time_arms(arms, repeats, "beside_busy")
    return harness.figure(
        harness.ratio(timed["alone"].seconds, timed["beside"].seconds),
        waiting=os.environ.get("OMP_WAIT_POLICY"),
    )


def peak_growth(world: World, clients: int, batch: int) -> int:
    """Bytes by which the resident set grows, at most, while a step is made ready and run."""
    process, done = psutil.Process(), threading.Event()
    world.base.rest()  # a site keeps its last pass, and with it the rows of the last step
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # freed memory that glibc keeps would hide growth
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        Step(world, clients, batch).run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def memory_per_client(world: World, repeats: int) -> Figure:
    """Slope over the slots, in units of fp32 row, gradient and two moments and a bf16 copy."""
    unit, slopes = 18 * world.base.layout.size, []
    peak_growth(world, 8, 3)  # what a first step leaves behind, libraries' buffers above all
    for _ in range(repeats):
        few, many = peak_growth(world, 8, 3), peak_growth(world, 24, 1)
        slopes.append((many - few) / 16 / unit)
    return harness.figure(harness.summary(slopes), unit_mib=unit / 2**20)


_FIRST_STEP = """
import json, sys, time
from fedsim import seeds
from fedsim.adapters import AdapterBank, initial_row
from fedsim.config import build
from fedsim.core import LocalRule
from fedsim.plan import plan_round
from fedsim.record import Meter
from fedsim.train import Trainer
from fedsim.world import load_world
import torch
torch.set_num_threads(int(sys.argv[2]))
config = build(json.loads(sys.argv[1]), "bench_engine")
key = seeds.run_key(config.run.seed)
world = load_world(config, key)
trainer = Trainer(world.base, world.data.store, world.data.population, config, key)
rule = LocalRule(initial_row(world.base.layout, key))
plan = plan_round(config, world.data.population, 1, key)
assert all(update.ok.all() for update in trainer.train(plan, rule, Meter()))
print(time.time())
"""


def start_seconds(name: str, repeats: int) -> Figure:
    """Interpreter, imports, model, tokens, and one pass of four clients x batch 4."""
    values = configure(name, 4, 4).model_dump(mode="json", exclude_none=True)
    command = [sys.executable, "-P", "-c", _FIRST_STEP, json.dumps(values),
               str(torch.get_num_threads())]  # fmt: skip
    spent = []
    for _ in range(repeats + 1):  # the first one fills the caches
        began = time.time()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"the first step failed: {done.stderr.splitlines()[-1]}")
        spent.append(float(done.stdout.split()[-1]) - began)
    return harness.figure(harness.summary(spent[1:]), first=spent[0])


def run(name: str, quick: bool) -> dict[str, Any]:
    """Every figure, the cheapest to spoil first; returns the whole record."""
    n, few = QUICK if quick else FULL
    config = configure(name, 4, 4)
    world = load_world(config, KEY)
    base = world.base
    figures = {
        "start_seconds": start_seconds(name, few),
        "memory_per_client": memory_per_client(world, few),
        "vs_b1_small": vs_b1(world, "vs_b1_small", 16, 3, few),
        "vs_b1_large": vs_b1(world, "vs_b1_large", 3, 32, few),
        **bench_step.base_products(world, few),
        "multi_lora_over_frozen": bench_step.multi_lora_over_frozen(world, name, n),
        "k32_over_k1": bench_step.k32_over_k1(world, few),
        "lora_vs_loop": bench_ops.lora_vs_loop(base, n),
        "adamw_vs_foreach": bench_ops.adamw_vs_foreach(base, few),
        "reduce_over_copy": bench_ops.reduce_over_copy(base, n),
        "utilisation": bench_ops.utilisation(few),
    }
    fast = Work.build(configure(name, 5, 16), world)
    strict = fast.train(mode="strict")
    figures["strict_over_fast"] = rounds("strict_over_fast", strict, fast, few)
    figures["beside_busy"] = beside_busy(fast, few)
    for key, (title, target, stretch, more) in FIGURES.items():
        figures[key] |= {"title": title, "target": target, "stretch": stretch, "more": more}
    return {
        "quick": quick, "machine": harness.machine(base.device) | describe(config, world),
        "dtype": base.precision, "figures": {key: figures[key] for key in FIGURES},
    }  # fmt: skip


def report(result: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns the values."""
    rows = [
        [key, f["title"], f"{f['value']:.3g}", f"{f['low']:.3g} to {f['high']:.3g}", str(f["n"]),
         f"{f['target']:g}", f"{f['stretch']:g}"] for key, f in result["figures"].items()
    ]  # fmt: skip
    columns = ("figure", "what", "value", "range", "n", "target", "stretch")
    harness.show(f"The engine, all arms in {result['dtype']}", columns, rows)
    return {key: round(f["value"], 4) for key, f in result["figures"].items()}


def main(argv: Sequence[str] | None = None) -> None:
    given = harness.options(str(__doc__).partition("\n")[0]).parse_args(argv)
    torch.set_num_threads(given.threads)
    try:
        result = run(given.model, given.quick)
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    harness.finish("engine", result, report(result), given.save or not given.quick)


if __name__ == "__main__":
    main()
