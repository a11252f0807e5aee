"""How much does a single step cost, and where does its time go? Figures of bench_engine.py, which
describes them: base_share, base_rate, multi_lora_over_frozen, k32_over_k1.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import harness
import numpy as np
import torch
import torch.nn.functional as F
from bench_ops import TOLERANCE, must_agree
from harness import Arm, Figure
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fedsim import model, seeds
from fedsim.adapters import initial_row
from fedsim.config import Config, build
from fedsim.core import Population, RoundPlan
from fedsim.model import Base
from fedsim.packing import passes
from fedsim.train import Trainer
from fedsim.world import World

KEY = seeds.run_key(42)
PLAIN = (2048, 576, 3072)  # rows, in and out features of the product that base_rate compares with


def configure(name: str, clients: int, batch: int, **train: Any) -> Config:
    """One local step of every client, all of them in slots of their own."""
    return build({
        "model": {"name": name}, "adapter": {"rank": 16, "alpha": 32.0, "targets": ["all-linear"]},
        "data": {"source": "embedded"}, "clients": {"number": clients}, "server": {"fraction": 1.0},
        "train": {"steps": 1, "batch": batch, "slots": clients, "shared_prefix": False, **train},
        "evaluate": {"limit": 1},
    }, "bench_engine")  # fmt: skip


class Step:
    """One optimiser step of some clients: their passes, then AdamW for all of them at once."""

    def __init__(
        self, world: World, clients: int, batch: int, base: Base | None = None, **train: Any
    ) -> None:
        """Client c has the examples from c `batch` on; `base` in place of the world's."""
        config = configure("", clients, batch, **train)
        self.base, self.store = base or world.base, world.data.store
        owned = Population(np.arange(clients + 1) * batch, np.arange(clients * batch))
        self.trainer = Trainer(self.base, self.store, owned, config, KEY)
        ones = np.ones(clients, dtype=np.int64)
        self.plan = RoundPlan(
            round=1, client_ids=np.arange(clients), weights=1.0 * ones, rank=16 * ones,
            scale=2.0 * ones, steps=ones, lr=5e-5 * ones, version=0 * ones,
            lanes=(np.arange(clients),), population=clients,
        )  # fmt: skip
        if base:
            self.plan = replace(self.plan, rank=base.layout.rank * ones)
        self.work = list(
            passes(config, self.store, owned, self.plan, self.plan.lanes[0],
                   self.trainer.bank.slots, self.trainer.budget, KEY)
        )  # fmt: skip
        self.who = {slot: at for shift, _ in self.work for slot, at in shift.enter}
        for slot in self.who:
            self.trainer.bank.load(slot, initial_row(self.base.layout, KEY))
        self.tokens = sum(shift.rows for shift, _ in self.work)
        self.labels = np.array([  # of each slot
            sum(1 / step.weights[0] for _, parts in self.work for part, step in parts
                if part.slot == slot and part.completes) for slot in range(clients)
        ])  # fmt: skip

    def gradients(self) -> Tensor:
        """Forward and backward; the slots' losses (K,)."""
        losses = [self.trainer.gradients(self.plan, self.who, parts)[0] for _, parts in self.work]
        return torch.stack(losses).sum(0)

    def run(self) -> None:
        """The whole step."""
        self.gradients()
        k, train = self.trainer.bank.slots, self.trainer.config.train
        self.trainer.bank.step(
            lr=torch.full((k,), train.lr_max), step=torch.ones(k), eps=train.eps,
            active=torch.ones(k, dtype=torch.bool), betas=(train.beta1, train.beta2),
            weight_decay=train.weight_decay, max_norm=train.clip_norm,
        )  # fmt: skip

    def loss(self) -> Tensor:
        """Mean over all label tokens, whoever has them: (1,)."""
        return (self.gradients() @ torch.as_tensor(self.labels) / self.labels.sum())[None]


def base_products(world: World, repeats: int) -> dict[str, Figure]:
    """base_share and base_rate, from the same profiled steps."""
    step, base = Step(world, 8, 4, budget_tokens=4096), world.base
    weights = {tuple(w.shape) for w in (base.head, *(site.weight for site in base.sites))}
    weights |= {shape[::-1] for shape in weights}
    x, w = (torch.randn(n, PLAIN[1]).to(base.dtype) for n in (PLAIN[0], PLAIN[2]))
    step.run()
    flops_of_plain = 2 * math.prod(PLAIN)
    shares, rates, flops = [], [], 0
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            began = time.perf_counter()
            step.run()
            wall = time.perf_counter() - began
        spent, flops = 0.0, 0
        for event in seen.events():
            shapes = event.input_shapes[-2:] if event.name == "aten::addmm" else event.input_shapes
            if event.name in ("aten::mm", "aten::addmm") and tuple(shapes[1]) in weights:
                spent += event.self_cpu_time_total / 1e6
                flops += 2 * shapes[0][0] * shapes[1][0] * shapes[1][1]
        plain = harness.seconds_of(lambda: F.linear(x, w), 20)
        shares.append(spent / wall)
        rates.append(flops / spent * plain / flops_of_plain)
    more = {"tokens": step.tokens, "gflop": flops / 1e9}
    return {
        "base_share": harness.figure(harness.summary(shares), **more),
        "base_rate": harness.figure(
            harness.summary(rates), plain_gflop_per_second=flops_of_plain / plain / 1e9
        ),
    }


def multi_lora_over_frozen(world: World, name: str, repeats: int) -> Figure:
    """B = 0 at the start, so both arms have the same loss."""
    config = configure(name, 1, 1)
    config = config.model_copy(
        update={"adapter": config.adapter.model_copy(update={"rank": 1, "alpha": 2.0})}
    )
    first = world.base.layout.modules[:1]
    base = model.load(world.found, config, world.base.device, first)
    # One pass of both arms: as many tokens as the engine puts together, from 16 clients.
    multi, frozen = (Step(world, 16, 2, b, budget_tokens=4096) for b in (None, base))
    must_agree("multi-LoRA and frozen base: losses", multi.gradients(), frozen.gradients(),
               TOLERANCE[base.dtype])  # fmt: skip
    arms = {"multi": Arm(multi.gradients), "frozen": Arm(frozen.gradients)}
    timed = harness.time_arms(arms, repeats, "multi_lora_over_frozen")
    return harness.figure(
        harness.ratio(timed["multi"].seconds, timed["frozen"].seconds), tokens=multi.tokens
    )


def k32_over_k1(world: World, repeats: int) -> Figure:
    """The single client's step spans as many passes as those of all 32."""
    many, one = Step(world, 32, 4), Step(world, 1, 128)
    must_agree("K = 32 and K = 1: mean loss", many.loss(), one.loss(), TOLERANCE[world.base.dtype])
    timed = harness.time_arms({"k32": Arm(many.run), "k1": Arm(one.run)}, repeats, "k32_over_k1")
    found = harness.ratio(timed["k32"].seconds, timed["k1"].seconds)
    return harness.figure(found, tokens=many.tokens, passes=[len(many.work), len(one.work)])
