"""Differential privacy of clients: what is summed, what is added, what it costs, what is refused.

The noise is measured against its standard deviation, a client's part against the clip; the defects
of public code (another sign of adaptive clipping, noise of another clip than the one that clipped,
unequal weights, a zero update) each fail here. About 20 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import cost, rehearsal, seeds, simulate, strategies
from fedsim.accountant import epsilon
from fedsim.checkpoint import load_checkpoint
from fedsim.config import Config, build
from fedsim.core import Population, ServerState
from fedsim.errors import ConfigError
from fedsim.folder import RunFolder
from fedsim.plan import plan_round
from fedsim.privacy import Privacy
from fedsim.reduce import Reduce
from fedsim.release import KEPT, Release
from tests.rules import LAYOUT, SCALE, blocks, plan_of, random_rows
from tests.test_every_rule_runs import killed_and_resumed, state

ALL = LAYOUT.mask(("A", "B"))
NUMBERS = int(ALL.sum())
WORKS = (
    "fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "feddyn", "fedit",
    "ffa_lora", "rolora", "fedsa_lora",
)  # fmt: skip


def privacy(**more: Any) -> Privacy:
    return Privacy(level="client", **{"noise": 1e-9, "clip": 1.0, **more})


def release(p: Privacy, expected: float = 4.0, travels: Tensor = ALL, clip: float = 0.0) -> Release:
    kept = {KEPT: torch.tensor(clip, dtype=torch.float64)} if clip else {}
    return Release.of(p, ServerState(0, torch.zeros(1), kept), expected, travels, 7)


def mean(rows: Tensor, r: Release, round: int = 1, **more: Any) -> Tensor:
    """What the server moves by, from updates of a start at 0."""
    plan = plan_of([1.0] * len(rows), round)
    start = torch.zeros(LAYOUT.size)
    return Reduce(LAYOUT, SCALE, 1, release=r).mean(plan, blocks(start, rows, **more))


def row_of_norm(norm: float, seed: int = 1) -> Tensor:
    row = torch.where(ALL, random_rows(seed, 1)[0], 0)
    return row * (norm / row.norm())


# ------------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("norm", [0.0, 0.3, 1.0, 1.5, 1e6])
def test_no_client_moves_the_sum_by_more_than_the_clip(norm: float) -> None:
    """Short updates arrive as they are, zero too; long ones in their direction. The denominator is
    q N, whoever came."""
    row = row_of_norm(norm)
    got = mean(row[None], release(privacy(clip=1.0), expected=4.0)).double() * 4
    want = row.double() * (min(1.0, 1.0 / norm) if norm else 1.0)
    assert float((got - want).norm()) <= 1e-6
    others = torch.stack([row_of_norm(2.0, seed) for seed in (2, 3)])
    with_, without = (mean(rows, release(privacy())) for rows in
                      (torch.cat([others, row[None]]), others))  # fmt: skip
    assert float((with_ - without).norm()) * 4 <= min(norm, 1.0) + 1e-6


def test_by_hand() -> None:
    """C = 1, (3, 4) and (0, 0.5), q N = 2: (0.3, 0.65)."""
    rows = torch.zeros(2, LAYOUT.size)
    rows[0, :2], rows[1, 1] = torch.tensor([3.0, 4.0]), 0.5
    got = mean(rows, release(privacy(), expected=2.0))
    assert torch.allclose(got[:2], torch.tensor([0.3, 0.65]), atol=1e-6)


def test_one_norm_over_all_that_travels() -> None:
    """B frozen at home does not count, nor does it leave."""
    travels = LAYOUT.mask(("A",))
    row = torch.where(travels, row_of_norm(1.0), 0.0)
    row = row / row.norm() + torch.where(LAYOUT.mask(("B",)), 100.0, 0.0)
    got = mean(row[None], release(privacy(clip=1.0), 1.0, travels))
    assert torch.allclose(got[travels], row[travels], atol=1e-6) and not got[~travels].any()


def test_a_failed_client_is_not_summed() -> None:
    rows = torch.stack([row_of_norm(0.5), torch.full((LAYOUT.size,), float("nan"))])
    got = mean(rows, release(privacy()), ok=[True, False])
    assert torch.allclose(got * 4, rows[0], atol=1e-6)


def noise(z: float, clip: float, expected: float, rounds: int = 400, **more: Any) -> Tensor:
    """(rounds, numbers) of noise on the mean, of rounds in which nobody came."""
    p = privacy(noise=z, clip=clip, **more)
    empty = torch.zeros(0, LAYOUT.size)
    return torch.stack([mean(empty, release(p, expected), round) for round in range(1, rounds + 1)])


@pytest.mark.parametrize(("z", "clip", "expected"), [(1.0, 0.5, 8.0), (0.3, 2.0, 3.0)])
def test_the_noise_is_that_of_its_clip(z: float, clip: float, expected: float) -> None:
    """Standard deviation z C / (q N): chi-square of 57,600 numbers, 5 sigma; and mean 0. None in
    gaps; another in every round, the same one again in the same."""
    drawn = noise(z, clip, expected)
    values = drawn[:, ALL].double() / (z * clip / expected)
    n = values.numel()
    assert abs(float(values.square().sum()) - n) <= 5 * math.sqrt(2 * n)
    assert abs(float(values.mean())) <= 5 / math.sqrt(n)
    assert not drawn[:, ~ALL].any() and len(drawn.unique(dim=0)) == len(drawn)
    assert torch.equal(drawn[:3], noise(z, clip, expected, 3))
    apart = values[1:] * values[:-1]  # rounds do not repeat each other
    assert abs(float(apart.mean())) <= 5 / math.sqrt(apart.numel())


# ------------------------------------------------------------------------------------ adaptive clip


def clip_after(norms: list[float], clip: float = 1.0, **more: Any) -> float:
    """C of the next round."""
    p = privacy(noise=1e-9, clip=9.0, adaptive=True, **more)
    r = release(p, expected=float(len(norms)), clip=clip)
    r._count_noise = 0.0
    mean(torch.stack([row_of_norm(n) for n in norms]), r)
    kept = r.after(ServerState(1, torch.zeros(1), {"m": torch.ones(1)})).memory
    assert torch.equal(kept["m"], torch.ones(1))
    return float(kept[KEPT])


def test_the_clip_follows_the_quantile() -> None:
    """All clipped: C grows, by exp(0.2 / 2); none: it shrinks; half of them: it stays."""
    assert clip_after([2.0] * 4) == pytest.approx(math.exp(0.1))
    assert clip_after([0.5] * 4) == pytest.approx(math.exp(-0.1))
    assert clip_after([0.5, 2.0, 0.5, 2.0]) == pytest.approx(1.0)
    assert clip_after([0.5, 0.5, 0.5, 2.0], quantile=0.75) == pytest.approx(1.0)
    assert clip_after([2.0] * 4, clip_rate=1.0, clip=3.0) == pytest.approx(3 * math.exp(-0.5))


def test_it_comes_to_the_quantile() -> None:
    """Public code that counts who was clipped runs away from it."""
    clip, norms = 0.1, np.linspace(0.1, 2.0, 20).tolist()
    for _ in range(80):
        clip = clip_after(norms, clip)
    assert 0.9 <= clip <= 1.2


def test_the_noise_is_of_the_clip_that_clipped() -> None:
    """C halves behind this round; its own noise is still that of C."""
    p = privacy(noise=1.0, clip=9.0, adaptive=True, clip_rate=2.0)
    r, fixed = release(p, 40.0, clip=2.0), release(privacy(noise=1.0, clip=2.0), 40.0)
    empty = torch.zeros(0, LAYOUT.size)
    z = (1 - (2 * 40 / 20) ** -2) ** -0.5  # of the sum, so that both releases have z = 1
    assert torch.allclose(mean(empty, r), z * mean(empty, fixed), rtol=1e-5)
    assert r.clip == 2.0 and float(r.after(ServerState(1, torch.zeros(1))).memory[KEPT]) != 2.0


def test_the_count_is_noised() -> None:
    """b has standard deviation s / (q N) = 1/20: 300 rounds, 5 sigma of the chi-square."""
    p, shares = privacy(noise=1.0, adaptive=True, clip_rate=1.0), []
    for round in range(1, 301):
        r = release(p, 40.0, clip=1.0)
        mean(torch.zeros(0, LAYOUT.size), r, round)
        clip = float(r.after(ServerState(round, torch.zeros(1))).memory[KEPT])
        shares.append(-math.log(clip) + 0.5)  # b; nobody came, so that 1/2 is its mean
    x = (np.array(shares) - 0.5) * 20
    assert abs((x**2).sum() - 300) <= 5 * math.sqrt(600) and abs(x.mean()) <= 5 / math.sqrt(300)


# ----------------------------------------------------------------------------------------- sampling


def private(settings: Callable[..., Config], **more: Any) -> Config:
    return settings(**{
        "privacy__level": "client", "privacy__noise": 0.5, "privacy__clip": 0.1,
        "privacy__delta": 1e-3, **more,
    })  # fmt: skip


def test_clients_take_part_by_themselves(settings: Callable[..., Config]) -> None:
    """400 rounds of 8 clients at q = 1/2: each within 5 sigma of 200, pairs of 100, sizes of a
    binomial; and all weigh the same, whatever they hold."""
    config = private(settings)
    population = Population(np.cumsum([0, 1, 2, 3, 4, 5, 6, 7, 8]), np.arange(36))
    took = np.zeros((400, 8))
    for round in range(1, 401):
        plan = plan_round(config, population, round, seeds.run_key(1))
        took[round - 1, plan.client_ids] = 1
        assert (plan.weights == 1).all() and (np.diff(plan.client_ids) > 0).all()
    assert (abs(took.sum(0) - 200) <= 5 * 10).all()
    pairs = took.T @ took
    assert (abs(pairs[~np.eye(8, dtype=bool)] - 100) <= 5 * math.sqrt(400 * 3 / 16)).all()
    assert 8 / 4 / 1.5 <= took.sum(1).var() <= 8 / 4 * 1.5
    assert len(np.unique(took, axis=0)) > 150


# --------------------------------------------------------------------------------------- accountant


def closed(q: float, z: float, rounds: int, delta: float) -> float:
    """By the formula of the docstring, over integer orders."""
    best = math.inf
    for a in range(2, 256):
        terms = [
            math.lgamma(a + 1) - math.lgamma(j + 1) - math.lgamma(a - j + 1)
            + (a - j) * math.log1p(-q) + j * math.log(q) + (j * j - j) / (2 * z * z)
            for j in range(a + 1)
        ]  # fmt: skip
        most = max(terms)
        one = (most + math.log(sum(math.exp(t - most) for t in terms))) / (a - 1)
        more = math.log((a - 1) / a) - (math.log(delta) + math.log(a)) / (a - 1)
        best = min(best, rounds * one + more)
    return best


def test_epsilon_of_a_known_run() -> None:
    assert closed(0.01, 1.0, 1000, 1e-5) == pytest.approx(2.108, abs=1e-3)
    got = epsilon(q=0.01, noise=1.0, rounds=1000, delta=1e-5)
    assert got == pytest.approx(2.108, abs=1e-3)


@pytest.mark.parametrize("z", [0.7, 2.0, 5.0])
def test_everybody_always_is_the_plain_gaussian(z: float) -> None:
    """a / (2 z^2) a round, converted at the best order."""
    best = min(
        10 * a / (2 * z * z) + math.log((a - 1) / a) - (math.log(1e-5) + math.log(a)) / (a - 1)
        for a in range(2, 256)
    )
    assert epsilon(q=1.0, noise=z, rounds=10, delta=1e-5) == pytest.approx(best, rel=1e-3)


def test_more_of_anything_betrays_more() -> None:
    base = {"q": 0.05, "noise": 1.0, "rounds": 100, "delta": 1e-5}
    start = epsilon(**base)  # type: ignore[arg-type]
    for more in ({"q": 0.1}, {"noise": 0.8}, {"rounds": 200}, {"delta": 1e-6}):
        assert epsilon(**{**base, **more}) > start  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ rules and real runs


@pytest.mark.parametrize("rule", [n for n in strategies.known()])
def test_rules_that_look_at_clients_are_refused(settings: Callable[..., Config], rule: str) -> None:
    """Before anything is trained."""
    config, strategy = private(settings, server__strategy=rule), strategies.load(rule)
    if rule in WORKS:
        rehearsal.wire(config, strategy)
        return
    with pytest.raises(ConfigError, match=r"privacy\.level"):
        rehearsal.wire(config, strategy)
    with pytest.raises(ConfigError, match=r"privacy\.level"):
        simulate.run(config)


def test_the_plan_says_what_a_run_betrays(settings: Callable[..., Config]) -> None:
    lines = dict(cost.estimate(private(settings)).lines())
    want = epsilon(q=0.5, noise=0.5, rounds=3, delta=1e-3)
    assert lines["privacy"].startswith(f"epsilon {want:.2f} at delta 0.001")
    assert lines["clients"].startswith("about 4 of 8")
    assert "privacy" not in dict(cost.estimate(settings()).lines())


def test_one_look_a_round() -> None:
    r = release(privacy())
    mean(torch.zeros(1, LAYOUT.size), r)
    with pytest.raises(ConfigError, match="more than the sum"):
        mean(torch.zeros(1, LAYOUT.size), r)
    reduce = Reduce(LAYOUT, SCALE, 1, release=release(privacy()))
    updates = blocks(torch.zeros(LAYOUT.size), torch.zeros(2, LAYOUT.size))
    with pytest.raises(ConfigError, match="weighed by clients"):
        reduce.mean(plan_of([1.0, 2.0]), updates)


@pytest.mark.parametrize("rule", ["fedavg", "ffa_lora", "fedsa_lora"])
def test_a_private_run_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Killed in its second round and resumed: the same bits, the adaptive clip's too. FFA's A has
    no noise, and FedSA's B stays at home without any."""
    more = {"server__strategy": rule, "privacy__adaptive": True, "privacy__noise": 0.3,
            "server__fraction": 0.9, "evaluate__limit": 2}  # fmt: skip
    folder = simulate.run(private(settings, run__name="whole", **more))
    whole = state(folder)
    resumed = state(killed_and_resumed(private(settings, run__name="killed", **more), monkeypatch))
    assert whole.keys() == resumed.keys() and f"memory.{KEPT}" in whole
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    lines = RunFolder(folder).read("rounds.jsonl")
    assert lines[0]["clip"] == 0.1 != lines[1]["clip"]
    spent = [line["epsilon"] for line in lines]
    assert 0 < spent[0] < spent[1] < spent[2]
    assert spent[2] == pytest.approx(epsilon(q=0.9, noise=0.3, rounds=3, delta=1e-3))


def test_frozen_and_private_factors_get_no_noise(settings: Callable[..., Config]) -> None:
    from fedsim.world import load_world

    for rule, kind in (("ffa_lora", "A"), ("fedsa_lora", "B")):
        config = private(settings, run__name=rule, server__strategy=rule, evaluate__limit=0)
        world = load_world(config, seeds.run_key(config.run.seed))
        start = world.first(strategies.load(rule), config.adapter).row
        saved = load_checkpoint(simulate.run(config) / "checkpoint")
        assert saved is not None
        still = world.base.layout.mask((kind,))
        assert torch.equal(saved.server.row[still], start[still])
        assert not torch.equal(saved.server.row, start)


def test_a_round_of_nobody(settings: Callable[..., Config], capsys: Any) -> None:
    """q = 0.05 of 8 clients: most rounds are empty, move by noise alone, and are reported."""
    from fedsim import report

    config = private(settings, server__fraction=0.05, server__rounds=6, evaluate__limit=2)
    folder = simulate.run(config)
    lines = RunFolder(folder).read("rounds.jsonl")
    empty = [line for line in lines if line["clients"] == 0]
    assert len(lines) == 6 and empty
    assert all(line["loss_last"] is None and line["up_mib"] == 0 for line in empty)
    assert report.write(folder).is_file()


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"privacy": {"noise": 1.0}}, "privacy.noise: got a value"),
        ({"privacy": {"level": "client", "noise": 1.0}}, "privacy.clip: got nothing"),
        ({"privacy": {"level": "client", "clip": 1.0}}, "privacy.noise: got nothing"),
        ({"server": {"min_clients": 2}}, "each client takes part by itself"),
        ({"privacy": {"delta": 0.05}}, "publishing one client's data"),
        ({"channel": {"secure": True}, "clients": {"number": 400}}, "not in the sensitivity"),
        ({"privacy": {"adaptive": True, "noise": 3.0}}, "privacy.adaptive"),
    ],
)
def test_a_guarantee_that_would_not_hold_is_an_error(more: dict[str, Any], said: str) -> None:
    whole = {"privacy": {"level": "client", "noise": 0.5, "clip": 1.0}}
    alone = more.get("privacy", {}).keys() & {"level"} or said.startswith("privacy.noise: got a")
    values = {**more} if alone else {**whole, **more}
    if not alone and "privacy" in more:
        values["privacy"] = {**whole["privacy"], **more["privacy"]}
    with pytest.raises(ConfigError, match=said):
        build(values, "here")


def test_weights_are_equal_only_under_privacy(settings: Callable[..., Config]) -> None:
    population = Population(np.cumsum([0, 1, 2, 3, 4, 5, 6, 7, 8]), np.arange(36))
    plain = plan_round(settings(server__fraction=1.0), population, 1, 1)
    assert plain.weights.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
