"""What every federated rule keeps, whatever it computes; and FedAvg's number by hand.

Each file in `fedsim/strategies` is found by existing. The order of updates and how they were cut
into blocks do not matter, a client's weight does not when it is alone, no news changes nothing, a
client that failed might as well not have been there, nothing that was handed over is changed, and a
server that went through a checkpoint goes on to the same bits. About 2 s.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import strategies
from fedsim.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fedsim.core import ServerState, Strategy
from fedsim.errors import RunError
from tests.rules import (
    EPS,
    LAYOUT,
    Kept,
    M,
    blocks,
    plan_of,
    random_rows,
    reduce,
    step,
    weights_of,
)


# `local` combines nothing, so that none of this holds; test_references.py has its proofs.
@pytest.fixture(params=[n for n in strategies.known() if n != "local"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def rule(name: str) -> Strategy:
    return strategies.load(name)


@pytest.fixture
def server(rule: Strategy) -> ServerState:
    """A server that has seen one round, so that a rule's memory is not empty."""
    first = rule.start(random_rows(1, 1)[0], LAYOUT)
    assert first.round == 0 and torch.equal(first.row, random_rows(1, 1)[0])
    return step(rule, first, first.row + 0.1 * random_rows(2, M), [1.0] * M)


WEIGHTS = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]


def same(a: ServerState, b: ServerState, ulps: float = 0.0) -> None:
    """Equal states: row and memory to within units of fp32 rounding; of a share that is lost, which
    is 0 or the root of fp64 rounding as the processor multiplies, to within units of 1."""
    assert a.round == b.round and a.memory.keys() == b.memory.keys()
    lost = [abs(float(s.memory.get("truncation", 0.0))) for s in (a, b)]
    assert abs(lost[0] - lost[1]) <= ulps * EPS
    pairs = [(a.row, b.row), *((a.memory[k], b.memory[k]) for k in a.memory if k != "truncation")]
    assert a.base.keys() == b.base.keys()
    if a.base:  # its factors may come in another order
        pairs += zip(weights_of(a).values(), weights_of(b).values(), strict=True)
    for x, y in pairs:
        assert x.dtype == y.dtype
        scale = max(float(x.abs().max()), float(y.abs().max())) if x.numel() else 0.0
        assert float((x.double() - y.double()).abs().max()) <= ulps * EPS * scale


def test_the_order_does_not_matter(rule: Strategy, server: ServerState) -> None:
    rows = server.row + 0.1 * random_rows(3, M)
    order = [3, 0, 5, 1, 4, 2]
    want = step(rule, server, rows, WEIGHTS)
    assert want.round == server.round + 1 and torch.isfinite(want.row).all()
    assert not torch.equal(want.row, server.row)
    got = step(rule, server, rows[order], [WEIGHTS[i] for i in order], ids=order)
    same(got, want, ulps=4)


@pytest.mark.parametrize("cuts", [(2,), (1, 2, 5), (0, 3)])
def test_blocks_do_not_matter(rule: Strategy, server: ServerState, cuts: tuple[int, ...]) -> None:
    rows = server.row + 0.1 * random_rows(3, M)
    same(step(rule, server, rows, WEIGHTS, cuts=cuts), step(rule, server, rows, WEIGHTS))


def test_a_lone_clients_weight_does_not_matter(rule: Strategy, server: ServerState) -> None:
    rows = server.row + 0.1 * random_rows(4, 1)
    got = step(rule, server, rows, [7.0])
    assert torch.isfinite(got.row).all() and not torch.equal(got.row, server.row)
    same(got, step(rule, server, rows, [0.3]), ulps=4)


def test_no_news_changes_nothing(rule: Strategy) -> None:
    """Where a rule rewrites the row, the weights that it stands for."""
    first = rule.start(random_rows(1, 1)[0], LAYOUT)
    got = step(rule, first, first.row.expand(M, -1).clone(), WEIGHTS)
    assert got.round == 1 and torch.equal(got.row, first.row) is not rule.rewrites
    for now, before in zip(weights_of(got).values(), weights_of(first).values(), strict=True):
        assert float((now - before).abs().max()) <= 8 * EPS * float(before.abs().max())


def test_gaps_of_the_layout_stay_zero(rule: Strategy, server: ServerState) -> None:
    used = torch.zeros(1, LAYOUT.size)
    for piece in LAYOUT.pieces:
        LAYOUT.view(used, piece).fill_(1)
    assert (used == 0).any()
    got = step(rule, server, server.row + 0.1 * random_rows(5, M), WEIGHTS)
    assert not got.row[used[0] == 0].any()


def test_nothing_handed_over_is_changed(rule: Strategy, server: ServerState) -> None:
    rows = server.row + 0.1 * random_rows(3, M)
    plan = plan_of(WEIGHTS, server.round + 1)
    handed = [server.row, rows, *server.memory.values()]
    handed += [torch.from_numpy(getattr(plan, n)) for n in ("weights", "lr", "steps", "client_ids")]
    before = [t.clone() for t in handed]
    start = rule.rule(server, plan).start
    rule.aggregate(server, plan, blocks(start, rows), reduce(), Kept())
    assert all(torch.equal(a, b) for a, b in zip(handed, before, strict=True))


@pytest.mark.parametrize("sick", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_failed_client_might_not_have_been_there(
    rule: Strategy, server: ServerState, sick: float, at: int
) -> None:
    rows = server.row + 0.1 * random_rows(3, M)
    rows[at, 7] = sick
    rest = [i for i in range(M) if i != at]
    got = step(rule, server, rows, WEIGHTS, ok=[i != at for i in range(M)], cuts=(2, 4))
    want = step(rule, server, rows[rest], [WEIGHTS[i] for i in rest], ids=rest)
    same(got, want)


def test_all_failed_is_an_error(rule: Strategy, server: ServerState) -> None:
    rows = server.row + 0.1 * random_rows(3, M)
    with pytest.raises(RunError, match=r"round 2: none of the 6 clients.*Lower train.lr_max"):
        step(rule, server, rows, WEIGHTS, ok=[False] * M)


def test_a_checkpoint_between_rounds(rule: Strategy, server: ServerState, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, Checkpoint(server, [], {}))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    rows = server.row + 0.1 * random_rows(6, M)
    same(step(rule, loaded.server, rows, WEIGHTS), step(rule, server, rows, WEIGHTS))


def test_a_round_is_a_function(rule: Strategy, server: ServerState) -> None:
    rows = server.row + 0.1 * random_rows(6, M)
    same(step(rule, server, rows, WEIGHTS), step(rule, replace(server), rows, WEIGHTS))


def test_it_says_where_it_comes_from(name: str) -> None:
    about = importlib.import_module(f"fedsim.strategies.{name}").__doc__ or ""
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|\boriginal\b", about)
    assert "By hand:" in about


def test_fedavg_by_hand() -> None:
    """x = 0, updates 1 (n = 1) and 4 (n = 2): 1/3 x 1 + 2/3 x 4 = 3."""
    start = torch.zeros(LAYOUT.size)
    rows = torch.stack([start + 1, start + 4])
    got = step(strategies.load("fedavg"), ServerState(0, start), rows, [1.0, 2.0])
    assert torch.equal(got.row, torch.full_like(start, 3.0)) and not got.memory
    got = step(strategies.load("fedavg"), ServerState(0, start), rows, [1.0, 2.0], ok=[True, False])
    assert torch.equal(got.row, torch.ones_like(start))


def test_fedavg_of_one_is_that_one() -> None:
    start = random_rows(1, 1)[0]
    row = start + 0.125 * random_rows(2, 1)
    got = step(strategies.load("fedavg"), ServerState(0, start), row, [17.0])
    assert (got.row - row[0]).abs().max() <= 2 * EPS * row.abs().max()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_fedavg_is_the_weighted_mean_of_fp64(scale: float) -> None:
    start = random_rows(1, 1)[0]
    rows = start + scale * random_rows(2, 50)
    weights = np.random.default_rng(0).integers(1, 1000, 50).astype(float).tolist()
    got = step(strategies.load("fedavg"), ServerState(0, start), rows, weights, cuts=(7, 30))
    w = torch.tensor(weights, dtype=torch.float64)
    delta = (w @ (rows.double() - start.double())) / w.sum()
    bound = EPS * (delta.abs() + (start.double() + delta).abs())
    assert ((got.row.double() - (start.double() + delta)).abs() <= 1.01 * bound).all()
