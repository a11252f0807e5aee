"""Learning rates within a visit against transformers' `get_scheduler`, to the bit and in training.

Proved here: every kind at every step is what torch's optimiser has under transformers' scheduler;
clients of one pass, each with steps of its own, end where torch.optim.AdamW with that scheduler
takes stock PEFT; a round's plan carries the schedule; a rule that divides by the way divides by the
sum of the rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import get_scheduler

from fedsim.config import build
from fedsim.core import LocalRule, Population
from fedsim.errors import ConfigError
from fedsim.plan import plan_round
from fedsim.record import Meter
from fedsim.schedule import Kind, Schedule
from fedsim.strategies import load
from tests.lab import DELTA, LR, Lab, distance, plan_of
from tests.rules import LAYOUT, Kept, blocks, random_rows, reduce
from tests.rules import plan_of as rule_plan
from tests.stock import Stock

# transformers' own, when peft asks a model of its.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
KINDS: tuple[Kind, ...] = (
    "constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt",
)  # fmt: skip


def rates(kind: str, warmup: int, steps: int, lr: float) -> list[float]:
    """What an optimiser's rate is before each step."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = get_scheduler(kind, optimizer, warmup, steps)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_transformers_own(kind: Kind) -> None:
    for steps in (1, 2, 10, 13):
        for warmup in (0, 1, 2, 10, 12):
            own = [3e-4 * Schedule(kind, warmup).factor(step, steps) for step in range(steps)]
            assert own == rates(kind, warmup, steps, 3e-4), (steps, warmup)


def test_one_cycle_with_restarts_is_the_cosine() -> None:
    """By which name an app asks for it does not matter."""
    assert rates("cosine_with_restarts", 2, 10, 1.0) == rates("cosine", 2, 10, 1.0)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("dora", [False, True])
def test_training_follows_it(lab: Callable[..., Lab], kind: Kind, dora: bool) -> None:
    """Clients of 4, 7 and 5 steps in passes that they share, against stock PEFT each."""
    one, clients, steps = lab(adapter__dora=dora), (0, 1, 2), (4, 7, 5, 1)
    plan = replace(plan_of(clients, steps), schedule=Schedule(kind, 2))
    updates = list(one.trainer(slots=3).train(plan, LocalRule(one.start), Meter()))
    rows = torch.cat([block.row for block in updates])
    for client in clients:
        stock, ends = Stock(one, client), []
        for name in (kind, "constant"):
            stock.write(one.start)
            stock.optimizer.state.clear()
            for group in stock.optimizer.param_groups:
                group.pop("initial_lr", None)
                group["lr"] = LR[client]
            scheduler = get_scheduler(name, stock.optimizer, 2, steps[client])
            for step in range(steps[client]):
                stock.backward(step)
                stock.step()
                scheduler.step()
            ends.append(stock.read()[None])
        assert distance(rows[client, None], ends[0], one.start) <= DELTA
        assert distance(ends[1], ends[0], one.start) > 100 * DELTA


def configured(**train: Any) -> Any:
    return build({"clients": {"number": 4}, "server": {"fraction": 1.0}, "train": train}, "x")


def test_a_plan_has_the_run_s_schedule() -> None:
    config = configured(schedule="linear", warmup=1, steps=3)
    plan = plan_round(config, Population(np.arange(5), np.arange(4)), 1, 7)
    assert [plan.rate(2, step) for step in range(3)] == [0.0, plan.lr[2], plan.lr[2] / 2]
    assert plan.travel(2) == pytest.approx(1.5 * plan.lr[2], rel=1e-15)
    flat = plan_round(configured(steps=3), Population(np.arange(5), np.arange(4)), 1, 7)
    assert flat.travel(2) == 3 * flat.lr[2]


def test_a_warmup_that_a_constant_rate_would_ignore_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.warmup: got 2"):
        configured(warmup=2)
    assert configured(schedule="constant_with_warmup", warmup=2).train.warmup == 2


def test_scaffold_divides_by_the_sum_of_the_rates() -> None:
    """c_k' = c_k - c - delta / sum of rates: 1.5 lr of three steps that fall to 0, one of warmup;
    a visit at rate 0 leaves what a client has."""
    rule, start = load("scaffold", {"scale": 1.0}), random_rows(1, 1)[0]
    server = rule.start(start, LAYOUT)
    rows = start + random_rows(2, 2)
    for steps, way in ((3, 1.5e-3), (1, 0.0)):
        plan = rule_plan([1, 1])
        plan = replace(plan, steps=np.full(2, steps), schedule=Schedule("linear", 1))
        memory = Kept()
        rule.aggregate(server, plan, blocks(start, rows), reduce(), memory)
        memory.commit()
        for client in (0, 1):
            kept = memory.read("control", client)
            if not way:
                assert kept is None
                continue
            assert kept is not None
            torch.testing.assert_close(kept, -(rows[client] - start) / way)
