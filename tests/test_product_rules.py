"""Rules that look at products: FlexLoRA, FLoRA, FedEx-LoRA, HetLoRA, LoRA-FAIR.

Each against dense float64 matrices, at equal and at different ranks, and in real runs that are
killed and resumed. Where public code merges without alpha / r, takes roots of singular values, or
tells A from B by a dimension that equals the rank (landscape of defects), these fail. About 25 s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import seeds, simulate, strategies
from fedsim.adapters import AdapterBank
from fedsim.checkpoint import load_checkpoint
from fedsim.config import Config
from fedsim.core import KINDS, AdapterLayout, Population, RoundPlan, ServerState, Strategy
from fedsim.correction import delta_of
from fedsim.errors import ConfigError
from fedsim.folder import RunFolder
from fedsim.local_terms import Starts
from fedsim.plan import plan_round
from fedsim.reduce import Reduce
from tests.rules import (
    EPS,
    LAYOUT,
    SCALE,
    Kept,
    M,
    blocks,
    plan_of,
    random_rows,
    reduce,
    step,
    weights_of,
)
from tests.test_every_rule_runs import test_a_killed_run_goes_on as killed_and_resumed

WEIGHTS = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
P = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
RANKS = [3, 1, 2, 3, 2, 1]


def mixed(round: int = 1) -> RoundPlan:
    """Clients of ranks 1 to 3, each with its own scale 6 / r."""
    ranks = np.array(RANKS)
    return replace(plan_of(WEIGHTS, round), rank=ranks, scale=6.0 / ranks)


def cut(rows: Tensor, ranks: list[int] = RANKS) -> Tensor:
    masks = torch.stack([LAYOUT.mask(KINDS, r) for r in ranks])
    return torch.where(masks, rows, 0)


def clients(plan: RoundPlan) -> tuple[ServerState, Tensor]:
    """A server, and what clients of the plan's ranks send."""
    server = ServerState(plan.round - 1, random_rows(1, 1)[0])
    return server, cut(server.row + 0.5 * random_rows(2, M), plan.rank.tolist())


def aggregate(rule: Strategy, server: ServerState, plan: RoundPlan, rows: Tensor) -> ServerState:
    start = torch.stack([torch.where(LAYOUT.mask(KINDS, int(r)), server.row, 0)
                         for r in plan.rank])  # fmt: skip
    updates = (replace(b, start=start) for b in blocks(start, rows))
    return rule.aggregate(server, plan, updates, reduce(), Kept())


def mean_products(plan: RoundPlan, rows: Tensor) -> dict[str, Tensor]:
    """module -> sum_k p_k s_k B_k A_k."""
    w = P * torch.from_numpy(plan.scale)
    return {m: torch.einsum("k,kor,kri->oi", w, b.double(), a.double())
            for m, (a, b) in LAYOUT.factors(rows).items()}  # fmt: skip


def far(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    return max(float((got[m] - want[m]).norm() / want[m].norm()) for m in want)


BOTH = pytest.mark.parametrize("plan", [plan_of(WEIGHTS), mixed()], ids=["equal", "mixed"])


@BOTH
@pytest.mark.parametrize("rule", ["flora", "fedex_lora"])
def test_the_mean_of_products_is_kept_exactly(rule: str, plan: RoundPlan) -> None:
    """Two rounds; the second adds to the first."""
    strategy = strategies.load(rule)
    server, rows = clients(plan)
    server = strategy.start(server.row, LAYOUT)
    after = aggregate(strategy, server, plan, rows)
    want = mean_products(plan, rows)
    assert far(weights_of(after), want) <= 8 * EPS
    more = cut(after.row + 0.5 * random_rows(3, M), plan.rank.tolist())
    twice = aggregate(strategy, after, replace(plan, round=2), more)
    # What the base has already, and in the next round the clients' products over it
    base = {
        m: v - SCALE * b[0].double() @ a[0].double()
        for (m, v), (a, b) in zip(
            weights_of(after).items(), LAYOUT.factors(after.row[None]).values(), strict=True
        )
    }
    second = {m: base[m] + g for m, g in mean_products(plan, more).items()}
    assert far(weights_of(twice), second) <= 32 * EPS


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedex_lora"])
def test_a_side_as_large_as_the_rank(rule: str) -> None:
    """Public code tells A from B by the dimension that equals the rank; here both sides do."""
    layout = AdapterLayout.build({"x": (3, 3)}, 3)
    used = layout.mask(("A", "B"))
    rows = torch.where(
        used, torch.randn(M, layout.size, generator=torch.Generator().manual_seed(1)), 0
    )
    strategy, plan = strategies.load(rule), plan_of(WEIGHTS)
    server = strategy.start(rows[0], layout)
    after = strategy.aggregate(
        server, plan, blocks(rows[0], rows), Reduce(layout, SCALE, 1), Kept()
    )
    (a, b), (one_a, one_b) = (
        layout.factors(rows.double())["x"],
        layout.factors(after.row[None])["x"],
    )
    want = torch.einsum("k,kor,kri->oi", SCALE * P, b, a)
    got = SCALE * one_b[0].double() @ one_a[0].double()
    if (joined := delta_of(after.base, "x")) is not None:
        got = got + joined
    assert float((got - want).norm()) <= 8 * EPS * float(want.norm())


def test_floras_next_adapter_is_fresh() -> None:
    rule, plan = strategies.load("flora"), mixed()
    server, rows = clients(plan)
    server = rule.start(server.row, LAYOUT)
    a, b = LAYOUT.mask(("A",)), LAYOUT.mask(("B",))
    seen = [server.row]
    for round in (1, 2, 3):
        server = aggregate(rule, server, replace(plan, round=round), rows)
        assert not server.row[b].any()
        assert all(float((server.row - row)[a].abs().min()) > 0 for row in seen)
        bound = 12**-0.5
        assert bound * 0.8 < float(server.row[a].abs().max()) <= bound
        seen.append(server.row)


def test_a_client_without_b_adds_nothing_to_floras_stack() -> None:
    rule, plan = strategies.load("flora"), plan_of(WEIGHTS)
    server, rows = clients(plan)
    rows[:, LAYOUT.mask(("B",))] = 0
    after = aggregate(rule, rule.start(server.row, LAYOUT), plan, rows)
    assert all(not w.any() for w in weights_of(after).values())


@BOTH
def test_flexlora_is_the_best_of_its_rank(plan: RoundPlan) -> None:
    """Against the dense SVD of the mean product, cut to rank 3; what is lost is said."""
    server, rows = clients(plan)
    after = aggregate(strategies.load("flexlora"), server, plan, rows)
    lost = whole = 0.0
    got = weights_of(after)
    for module, g in mean_products(plan, rows).items():
        u, s, vt = torch.linalg.svd(g)
        best = u[:, :3] * s[:3] @ vt[:3]
        assert float((got[module] - best).norm()) <= 8 * EPS * float(g.norm())
        lost, whole = lost + float(s[3:].square().sum()), whole + float(s.square().sum())
    assert float(after.memory["truncation"]) == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert not after.base


def test_flexlora_of_low_rank_products_loses_nothing() -> None:
    """One direction of B for all: the mean has rank 1. Rows of A beyond it stay the server's."""
    plan, server = plan_of(WEIGHTS), ServerState(0, random_rows(1, 1)[0])
    rows = cut(server.row + 0.5 * random_rows(2, M), [1] * M)
    for _, b in LAYOUT.factors(rows).values():
        b[:, :, 0] = b[0, :, 0]
    after = aggregate(strategies.load("flexlora"), server, plan, rows)
    assert far(weights_of(after), mean_products(plan, rows)) <= 8 * EPS
    assert float(after.memory["truncation"]) <= 1e-7
    for module, (a, b) in LAYOUT.factors(after.row[None]).items():
        assert torch.equal(a[0, 1:], LAYOUT.factors(server.row[None])[module][0][0, 1:])
        assert not b[0, :, 1:].any()


@pytest.mark.parametrize("balanced", [False, True])
def test_flexloras_split(balanced: bool) -> None:
    """B has the whole spectrum and A orthonormal rows; or each its root."""
    server, rows = clients(mixed())
    after = aggregate(strategies.load("flexlora", {"balanced": balanced}), server, mixed(), rows)
    plain = aggregate(strategies.load("flexlora"), server, mixed(), rows)
    assert far(weights_of(after), weights_of(plain)) <= 8 * EPS
    for a, b in LAYOUT.factors(after.row[None].double()).values():
        norms_a, norms_b = a[0].norm(dim=1), SCALE * b[0].norm(dim=0)
        want = norms_b if balanced else torch.ones(3).double()
        assert torch.allclose(norms_a, want, rtol=1e-5)


def test_each_client_starts_from_the_cut_product(settings: Callable[..., Config]) -> None:
    """s_r B_r A_r is the mean product's first r singular parts, whatever the client's rank."""
    config = settings(adapter__rank=3, adapter__alpha=6.0)
    server, rows = clients(mixed())
    rule = strategies.load("flexlora")
    after = aggregate(rule, server, mixed(), rows)
    bank = AdapterBank(LAYOUT, 1, torch.device("cpu"))
    starts = Starts(rule.rule(after, mixed(2)), mixed(2), bank, config, None)
    for index, rank in enumerate(RANKS):
        got = LAYOUT.factors(starts.of(index)[None])
        for module, g in mean_products(mixed(), rows).items():
            a, b = got[module]
            u, s, vt = torch.linalg.svd(g)
            want = u[:, :rank] * s[:rank] @ vt[:rank]
            have = 6.0 / rank * b[0].double() @ a[0].double()
            assert float((have - want).norm()) <= 16 * EPS * float(g.norm())


def test_fedex_is_fedit_and_a_residual() -> None:
    plan = mixed()
    server, rows = clients(plan)
    after = aggregate(strategies.load("fedex_lora"), server, plan, rows)
    fedit = aggregate(strategies.load("fedit"), server, plan, rows)
    assert torch.allclose(after.row, fedit.row, rtol=2 * EPS, atol=EPS)
    lost = aggregate(strategies.load("fedex_lora", {"residual": 1}), server, plan, rows)
    assert torch.equal(lost.row, after.row)
    want = {m: mean_products(plan, rows)[m] - w for m, w in weights_of(fedit).items()}
    missed = whole = 0.0
    for module, residual in want.items():
        u, s, vt = torch.linalg.svd(residual)
        part = delta_of(lost.base, module)
        assert part is not None
        best = u[:, :1] * s[:1] @ vt[:1]
        assert float((part - best).norm()) <= 16 * EPS * float(residual.norm())
        missed += float(s[1:].square().sum())
        whole += float(mean_products(plan, rows)[module].square().sum())
    assert float(lost.memory["truncation"]) == pytest.approx((missed / whole) ** 0.5, rel=1e-6)


def test_hetlora_weighs_by_products() -> None:
    """Against the dense norms; zeros where ranks end, and nobody's rows as they were."""
    plan = replace(mixed(), rank=np.minimum(mixed().rank, 2))
    server, rows = clients(plan)
    rule = strategies.load("hetlora", {"smallest": 3})  # prunes nobody
    after = aggregate(rule, server, plan, rows)
    norms = torch.zeros(M, dtype=torch.float64)
    for a, b in LAYOUT.factors(rows.double()).values():
        norms += (b @ a).square().sum((1, 2))
    w = norms.sqrt() / norms.sqrt().sum()
    had = LAYOUT.mask(KINDS, 2)
    want = torch.einsum("k,kp->p", w, rows.double())
    assert float((after.row.double() - want)[had].abs().max()) <= 4 * EPS * float(want.abs().max())
    assert torch.equal(after.row[~had], server.row[~had])
    assert not after.memory["ranks"].any()


def test_hetlora_by_hand() -> None:
    """Norms 1 and 3, A = 2 and 6: (2 + 18) / 4 = 5; equal norms are the plain mean."""
    rows = torch.zeros(2, LAYOUT.size)
    for (a, b), value in zip(LAYOUT.factors(rows).values(), (1.0, 0.0), strict=True):
        a[:, 0, 0] = torch.tensor([2.0, 6.0])
        b[:, 0, 0] = value / 2
    rule = strategies.load("hetlora", {"smallest": 3})
    at = LAYOUT.piece("q", "A").offset
    got = step(rule, ServerState(0, torch.zeros(LAYOUT.size)), rows, [5.0, 1.0])
    assert float(got.row[at]) == 5.0
    for a, b in LAYOUT.factors(rows).values():
        b[:, 0, 0] = torch.where(a[:, 0, 0] > 0, 1 / a[:, 0, 0], 0)
    got = step(rule, ServerState(0, torch.zeros(LAYOUT.size)), rows, [5.0, 1.0])
    assert float(got.row[at]) == 4.0


def test_hetlora_prunes_tails_that_shrink() -> None:
    """Client 0's tail shrinks, client 1's grows, client 2's rank is the smallest already."""
    plan = replace(plan_of([1.0] * 3), rank=np.array([3, 3, 1]), client_ids=np.array([4, 7, 9]))
    start = cut(random_rows(1, 1)[0].expand(3, -1), [3, 3, 1])
    rows, tail = start.clone(), ~LAYOUT.mask(KINDS, 2) & LAYOUT.mask(KINDS, 3)
    rows[0, tail] *= 0.5
    rows[1, tail] *= 2.0
    rows[2] *= 0.5
    rule, server = strategies.load("hetlora", {"gamma": 0.7}), ServerState(0, random_rows(1, 1)[0])
    updates = (replace(b, start=start) for b in blocks(start, rows))
    after = rule.aggregate(server, plan, updates, reduce(), Kept())
    assert after.memory["ranks"].nonzero().tolist() == [[4]] and after.memory["ranks"][4] == 2
    rows[0, tail] = 0  # not sent
    norms = torch.stack([sum((b.double() @ a.double()).square().sum((1, 2))
                             for a, b in LAYOUT.factors(rows).values())])[0].sqrt()  # fmt: skip
    want = torch.einsum("k,kp->p", norms / norms.sum(), rows.double())
    assert float((after.row.double() - want).abs().max()) <= 4 * EPS * float(want.abs().max())


def test_rows_that_all_clients_drop_stay_the_servers() -> None:
    """Every client is pruned from 3 to 2: the server's third rows are what they were."""
    server = ServerState(0, random_rows(1, 1)[0])
    rows = server.row.expand(3, -1).clone()
    rows[:, ~LAYOUT.mask(KINDS, 2)] *= 0.5
    rule = strategies.load("hetlora", {"gamma": 0.7})
    after = step(rule, server, rows, [1.0] * 3)
    assert after.memory["ranks"][:3].tolist() == [2, 2, 2]
    tail = LAYOUT.mask(KINDS, 3) & ~LAYOUT.mask(KINDS, 2)
    assert torch.equal(after.row[tail], server.row[tail])


def test_a_pruned_rank_is_the_clients_from_then_on(settings: Callable[..., Config]) -> None:
    config = settings(adapter__ranks=(2, 4), server__fraction=1.0)
    population = Population(np.arange(9) * 3, np.arange(24))
    key = seeds.run_key(1)
    plain = plan_round(config, population, 1, key)
    pruned = torch.zeros(8, dtype=torch.int64)
    pruned[3], pruned[5] = 1, 1
    plan = plan_round(config, population, 1, key, pruned)
    ranks = dict(zip(plain.client_ids.tolist(), plain.rank.tolist(), strict=True)) | {3: 1, 5: 1}
    assert dict(zip(plan.client_ids.tolist(), plan.rank.tolist(), strict=True)) == ranks
    assert (np.diff(plan.rank) >= 0).all() and len(plan.lanes) == 3
    assert plan.scale.tolist() == [config.adapter.scale(int(r)) for r in plan.rank]


def distances(server: ServerState, want: dict[str, Tensor], *, cosine: bool) -> list[float]:
    got = weights_of(server)
    if cosine:
        return [float(1 - (got[m] * w).sum() / (got[m].norm() * w.norm())) for m, w in want.items()]
    return [float((got[m] - w).norm()) for m, w in want.items()]


@BOTH
@pytest.mark.parametrize("distance", ["ridge", "cosine"])
def test_lora_fair_is_nearer_than_fedit(plan: RoundPlan, distance: str) -> None:
    server, rows = clients(plan)
    options = {"distance": distance, "penalty": 1e-3, "rate": 0.5}
    after = aggregate(strategies.load("lora_fair", options), server, plan, rows)
    fedit = aggregate(strategies.load("fedit"), server, plan, rows)
    a = LAYOUT.mask(("A",))
    assert float((after.row - fedit.row)[a].abs().max()) <= 4 * EPS
    want = mean_products(plan, rows)
    pairs = zip(distances(after, want, cosine=distance == "cosine"),
                distances(fedit, want, cosine=distance == "cosine"), strict=True)  # fmt: skip
    assert all(new < old for new, old in pairs)


def test_lora_fairs_ridge_is_the_minimum() -> None:
    """Least squares over [A, sqrt(lambda)], dense: the same B."""
    server, rows = clients(mixed())
    penalty = 0.3
    after = aggregate(strategies.load("lora_fair", {"penalty": penalty}), server, mixed(), rows)
    fedit = aggregate(strategies.load("fedit"), server, mixed(), rows)
    got, plain = LAYOUT.factors(after.row[None]), LAYOUT.factors(fedit.row[None])
    for module, g in mean_products(mixed(), rows).items():
        a, b = (f[0].double() for f in plain[module])
        wide = torch.cat([a, penalty**0.5 * torch.eye(3).double()], 1)
        aim = torch.cat([g / SCALE - b @ a, torch.zeros(len(b), 3).double()], 1)
        want = b + torch.linalg.lstsq(wide.T, aim.T).solution.T
        assert float((got[module][1][0] - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("distance", ["ridge", "cosine"])
def test_lora_fair_at_its_limits(distance: str) -> None:
    """A heavy penalty is FedIT; clients of one A and one scale leave nothing to correct."""
    plan = plan_of(WEIGHTS)
    server, rows = clients(plan)
    fedit = aggregate(strategies.load("fedit"), server, plan, rows)
    heavy = {"distance": distance, "penalty": 1e9}
    after = aggregate(strategies.load("lora_fair", heavy), server, plan, rows)
    assert float((after.row - fedit.row).abs().max()) <= 1e-6
    rows = torch.where(LAYOUT.mask(("A",)), server.row, rows)
    after = aggregate(strategies.load("lora_fair", {"distance": distance}), server, plan, rows)
    fedit = aggregate(strategies.load("fedit"), server, plan, rows)
    assert float((after.row - fedit.row).abs().max()) <= 1e-6


MIXED = ["flexlora", "flora", "fedex_lora", "hetlora", "lora_fair"]


@pytest.mark.parametrize("rule", MIXED)
def test_killed_and_resumed_at_different_ranks(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    killed_and_resumed(settings, monkeypatch, rule, adapter__ranks=(1, 2, 4))


def test_pruned_ranks_survive_a_kill(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    killed_and_resumed(settings, monkeypatch, "hetlora", server__fraction=1.0, train__steps=4,
                       server__options={"penalty": 10.0, "gamma": 0.75})  # fmt: skip
    saved = load_checkpoint(tmp_path / "killed" / "checkpoint")
    assert saved is not None and saved.server.memory["ranks"].any()


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedex_lora", "lora_fair"])
def test_equal_weights(rule: str) -> None:
    """`equal` is weights of 1, in the means and in the products."""
    plan = mixed()
    server, rows = clients(plan)
    same = replace(plan, weights=np.ones(M))
    got = aggregate(strategies.load(rule, {"equal": True}), server, plan, rows)
    want = aggregate(strategies.load(rule), server, same, rows)
    assert torch.equal(got.row, want.row)
    assert all(torch.equal(got.base[k], v) for k, v in want.base.items())
    other = aggregate(strategies.load(rule), server, plan, rows)
    assert far(weights_of(got), weights_of(other)) > 1e-2


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedex_lora", "hetlora", "lora_fair"])
def test_magnitudes_are_averaged(rule: str) -> None:
    """By the weights that the rule gives its clients, beside the products."""
    layout = AdapterLayout.build({"q": (12, 8), "v": (12, 4)}, 3, dora=True)
    drawn = torch.randn(M, layout.size, generator=torch.Generator().manual_seed(1))
    rows = torch.where(layout.mask(KINDS), drawn, 0)
    pruned = {"smallest": 3} if rule == "hetlora" else {}  # nobody
    strategy, plan = strategies.load(rule, pruned), plan_of(WEIGHTS)
    sums = Reduce(layout, SCALE, 1)
    after = strategy.aggregate(
        strategy.start(rows[0], layout), plan, blocks(rows[0], rows), sums, Kept()
    )
    p = P
    if rule == "hetlora":
        p = sum((b.double() @ a.double()).square().sum((1, 2))
                for a, b in layout.factors(rows).values()).sqrt()  # fmt: skip
        p = p / p.sum()
    mag = layout.mask(("mag",))
    want = torch.einsum("k,kp->p", p, rows.double())[mag]
    assert float((after.row.double()[mag] - want).abs().max()) <= 4 * EPS * float(want.abs().max())


@pytest.mark.parametrize(
    ("rule", "more", "said"),
    [("flora", {"channel__compression": "top_k"}, "channel.feedback"),
     ("flexlora", {"channel__compression": "int8", "channel__feedback": True}, "channel.feedback"),
     ("hetlora", {"adapter__init": "pissa"}, "adapter.init")],
)  # fmt: skip
def test_what_a_rules_rows_cannot_have(
    settings: Callable[..., Config], rule: str, more: dict[str, Any], said: str
) -> None:
    """What was lost of a row whose A is gone; factors of one rank where ranks fall."""
    with pytest.raises(ConfigError, match=said):
        simulate.run(settings(server__strategy=rule, **more))
    simulate.run(settings(server__strategy="fedit", server__rounds=1, evaluate__limit=0, **more))


@pytest.mark.parametrize("rule", ["flexlora", "flora", "fedex_lora"])
def test_a_rule_over_dora(settings: Callable[..., Config], rule: str) -> None:
    """Rounds of it, whatever the norms become."""
    config = settings(server__strategy=rule, adapter__dora=True, evaluate__limit=2)
    saved = load_checkpoint(simulate.run(config) / "checkpoint")
    assert saved is not None and torch.isfinite(saved.server.row).all()


def lines(settings: Callable[..., Config], rule: str, **more: Any) -> list[dict[str, Any]]:
    config = settings(run__name=rule, server__strategy=rule, evaluate__limit=0, **more)
    return RunFolder(simulate.run(config)).read("rounds.jsonl")


def test_what_joined_the_base_is_sent(settings: Callable[..., Config]) -> None:
    """FLoRA sends no adapter down, and from round 2 on the stack of 4 clients of rank 1 to each:
    up to a rank below half of the smaller side, 4 times what a client sends up."""
    sent = lines(settings, "flora", adapter__rank=1)
    assert sent[0]["down_mib"] == 0.0
    assert sent[1]["down_mib"] == pytest.approx(4 * sent[1]["up_mib"])
    fedit = lines(settings, "fedit", adapter__rank=1)
    fedex = lines(settings, "fedex_lora", adapter__rank=1)
    assert fedex[0]["down_mib"] == fedit[0]["down_mib"]
    assert fedex[1]["down_mib"] == pytest.approx(6 * fedit[1]["down_mib"])


def test_truncation_is_logged(settings: Callable[..., Config]) -> None:
    flex, plain = lines(settings, "flexlora"), lines(settings, "fedit")
    assert all(0 < line["truncation"] < 1 for line in flex)
    assert all(line["truncation"] is None for line in plain)


def test_ranks_shrink_in_a_run(settings: Callable[..., Config]) -> None:
    """A heavy penalty on the tail: ranks fall from visit to visit and never rise."""
    config = settings(server__strategy="hetlora", server__fraction=1.0, evaluate__limit=0,
                      server__options={"penalty": 10.0, "gamma": 0.75}, train__steps=4)  # fmt: skip
    visits = RunFolder(simulate.run(config)).read("clients.jsonl")
    by_client = [[v["rank"] for v in visits if v["client"] == c] for c in range(8)]
    assert all(ranks == sorted(ranks, reverse=True) for ranks in by_client)
    assert sum(ranks[-1] < 4 for ranks in by_client) >= 4
