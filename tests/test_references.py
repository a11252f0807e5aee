"""Reference runs: centralised, local-only, and the steps and rates that make them comparable.

By hand: how many steps and which rate a reference has; local-only keeps each client's row to the
bit and no server moves; a centralised client sees every example. A real run of each on a tiny
model scores every client's own adapter. About 10 s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedsim import references, simulate, strategies
from fedsim.config import Config
from fedsim.core import ServerState
from fedsim.errors import ConfigError, RunError
from fedsim.evaluate.suite import Questions, Suite
from fedsim.plan import cosine_lr
from fedsim.tasks import Form, Generation, Item
from tests.rules import Kept, blocks, plan_of, reduce


def test_central_takes_the_steps_of_the_cohort(settings: Callable[..., Config]) -> None:
    """8 clients, half of them a round, 2 steps each: one client with 8 steps a round."""
    made = references.reference(settings(), "central")
    assert (made.clients.number, made.per_round, made.train.steps) == (1, 1, 8)
    assert made.server.rounds == 3 and made.run.name == "run-central"


def test_local_takes_the_steps_of_a_client(settings: Callable[..., Config]) -> None:
    """3 rounds x 2 steps x half of the clients: 3 steps, at the mean of the rounds' rates."""
    config = settings()
    made = references.reference(config, "local")
    assert (made.server.rounds, made.train.steps, made.server.strategy) == (1, 3, "local")
    rates = [cosine_lr(r, 3, config.train.lr_max, config.train.lr_min) for r in (1, 2, 3)]
    assert made.train.lr_max == pytest.approx(np.mean(rates), rel=1e-12)
    assert made.train.lr_min == made.train.lr_max


def test_trivial_answers() -> None:
    """Golds a, b, a of two choices, and of four: 2/3 and (1/2 + 1/2 + 1/4) / 3; no programs."""
    two, four = ("a", "b"), ("a", "b", "c", "d")
    items = [Item("", "a", two), Item("", "b", two), Item("", "a", four)]
    form = Form(lambda row: Item(""), lambda item, output: {}, ("official",), Generation(1))
    tests = Suite("x", "fedsim", {
        "quiz": Questions(form, items, "", "", True),
        "code": Questions(form, [Item("def f():")], "", "", True),
    })  # fmt: skip
    (quiz,) = references.trivial(tests).values()
    assert quiz["answer"] == "a"
    assert quiz["majority"] == pytest.approx(2 / 3) and quiz["chance"] == pytest.approx(1.25 / 3)


def test_an_unknown_reference_is_named(settings: Callable[..., Config]) -> None:
    with pytest.raises(ConfigError, match="got 'cental'; expected central or local"):
        references.reference(settings(), "cental")


def test_local_keeps_rows_and_moves_nothing() -> None:
    """Start 0, clients end at 1 and 4: rows (1, 4), server 0; a failed client leaves no row."""
    rule, start = strategies.load("local"), torch.zeros(256)
    rows = torch.stack([start + 1, start + 4])
    plan = plan_of([1.0, 2.0])
    server, memory = ServerState(0, start), Kept()
    got = rule.aggregate(server, plan, blocks(start, rows), reduce(), memory)
    assert torch.equal(got.row, start) and torch.equal(got.memory["clients"], rows)
    one = rule.aggregate(server, plan, blocks(start, rows, [False, True]), reduce(), memory)
    assert torch.equal(one.memory["clients"], rows[1:]) and one.memory["ids"].tolist() == [1]
    with pytest.raises(RunError, match="none of the 2 clients"):
        rule.aggregate(server, plan, blocks(start, rows, [False] * 2), reduce(), memory)
    with pytest.raises(ConfigError, match="--reference local"):
        rule.rule(got, plan_of([1.0], round=2))


def test_a_local_run_scores_every_client(settings: Callable[..., Config]) -> None:
    config = references.reference(settings(server__fraction=0.5), "local")
    folder = simulate.run(config)
    scores = json.loads((folder / "scores.json").read_text())
    after = [s for s in scores if s["round"] == 1]
    assert len({s["adapter"] for s in after}) == 4 and len({s["metric"] for s in after}) == 3
    assert all(math.isfinite(s["value"]) for s in scores)


def test_a_central_run_sees_every_example(settings: Callable[..., Config]) -> None:
    folder = simulate.run(references.reference(settings(server__rounds=1), "central"))
    (line,) = [json.loads(x) for x in (folder / "clients.jsonl").read_text().splitlines()]
    assert line["weight"] == 200 and line["steps"] == 8
