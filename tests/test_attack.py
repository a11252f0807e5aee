"""What attackers send, number by number: against float64, and nobody else is touched. About 2 s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import attack
from fedsim.core import KINDS, ClientUpdates, Population, RoundPlan
from fedsim.errors import ConfigError, DataError, RunError
from fedsim.seeds import Purpose, normal
from tests.rules import EPS, LAYOUT, blocks, plan_of, random_rows

M, KEY = 7, 3
BAD = np.zeros(20, dtype=bool)
BAD[[1, 4]] = True
ALL: list[tuple[str, dict[str, Any]]] = [
    ("sign_flip", {"factor": 2.0}), ("scale", {"factor": -3.0}), ("gaussian", {"std": 0.5}),
    ("a_little", {}), ("a_little", {"z": 2.0}),
]  # fmt: skip


def poisoned(
    kind: str, options: dict[str, Any], updates: Sequence[ClientUpdates],
    plan: RoundPlan | None = None, up: Sequence[str] = KINDS, key: int = KEY,
) -> list[ClientUpdates]:  # fmt: skip
    return [*attack.poison(
        attack.attack(kind, options), iter(updates), plan=plan or plan_of([1.0] * M), bad=BAD,
        layout=LAYOUT, up=up, key=key,
    )]  # fmt: skip


def rows_of(
    kind: str, options: dict[str, Any], updates: Sequence[ClientUpdates], **more: Any
) -> Tensor:
    return torch.cat([u.row for u in poisoned(kind, options, updates, **more)])


def usual(cuts: Sequence[int] = (), ok: Sequence[bool] | None = None) -> list[ClientUpdates]:
    start = random_rows(1, 1)[0]
    rows = start + 0.1 * random_rows(2, M)
    if ok is not None:
        rows[~torch.tensor(ok)] = float("nan")
    return [*blocks(start, rows, ok, cuts)]


def test_by_hand() -> None:
    start = torch.zeros(LAYOUT.size)
    used = LAYOUT.mask(KINDS)
    values = torch.tensor([1.0, 3, 3, 1, 7, 1, 3])[:, None] * used
    got = rows_of("sign_flip", {"factor": 2.0}, [*blocks(start, values)])
    assert (got[1, used] == -6).all() and (got[4, used] == -14).all()
    got = rows_of("scale", {"factor": 10.0}, [*blocks(start, values)])
    assert (got[1, used] == 30).all() and (got[4, used] == 70).all()
    plan = plan_of([1.0] * 4)
    values = torch.tensor([1.0, 9, 3])[:, None] * used
    got = rows_of("a_little", {"z": 0.5}, [*blocks(start, values)], plan=plan)
    assert (got[1, used] == 1.5).all()
    z = attack.z_max(50, 24)
    assert round(z, 2) == 1.43 and abs(NormalDist().cdf(z) - 24 / 26) < 1e-12


@pytest.mark.parametrize("kind, options", ALL)
@pytest.mark.parametrize("own", [False, True])
def test_what_is_sent(kind: str, options: dict[str, Any], own: bool) -> None:
    """start + new rounds twice to fp32, and what it was made from once."""
    updates = usual()
    if own:  # starts of their own
        updates = [replace(updates[0], start=random_rows(5, M))]
    start = updates[0].start.double().expand(M, -1).numpy()
    d = updates[0].delta.double().numpy()
    got = rows_of(kind, options, updates).double().numpy()
    honest = d[~BAD[:M]]
    for i in (1, 4):
        if kind == "gaussian":
            u = normal(KEY, Purpose.ATTACK, LAYOUT.size, client=i, round=1).numpy()
            want = 0.5 * u * LAYOUT.mask(KINDS).numpy()
        elif kind == "a_little":
            z = options.get("z", attack.z_max(M, 2))
            want = honest.mean(0) - z * honest.std(0)
        else:
            want = {"sign_flip": -2.0, "scale": -3.0}[kind] * d[i]
        bound = 1.01 * EPS * (2 * np.abs(want) + np.abs(start[i] + want)) + 1e-14
        assert (np.abs(got[i] - start[i] - want) <= bound).all()


@pytest.mark.parametrize("kind, options", ALL)
@pytest.mark.parametrize("cuts", [(2,), (1, 2, 5), (0, 3)])
def test_nobody_else_is_touched(kind: str, options: dict[str, Any], cuts: Sequence[int]) -> None:
    """Blocks do not matter; the honest and the failed pass as they are; nothing is changed in
    place; a failed client is not asked about, even among the honest ones of `a_little`."""
    ok = [i not in (2, 4) for i in range(M)]
    updates = usual(cuts, ok)
    before = [u.row.clone() for u in updates]
    sent = poisoned(kind, options, updates)
    for a, u in zip(before, updates, strict=True):
        assert torch.equal(a.nan_to_num(), u.row.nan_to_num())
    got, was = torch.cat([u.row for u in sent]), torch.cat(before)
    assert np.concatenate([u.ok for u in sent]).tolist() == ok
    assert torch.equal(got[[0, 3, 5, 6]], was[[0, 3, 5, 6]]) and got[[2, 4]].isnan().all()
    assert got[1].isfinite().all() and not torch.equal(got[1], was[1])
    whole = rows_of(kind, options, usual((), ok))
    assert torch.equal(got.nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("kind, options", ALL)
def test_only_what_a_client_sends(kind: str, options: dict[str, Any]) -> None:
    """Gaps, ranks that it lacks and kinds that stay are as they were, with starts of their own."""
    block = usual()[0]
    plan = replace(plan_of([1.0] * M), rank=np.array([3, 2, 3, 3, 1, 3, 3]))
    block = replace(block, start=random_rows(5, M))
    got = rows_of(kind, options, [block], plan=plan, up=("B",))
    delta = got - block.start
    for a, b in LAYOUT.factors(got - block.row).values():
        assert not a.any() and not b[1, :, 2:].any() and not b[4, :, 1:].any()
        assert b[1, :, :2].any() and b[4, :, :1].any()
    assert torch.equal(got[:, ~LAYOUT.mask(KINDS)], block.row[:, ~LAYOUT.mask(KINDS)])
    assert delta.isfinite().all()


def test_an_update_that_overflows_is_refused() -> None:
    sent = poisoned("scale", {"factor": 3e38}, [*blocks(*_large())])
    assert sent[0].ok.tolist() == [i not in (1, 4) for i in range(M)]


def _large() -> tuple[Tensor, Tensor]:
    start = random_rows(1, 1)[0]
    return start, start + 10 * random_rows(2, M)


def test_noise_is_normal_and_counted() -> None:
    """Of n draws the mean is within 5 / sqrt(n), mean square within 5 sqrt(2 / n), and the share
    below each quantile within 5 sqrt(q (1 - q) / n): 5 standard errors."""
    n = 200_001
    x = normal(KEY, Purpose.ATTACK, n, client=1, round=1).numpy()
    assert len(x) == n and abs(x.mean()) <= 5 / math.sqrt(n)
    assert abs((x**2).mean() - 1) <= 5 * math.sqrt(2 / n)
    for q in (0.01, 0.2, 0.5, 0.8, 0.99):
        share = float((x < NormalDist().inv_cdf(q)).mean())
        assert abs(share - q) <= 5 * math.sqrt(q * (1 - q) / n)
    half = (n + 1) // 2
    assert abs(np.corrcoef(x[: half - 1], x[half:])[0, 1]) <= 5 / math.sqrt(half)
    updates = usual()
    first = rows_of("gaussian", {}, updates)
    assert torch.equal(first, rows_of("gaussian", {}, updates))
    assert not torch.equal(first[1] - updates[0].start, first[4] - updates[0].start)
    later = rows_of("gaussian", {}, updates, plan=plan_of([1.0] * M, round=2))
    other = rows_of("gaussian", {}, updates, key=KEY + 1)
    for rows in (later, other):
        assert not torch.equal(rows[1], first[1]) and torch.equal(rows[0], first[0])


def test_how_little_is_enough() -> None:
    """With s honest supporters the attackers are a majority; never beyond the mean's other side."""
    for m in range(3, 60):
        for f in range(1, (m + 1) // 2):
            s, z = m // 2 + 1 - f, attack.z_max(m, f)
            assert s + f > m / 2 and z >= 0
            if z > 0:
                assert abs(NormalDist().cdf(z) * (m - f) - (m - f - s)) <= 1e-9
            assert z >= (attack.z_max(m, f - 1) if f > 1 else 0)
    assert attack.z_max(2, 1) == 0 and attack.z_max(6, 1) == 0
    with pytest.raises(RunError, match="f = 4 of m = 7"):
        attack.z_max(7, 4)


def test_where_nobody_is_honest_or_everybody() -> None:
    updates, plan = usual(), plan_of([1.0] * M)
    for which, kinds in ((BAD | True, ["a_little"]), (BAD & False, [*attack.KINDS])):
        for kind in kinds:
            sent = [*attack.poison(
                attack.attack(kind), iter(updates), plan=plan, bad=which, layout=LAYOUT, up=KINDS,
                key=KEY,
            )]  # fmt: skip
            d = (sent[0].row - updates[0].row).abs()
            assert (d <= 2 * EPS * (updates[0].row.abs() + updates[0].start.abs())).all()
            assert which.any() or torch.equal(sent[0].row, updates[0].row)
    assert poisoned("a_little", {}, []) == []


def test_who_attacks() -> None:
    """floor(fraction N) of them, a function of the seed, more when the fraction grows."""
    before = np.zeros(100, dtype=bool)
    for fraction, count in ((0.0, 0), (0.1, 10), (0.29, 29), (0.555, 55), (1.0, 100)):
        who = attack.attackers(KEY, 100, fraction)
        assert who.sum() == count and (who | ~before).all()
        assert (who == attack.attackers(KEY, 100, fraction)).all()
        before = who
    seeds = [attack.attackers(k, 100, 0.3) for k in range(200)]
    share = np.mean(seeds, axis=0)  # each client equally often: 5 standard errors
    assert (np.abs(share - 0.3) <= 5 * math.sqrt(0.21 / 200)).all()


def test_names_and_options_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sign_flip'"):
        attack.attack("signflip")
    bad: list[tuple[str, dict[str, Any]]] = [
        ("sign_flip", {"std": 1.0}), ("sign_flip", {"factor": 0.0}), ("gaussian", {"std": -1.0}),
        ("gaussian", {"std": math.inf}), ("a_little", {"z": "1"}), ("scale", {"factor": math.nan}),
    ]  # fmt: skip
    for kind, options in bad:
        with pytest.raises(ConfigError):
            attack.attack(kind, options)
    assert attack.attack("scale", {"factor": 2}) == attack.Scale(2.0)


# -- answers ------------------------------------------------------------------------------------

ANSWERS = ["neg", "pos", "neu", "neg", "pos", "pos", "neg", "neg", "x y", "a b", "neu"]
CLIENTS = Population(np.array([0, 3, 6, 8, 8, 11]), np.array([4, 0, 2, 1, 3, 5, 6, 7, 8, 9, 10]))


def test_flipped_answers() -> None:
    """Client 0 holds pos, neg, neu: neg -> neu -> pos -> neg. Client 2 has neg alone, which becomes
    the next of everybody's, neu. Client 4 has texts of its own: a b -> neu -> x y -> a b."""
    bad = np.array([True, False, True, True, True])
    got = attack.flipped(ANSWERS, CLIENTS, bad)
    flips = [(ANSWERS[i], ANSWERS[got[i]]) for i in range(len(ANSWERS))]
    assert [flips[i] for i in (4, 0, 2)] == [("pos", "neg"), ("neg", "neu"), ("neu", "pos")]
    assert flips[6] == flips[7] == ("neg", "neu")
    assert [flips[i] for i in (8, 9, 10)] == [("x y", "a b"), ("a b", "neu"), ("neu", "x y")]
    assert got[[1, 3, 5]].tolist() == [1, 3, 5]
    for client in (0, 4):
        assert set(got[CLIENTS.of(client)]) <= set(CLIENTS.of(client).tolist())


def test_a_flip_changes_every_answer_and_merges_none() -> None:
    rng = np.random.default_rng(0)
    answers = [f"label {v}" for v in rng.integers(0, 5, 200)]
    clients = Population(np.arange(0, 201, 20), rng.permutation(200))
    got = attack.flipped(answers, clients, np.ones(10, dtype=bool))
    for client in range(10):
        pairs = {(answers[i], answers[got[i]]) for i in clients.of(client)}
        old, new = zip(*pairs, strict=True)
        assert sorted(old) == sorted(new) and len({*old}) == len(pairs)
        assert all(a != b for a, b in pairs)
    assert (attack.flipped(answers, clients, np.zeros(10, dtype=bool)) == np.arange(200)).all()


def test_nothing_to_flip() -> None:
    one = Population(np.array([0, 2]), np.arange(2))
    with pytest.raises(DataError, match="the same answer"):
        attack.flipped(["a", "a"], one, np.array([True]))
