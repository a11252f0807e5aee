"""How many real tokens per second does a whole local round train, against stock PEFT?

SmolLM2-135M-Instruct on FinGPT sentiment, rank 32 on q_proj and v_proj, alpha 64, AdamW, 10 local
steps; `flowertune` is 5 clients x batch 16, `small_batch` 16 clients x batch 2. Arms:

    engine                clients packed together, nothing shared between sequences
    engine_shared_prefix  the same, each client's common prompt prefix computed once a step
    b1                    this engine, one client per pass, no shared prefix
    b0                    stock transformers and PEFT, one client after another, batches padded to
                          their longest, no checkpointing; in the fastest of {sdpa, eager} x {bf16,
                          fp32}, found by timing one `flowertune` step of each in the same run
    b0_default            the same as `from_pretrained` sets it: sdpa, the checkpoint's dtype, bf16

Where the processor has no bf16 products every arm is fp32.

All train the same examples from the same row. Timed is everything from that row to the trained
adapters: optimiser state, resets, packing or padding, all steps; models are loaded and texts
tokenised before. Tokens are real ones, without padding. First, engine and stock must give equal
fp32 losses. `vs_x` is x's seconds over the engine's (or engine_shared_prefix's), paired within
the run; `vs_b1` is what packing clients together gains. --quick takes 2 steps and 2 repeats,
b0_default for the first client only, once, its seconds scaled by tokens; the full run 3 repeats
and one more row with LoRA dropout.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import numpy as np
import torch
from harness import Arm, Timed
from stock import Stock, Trained
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import pretrained, seeds
from fedsim.adapters import initial_row
from fedsim.config import Config, build
from fedsim.core import LocalRule, RoundPlan, pick_device
from fedsim.data import partition
from fedsim.errors import DataError, FedSimError, ModelError, RunError
from fedsim.plan import plan_round, step_examples
from fedsim.record import Meter, peak_memory_mib
from fedsim.train import Trainer
from fedsim.world import World, describe, load_world

Setting = tuple[int, int, float]
SETTINGS: dict[str, Setting] = {  # clients, batch, dropout; --quick leaves the last one out
    "flowertune": (5, 16, 0.0), "small_batch": (16, 2, 0.0), "flowertune_dropout": (5, 16, 0.075)
}  # fmt: skip
FULL, QUICK = (10, 3), (2, 2)  # local steps, repeats
BASELINES = ("b0", "b0_default", "b1")
TOLERANCE = 1e-4  # relative, of fp32 losses
FILE = "finance/fingpt_sentiment.train.jsonl.gz"


def data_folder(given: str | None) -> Path:
    """`--data`, else FEDSIM_DATA, else ../shared/data. Raises DataError."""
    path = Path(given or os.environ.get("FEDSIM_DATA") or harness.ROOT.parent / "shared" / "data")
    if not (path / FILE).is_file():
        remedy = "Pass --data DIR or set FEDSIM_DATA."
        raise DataError("data folder", got=str(path), expected=f"{FILE} in it", remedy=remedy)
    return path


def configure(model: str, data: Path, steps: int, setting: Setting, dtype: str = "auto") -> Config:
    """One setting: every client of the population trains, all of them in one pass."""
    clients, batch, dropout = setting
    return build({
        "model": {"name": model, "dtype": dtype},
        "adapter": {"rank": 32, "alpha": 64.0, "dropout": dropout, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "directory", "dir": str(data), "max_length": 512},
        "clients": {"number": clients}, "server": {"fraction": 1.0},
        "train": {"steps": steps, "batch": batch, "slots": clients, "shared_prefix": False},
        "evaluate": {"tasks": ["fpb"], "limit": 1},  # not used
    }, "bench_clients")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One round of local training, the same for every arm."""

    config: Config
    world: World
    plan: RoundPlan
    start: Tensor  # (P,) fp32
    batches: list[list[np.ndarray]]  # the examples of each client's steps

    @classmethod
    def build(cls, config: Config, world: World) -> Work:
        """Round 1 of this configuration, whose clients may be others than the world's."""
        key = seeds.run_key(config.run.seed)
        clients = partition.build(config, len(world.data.store))
        plan = plan_round(config, clients, 1, key)
        batches = [
            [step_examples(config, clients.of(c), key, c, 1, s) for s in range(n)]
            for c, n in zip(plan.client_ids.tolist(), plan.steps.tolist())
        ]
        start = initial_row(world.base.layout, key).to(world.base.device)
        data = replace(world.data, population=clients)
        return cls(config, replace(world, data=data), plan, start, batches)

    def train(self, **values: Any) -> Work:
        """The same round with other values in the configuration's section `train`."""
        section = self.config.train.model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={"train": section}))

    def first(self) -> Work:
        """All steps of the first client alone."""
        return replace(self, plan=replace(self.plan, lanes=(np.arange(1),)))

    def short(self) -> Work:
        """One step of the first client."""
        steps, lanes = np.ones_like(self.plan.steps), (np.arange(1),)
        return replace(self, plan=replace(self.plan, steps=steps, lanes=lanes))


def engine_round(work: Work) -> Trained:
    """The round in this engine, with the work's own slots and shared prefix."""
    world, key = work.world, seeds.run_key(work.config.run.seed)
    trainer = Trainer(world.base, world.data.store, world.data.population, work.config, key)
    done = list(trainer.train(work.plan, LocalRule(work.start), Meter()))
    if not all(update.ok.all() for update in done):
        raise RunError("the engine met a loss that is not finite")
    losses = np.concatenate([np.stack([u.loss_first, u.loss_last], 1) for u in done])
    return sum(int(u.tokens.sum()) for u in done), losses


def open_stock(work: Work, **setting: Any) -> Stock:
    """B0 on a second copy of the work's model."""
    base = AutoModelForCausalLM.from_pretrained(work.world.found.path, **setting)
    return Stock(base.to(work.start.device), work.world.base.layout, work.config.adapter)


def stock_round(stock: Stock, work: Work) -> Trained:
    """The work's round under stock PEFT."""
    plan = work.plan
    visits = [
        (float(plan.lr[i]), work.batches[i][: plan.steps[i]]) for i in np.concatenate(plan.lanes)
    ]
    return stock.round(work.start, visits, work.world.data.store, work.config.train)


def check_equal(work: Work, stock: Stock) -> float:
    """Largest relative difference of a client's first or last loss between engine, with and
    without the shared prefix, and stock, both in fp32. Raises ModelError above TOLERANCE.

    B starts from noise: with B = 0 a wrong scale would not show in the first loss.
    """
    layout, row = work.world.base.layout, work.start.cpu()[None].clone()
    noise = torch.Generator().manual_seed(0)
    for _, b in layout.factors(row).values():
        b.normal_(std=0.02, generator=noise)
    work = replace(work, start=row[0].to(work.start.device))
    want = stock_round(stock, work)[1]
    got = [engine_round(work.train(shared_prefix=shared))[1] for shared in (False, True)]
    error = max(float(np.abs(losses / want - 1).max()) for losses in got)
    if not error <= TOLERANCE:
        raise ModelError("|engine / stock - 1| of losses", got=error, expected=f"<= {TOLERANCE}")
    return error


def arm(train: Callable[[Work], Trained], work: Work, repeats: int | None = None) -> Arm:
    """An arm that warms up on one step of one client."""
    return Arm(lambda: train(work), lambda: train(work.short()), repeats)


def dtypes() -> tuple[torch.dtype, ...]:
    """What stock runs in: bf16 only where the processor has it. On two AVX2 cores one bf16 step
    of the `flowertune` setting had not ended after seven minutes."""
    fast = pretrained.compute_dtype(Config(), pick_device("auto"))
    return tuple(dict.fromkeys((fast, torch.float32)))


def probe(work: Work) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of one stock step, after one to warm up, in every setting; and the fastest."""
    spent: dict[str, float] = {}
    for attention, dtype in product(("sdpa", "eager"), dtypes()):
        asked = {"attn_implementation": attention, "dtype": dtype}
        stock = open_stock(work, **asked)
        one = {stock.setting: arm(partial(stock_round, stock), work.short())}
        spent[stock.setting] = harness.time_arms(one, 1, "probe")[stock.setting].median
        if spent[stock.setting] == min(spent.values()):
            fastest = asked
    return spent, fastest


def measure(name: str, work: Work, fastest: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Time the arms of one setting. Raises RunError if their tokens differ."""
    stock, default = open_stock(work, **fastest), open_stock(work, dtype=dtypes()[0])
    train, dropout = work.config.train, work.config.adapter.dropout
    arms = {"engine": arm(engine_round, work), "b0": arm(partial(stock_round, stock), work)}
    arms["b1"] = arm(engine_round, work.train(slots=1))
    if not dropout:
        arms["engine_shared_prefix"] = arm(engine_round, work.train(shared_prefix=True))
        if default.setting != stock.setting:
            part = work.first() if quick else work
            arms["b0_default"] = arm(partial(stock_round, default), part, 1 if quick else None)
    timed = harness.time_arms(arms, (QUICK if quick else FULL)[1], name)
    if not dropout:  # where the default is the fastest, it was timed as b0
        timed.setdefault("b0_default", timed["b0"])
    lengths = [work.world.data.store.lengths[b] for steps in work.batches for b in steps]
    tokens = sum(int(n.sum()) for n in lengths)
    if quick and "b0_default" in arms:  # one client's seconds, as if all were as fast
        one = timed["b0_default"]
        scaled = tuple(s * tokens / one.value[0] for s in one.seconds)
        timed["b0_default"] = Timed(scaled, (tokens, one.value[1]))
    if any(t.value[0] != tokens for t in timed.values()):
        raise RunError(f"{name}: the arms trained different numbers of tokens")
    return {
        "clients": len(work.plan), "batch": train.batch, "steps": train.steps, "dropout": dropout,
        "tokens": tokens, "padded_tokens": sum(len(n) * int(n.max()) for n in lengths),
        "b0": stock.setting, "b0_default": default.setting,
        "arms": {k: {"seconds": t.seconds, "tokens_per_second": tokens / t.median,
                     "loss_first": t.value[1][:, 0].mean(), "loss_last": t.value[1][:, 1].mean()}
                 for k, t in timed.items()},
        "ratios": {k: {f"vs_{b}": harness.ratio(timed[b].seconds, timed[k].seconds)
                       for b in BASELINES if b in timed}
                   for k in ("engine", "engine_shared_prefix") if k in timed},
    }  # fmt: skip


def run(model: str, data: Path, quick: bool) -> dict[str, Any]:
    """Check, probe, then time every setting; returns the whole record."""
    config = configure(model, data, 2, (2, 4, 0.0), "float32")
    work = Work.build(config, load_world(config, seeds.run_key(config.run.seed)))
    error = check_equal(work, open_stock(work, attn_implementation="sdpa", dtype=torch.float32))
    del work  # and its copy of the base
    config = configure(model, data, (QUICK if quick else FULL)[0], SETTINGS["flowertune"])
    world = load_world(config, seeds.run_key(config.run.seed))
    works = {
        name: Work.build(configure(model, data, config.train.steps, setting), world)
        for name, setting in SETTINGS.items()
        if not (quick and setting[2])
    }
    spent, fastest = probe(works["flowertune"])
    rows = {name: measure(name, work, fastest, quick) for name, work in works.items()}
    return {
        "quick": quick, "machine": harness.machine(world.base.device) | describe(config, world),
        "engine_dtype": world.base.precision, "probe_seconds": spent,
        "equality": {"relative_difference": error, "tolerance": TOLERANCE}, "settings": rows,
        "peak_memory_mib": peak_memory_mib(world.base.device),
    }  # fmt: skip


def report(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Print the table; returns the median ratios, a row of its own for the shared prefix."""
    rows, summary = [], {}
    for name, setting in result["settings"].items():
        for arm, figures in setting["arms"].items():
            ratios = setting["ratios"].get(arm, {})
            texts = [harness.spread(ratios.get(f"vs_{b}")) for b in BASELINES]
            rows.append([name, arm, f"{figures['tokens_per_second']:.0f}", *texts])
            if ratios:
                medians = {k: round(r["median"], 3) for k, r in ratios.items()}
                summary[name + arm.removeprefix("engine")] = medians
    columns = ("setting", "arm", "tokens/s", *(f"vs {b}" for b in BASELINES))
    harness.show("A local round", columns, rows)
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    given = harness.options(str(__doc__).partition("\n")[0]).parse_args(argv)
    torch.set_num_threads(given.threads)
    try:
        result = run(given.model, data_folder(given.data), given.quick)
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    harness.finish("clients", result, report(result), given.save or not given.quick)


if __name__ == "__main__":
    main()
