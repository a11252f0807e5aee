"""Robust rules against float64 oracles, and against whatever the admissible attackers send.

Bounds hold for any attack: they follow from counting, not from examples, and are tried on attacks
of every kind. Distances are lost where they are taken from whole fp32 rows, and one ranking is not
Bulyan: both defects of published code are written out here, and must differ. About 5 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import attack
from fedsim.core import KINDS, ServerState
from fedsim.errors import ConfigError, RunError
from fedsim.strategies import load, median
from tests.rules import EPS, LAYOUT, Kept, blocks, plan_of, random_rows, reduce, step

ZERO = torch.zeros(LAYOUT.size)
NAMES = ("median", "trimmed_mean", "krum", "multi_krum", "bulyan", "geometric_median")
USED = LAYOUT.mask(KINDS).numpy()


def move(
    name: str, rows: Tensor, options: dict[str, Any] | None = None,
    weights: Sequence[float] | None = None, ok: Sequence[bool] | None = None,
) -> np.ndarray:  # fmt: skip
    """What a rule makes of updates, from 0: float64."""
    server = ServerState(0, torch.zeros(rows.shape[1]))
    after = step(load(name, options), server, rows, weights or [1.0] * len(rows), ok)
    return after.row.double().numpy()


def scalar(name: str, updates: Sequence[float], **options: Any) -> float:
    """The same of updates that are equal in all numbers."""
    got = move(name, torch.tensor(updates)[:, None].expand(-1, LAYOUT.size).contiguous(), options)
    assert (got == got[0]).all()
    return float(got[0])


def square(x: np.ndarray) -> np.ndarray:
    return np.array([[float(((a - b) ** 2).sum()) for b in x] for a in x])


def scores(x: np.ndarray, among: Sequence[int], f: int) -> dict[int, float]:
    d, near = square(x), max(1, len(among) - f - 2)
    return {i: sum(sorted(d[i, j] for j in among if j != i)[:near]) for i in among}


def bulyan(x: np.ndarray, f: int, one_pass: bool) -> np.ndarray:
    """Of the sorted chosen, the window of theta - 2f that reaches least far from the median."""
    left, chosen, theta = list(range(len(x))), [], len(x) - 2 * f
    for _ in range(theta):
        s = scores(x, range(len(x)) if one_pass else left, f)
        best = min(left, key=lambda i, s=s: (s[i], i))  # type: ignore[misc]
        chosen.append(best)
        left.remove(best)
    y, beta = np.sort(x[chosen], axis=0), theta - 2 * f
    middle, out = np.median(y, axis=0), np.empty(x.shape[1])
    for j in range(x.shape[1]):
        windows = [y[a : a + beta, j] for a in range(theta - beta + 1)]
        out[j] = min(windows, key=lambda w: max(abs(w - middle[j]))).mean()
    return out


def near(got: np.ndarray, want: np.ndarray, rows: Tensor) -> bool:
    """One rounding to fp32 of an fp64 result, itself within 1e-12 of the largest update."""
    bound = 1.01 * EPS * np.abs(want) + 1e-12 * float(rows.abs().max())
    return bool((np.abs(got - want) <= bound).all())


# -- by hand ------------------------------------------------------------------------------------


def test_numbers_by_hand() -> None:
    assert scalar("median", [1, 2, 10]) == 2 and scalar("median", [1, 4, 2, 10]) == 3
    assert scalar("trimmed_mean", [0, 100, 1, 6, 2]) == 3
    hand = [0.0, 1, 2, 4, 100]
    want = {i: s * LAYOUT.size for i, s in enumerate((5, 2, 5, 13, 18820))}
    x = np.tile(np.array(hand)[:, None], (1, LAYOUT.size))
    assert scores(x, range(5), 1) == want and scalar("krum", hand, f=1) == 1
    assert scalar("multi_krum", hand, f=1) == scalar("multi_krum", hand) == 7 / 4
    assert scalar("multi_krum", hand, f=1, c=2) == 0.5
    assert scalar("bulyan", [0, 5, 6, 7, 8, 9, 20], f=1) == 6
    assert scalar("bulyan", [0, 5, 6, 7, 8, 9, 20], f=1, one_pass=True) == 7
    once = scalar("geometric_median", [0, 0, 3], iterations=1)
    assert abs(once - 0.6) <= 1.01 * EPS * 0.6


# -- oracles ------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 10, 21])
def test_numbers_of_their_own(m: int) -> None:
    rows = random_rows(m, m)
    x = rows.double().numpy()
    assert near(move("median", rows), np.median(x, axis=0), rows)
    for beta in (0.0, 0.1, 0.2, 0.29, 0.49):
        cut = int(Fraction(str(beta)) * m)
        want = np.sort(x, axis=0)[cut : m - cut].mean(0)
        assert near(move("trimmed_mean", rows, {"beta": beta}), want, rows)
    if m % 2:
        beta = (m - 1) / 2 / m + 1e-9
        assert (move("trimmed_mean", rows, {"beta": beta}) == move("median", rows)).all()


def test_a_share_is_the_one_that_was_written() -> None:
    """0.29 * 100 is 28.999... in floats: 28 with int()."""
    from fedsim.strategies.trimmed_mean import TrimmedMean

    assert TrimmedMean(0.29).cut(100) == 29 and int(0.29 * 100) == 28
    assert TrimmedMean(0.4999999999).cut(2) == 0


@pytest.mark.parametrize("m, f", [(3, 0), (5, 1), (6, 1), (7, 2), (11, 4), (12, 2)])
def test_krum_and_multi_krum(m: int, f: int) -> None:
    for seed in range(4):
        rows = random_rows(10 * m + seed, m)
        x = rows.double().numpy()
        s = scores(x, range(m), f)
        order = sorted(range(m), key=lambda i: (s[i], i))
        assert (move("krum", rows, {"f": f}) == x[order[0]]).all()
        assert (move("multi_krum", rows, {"f": f, "c": 1}) == x[order[0]]).all()
        w = np.arange(1.0, m + 1)
        for c in range(2, m - f + 1):
            options = {"f": f, "c": c}
            got = move("multi_krum", rows, options, w.tolist())
            assert near(got, x[order[:c]].mean(0), rows)
        got = move("multi_krum", rows, {"f": f, "c": m - f, "weighted": True}, w.tolist())
        assert near(got, np.average(x[order[: m - f]], axis=0, weights=w[order[: m - f]]), rows)


@pytest.mark.parametrize("m, f", [(3, 0), (7, 1), (8, 1), (11, 2), (16, 3)])
@pytest.mark.parametrize("one_pass", [False, True])
def test_bulyan(m: int, f: int, one_pass: bool) -> None:
    for seed in range(3):
        rows = random_rows(10 * m + seed, m)
        got = move("bulyan", rows, {"f": f, "one_pass": one_pass})
        assert near(got, bulyan(rows.double().numpy(), f, one_pass), rows)


def test_one_ranking_is_not_bulyan() -> None:
    """Flower's `Bulyan` takes the theta best of one ranking: mostly others are chosen."""
    differ = 0
    for seed in range(10):
        rows = random_rows(seed, 15)
        x, iterated = rows.double().numpy(), move("bulyan", rows, {"f": 3})
        assert near(iterated, bulyan(x, 3, False), rows)
        differ += not near(iterated, bulyan(x, 3, True), rows)
    assert differ >= 5


def test_distances_are_of_updates() -> None:
    """Rows around 1000, updates around 0.1: fp32 products of whole rows, as Flower's
    `compute_distances`, lose distances of order 1 beside norms of 1e8; those of updates do not."""
    wrong, start = 0, 1000 * random_rows(99, 1)[0]
    for seed in range(10):
        rows = start + 0.1 * random_rows(seed, 9)
        x = (rows - start).double().numpy()
        s = scores(x, range(9), 3)
        best = min(s, key=lambda i: (s[i], i))
        got = step(load("krum", {"f": 3}), ServerState(0, start), rows, [1.0] * 9)
        assert torch.equal(got.row, start + (rows[best] - start))
        raw = rows.numpy()
        norms = np.square(raw).sum(axis=1)
        d = norms[:, None] + norms[None, :] - 2 * raw @ raw.T
        wrong += int(np.argmin(np.sort(d, axis=1)[:, 1:5].sum(axis=1))) != best
    assert wrong >= 5


@pytest.mark.parametrize("name", NAMES)
def test_starts_of_their_own(name: str) -> None:
    """Clients of lower ranks start from their own cut of the row: all that counts is the update."""
    starts, d = 10 * random_rows(1, 7).round(), random_rows(2, 7)
    rows = starts + d
    block = replace(next(blocks(ZERO, rows)), start=starts)
    plan, rule = plan_of([1.0] * 7), load(name)
    got = rule.aggregate(ServerState(0, ZERO), plan, iter([block]), reduce(), Kept())
    assert (got.row.double().numpy() == move(name, rows - starts)).all()


def pull(z: np.ndarray, x: np.ndarray, p: np.ndarray) -> tuple[float, np.ndarray]:
    """||gradient|| of sum p_k ||z - x_k||, and the distances."""
    d = np.linalg.norm(z - x, axis=1)
    return float(np.linalg.norm(((p / d)[:, None] * (z - x)).sum(0))), d


@pytest.mark.parametrize("m", [3, 4, 9])
@pytest.mark.parametrize("equal", [False, True])
def test_geometric_median_pulls_cancel(m: int, equal: bool) -> None:
    """Weiszfeld's step times sum w is the gradient: its tolerance bounds it, and rounding z to fp32
    moves it by no more than sum w times that."""
    rows, w = random_rows(m, m), np.arange(1.0, m + 1)
    x, p = rows.double().numpy(), np.ones(m) / m if equal else w / w.sum()
    for tolerance in (1e-6, 0.0):
        options = {"equal": equal, "tolerance": tolerance, "iterations": 1000}
        z = move("geometric_median", rows, options, w.tolist())
        force, d = pull(z, x, p)
        size = np.linalg.norm(z)
        assert force <= 1.01 * float((p / d).sum()) * size * (tolerance + EPS) + 1e-13


def test_geometric_median_of_two_stays_on_the_segment() -> None:
    rows = random_rows(5, 2)
    x = rows.double().numpy()
    assert near(move("geometric_median", rows), x.mean(0), rows)
    z = move("geometric_median", rows, weights=[1.0, 1.5])
    t = float((z - x[0]) @ (x[1] - x[0]) / ((x[1] - x[0]) @ (x[1] - x[0])))
    off = np.linalg.norm(z - x[0] - t * (x[1] - x[0]))
    assert 0.5 < t <= 1 + EPS and off <= 2 * EPS * np.linalg.norm(z)


def test_geometric_median_of_a_majority_is_it() -> None:
    """Each step leaves less than q = 0.4 / 0.6 of the distance, so the last one, of 1e-6 ||z||
    or less, leaves q / (1 - q) = 2 of it; smoothing leaves nu q."""
    rows = random_rows(6, 10)
    rows[:6] = rows[0]
    rows[6:] *= 100
    z, x = move("geometric_median", rows), rows[0].double().numpy()
    size = float(np.linalg.norm(x))
    assert np.linalg.norm(z - x) <= 2e-6 * size + 1e-6 + EPS * size


def test_geometric_median_turns_with_the_updates() -> None:
    """Signs and places exactly; any rotation Q so that pulls cancel again: rounding Q x_k and z
    turns a unit vector by at most twice the rounding over its length."""
    rows = random_rows(7, 5)
    z = move("geometric_median", rows, {"tolerance": 0.0})
    order = torch.randperm(rows.shape[1], generator=torch.Generator().manual_seed(0))
    sign = torch.where(order % 2 == 0, 1.0, -1.0)
    got = move("geometric_median", rows[:, order] * sign, {"tolerance": 0.0})
    assert np.abs(got - z[order] * sign.numpy()).max() <= 2 * EPS * np.abs(z).max()

    generator = torch.Generator().manual_seed(1)
    n = rows.shape[1]
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0].numpy()
    x = rows.double().numpy()
    turned = torch.from_numpy(x @ q.T).float()
    back = move("geometric_median", turned, {"tolerance": 0.0}) @ q
    force, d = pull(back, x, np.ones(5) / 5)
    rounding = EPS * (np.linalg.norm(back) + np.linalg.norm(x, axis=1))
    assert force <= float((2 * rounding / d).mean())


# -- properties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [
    ("trimmed_mean", {"beta": 0.0}), ("multi_krum", {"f": 0}), ("multi_krum", {"f": 0, "c": 9}),
    ("bulyan", {"f": 0}),
])  # fmt: skip
def test_without_attackers_it_is_the_uniform_mean(name: str, options: dict[str, Any]) -> None:
    rows = random_rows(8, 9)
    got, want = move(name, rows, options), move("fedavg", rows, {"equal": True})
    assert np.abs(got - want).max() <= 2 * EPS * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_work_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64 sums of parts differ by 1e-15, and so their roundings to fp32 by one unit."""
    rows = random_rows(9, 11)
    whole = move(name, rows)
    for numbers in (1, 77, 11 * 50):
        monkeypatch.setattr(median, "_NUMBERS", numbers)
        assert len(median.columns(rows)) > 1
        assert (np.abs(move(name, rows) - whole) <= 2.02 * EPS * np.abs(whole)).all()


@pytest.mark.parametrize("name, options, values, ids, want", [
    ("krum", {}, [1, 2], [7, 3], 2),
    ("krum", {}, [5, 1, 2], [1, 9, 4], 2),
    ("multi_krum", {"c": 1}, [5, 1, 2], [1, 4, 9], 1),
    ("multi_krum", {"c": 2, "f": 1}, [0, 1, 2, 4, 100], [9, 8, 7, 6, 5], 1.5),
    # The last choice is between 0 and 9; 20 is farther from both.
    ("bulyan", {}, [0, 5, 6, 7, 8, 9, 20], [1, 2, 3, 4, 5, 6, 7], 6),
    ("bulyan", {}, [0, 5, 6, 7, 8, 9, 20], [6, 2, 3, 4, 5, 1, 7], 7),
    ("bulyan", {}, [0, 5, 6, 7, 8, 9, 20], [2, 3, 4, 5, 6, 7, 1], 6),
])  # fmt: skip
def test_ties_go_to_the_smaller_id(
    name: str, options: dict[str, Any], values: list[float], ids: list[int], want: float
) -> None:
    """Ids, not places in the plan: lanes need not ascend."""
    rows = torch.tensor(values)[:, None].expand(-1, LAYOUT.size).float()
    plan = replace(plan_of([1.0] * len(ids)), client_ids=np.array(ids))
    rule = load(name, options)
    after = rule.aggregate(ServerState(0, ZERO), plan, blocks(ZERO, rows), reduce(), Kept())
    assert (after.row == want).all()


@pytest.mark.parametrize("name, times", [("krum", 2), ("multi_krum", 2), ("bulyan", 4)])
def test_how_many_attackers_a_round_allows(name: str, times: int) -> None:
    """By those that returned: m = times f + 3 is enough; one that failed is one too few."""
    m = times * 2 + 3
    rows = random_rows(10, m + 1)
    rule, server = load(name, {"f": 2}), ServerState(0, ZERO)
    ok = [True] * (m + 1)
    ok[4] = False
    rows[4] = float("nan")
    step(rule, server, rows, [1.0] * (m + 1), ok)
    ok[1] = False
    with pytest.raises(RunError, match=rf"round 1: f = 2 .* m = {m - 1} .*at least .* = {m}"):
        step(rule, server, rows, [1.0] * (m + 1), ok)
    with pytest.raises(ConfigError, match=rf"f = 2 .* m = {m - 1} clients"):
        rule.rule(server, plan_of([1.0] * (m - 1)))
    free, rows = load(name), random_rows(10, m)
    for count in range(1, m + 1):  # the largest f that is allowed
        f = max(0, (count - 3) // times)
        fixed = {"f": f} if count >= 3 else {}
        assert (move(name, rows[-count:]) == move(name, rows[-count:], fixed)).all()
        assert free.rule(server, plan_of([1.0] * count)).start is ZERO


def test_options_that_cannot_be() -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("trimmed_mean", {"beta": 0.5}), ("trimmed_mean", {"beta": -0.1}), ("krum", {"f": -1}),
        ("krum", {"f": 1.5}), ("multi_krum", {"c": 0}), ("geometric_median", {"nu": 0.0}),
        ("geometric_median", {"iterations": 0}), ("median", {"beta": 0.2}),
    ]  # fmt: skip
    for name, options in bad:
        with pytest.raises(ConfigError):
            load(name, options)
    with pytest.raises(RunError, match=r"c = 5 of m = 5 .* at most m - f = 4"):
        move("multi_krum", random_rows(1, 5), {"c": 5, "f": 1})


# -- attackers ----------------------------------------------------------------------------------

KEY, F, H = 5, 3, 12  # 15 clients allow Bulyan 3 attackers
KINDS_OF_ATTACK: list[tuple[str, dict[str, Any]]] = [
    ("sign_flip", {"factor": 1.0}), ("sign_flip", {"factor": 100.0}), ("scale", {"factor": 1e6}),
    ("gaussian", {"std": 1e3}), ("a_little", {}), ("a_little", {"z": 1.5}),
    ("a_little", {"z": -50.0}), ("mixed", {}), ("one number", {}), ("inlier", {}),
]  # fmt: skip


def attacked(kind: str, options: dict[str, Any]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """All updates; those of the honest; of the attackers, which sit at places 0, 6 and 13."""
    rows, bad = random_rows(11, H + F) + 0.3 * random_rows(12, 1), np.zeros(20, dtype=bool)
    bad[[0, 6, 13]] = True
    honest = rows[~bad[: H + F]]
    if kind == "mixed":
        rows[0], rows[6], rows[13] = 1e4 * rows[0], -1e-3 * rows[6], honest.min(0).values
    elif kind == "one number":  # Krum's blind spot: close enough as a whole, and far in one number
        rows[[0, 6, 13]] = honest.mean(0)
        rows[[0, 6, 13], 3] += 6.0
    elif kind == "inlier":
        rows[[0, 6, 13]] = honest.sort(0).values[4]
    else:
        how = attack.attack(kind, options)
        plan = plan_of([1.0] * (H + F))
        sent = attack.poison(
            how, blocks(ZERO, rows), plan=plan, bad=bad, layout=LAYOUT, up=KINDS, key=KEY,
        )  # fmt: skip
        rows = torch.cat([u.row for u in sent])
    x = rows.double().numpy()
    return rows, x[~bad[: H + F]], x[bad[: H + F]]


@pytest.mark.parametrize("kind, options", KINDS_OF_ATTACK)
def test_no_number_leaves_the_honest_range(kind: str, options: dict[str, Any]) -> None:
    """With cut >= f, place i of all lies between places i - f and i of the honest, whatever f
    attackers send: so the mean of the places that are kept lies between the honest ones' means."""
    rows, honest, _ = attacked(kind, options)
    m, h = H + F, np.sort(honest, axis=0)
    for name, cut in (("trimmed_mean", 3), ("median", 7)):
        got = move(name, rows)
        low, high = h[cut - F : m - cut - F].mean(0), h[cut : m - cut].mean(0)
        slack = 1.01 * EPS * np.abs(got)
        assert (low - slack <= got).all() and (got <= high + slack).all()
        assert (np.abs(got - honest.mean(0)) <= h[-1] - h[0]).all()


def reach(honest: np.ndarray, m: int, f: int) -> float:
    """How far from every honest update Krum's choice can lie.

    An honest one scores at most (m - f - 2) D^2, D the honest diameter, as it has that many honest
    neighbours. An attacker at distance L of all honest ones scores at least (m - 2f - 1) L^2: at
    most f - 1 of its neighbours are attackers. So L^2 <= D^2 (m - f - 2) / (m - 2f - 1).
    """
    return float(np.sqrt(square(honest).max() * (m - f - 2) / (m - 2 * f - 1)))


@pytest.mark.parametrize("kind, options", KINDS_OF_ATTACK)
@pytest.mark.parametrize("f", [3, 6])
def test_krum_chooses_within_reach(kind: str, options: dict[str, Any], f: int) -> None:
    rows, honest, bad = attacked(kind, options)
    far = reach(honest, H + F, f)
    got = move("krum", rows, {"f": f})
    assert np.linalg.norm(honest - got, axis=1).min() <= far
    # Each of Multi-Krum's c <= m - f scores no more than the worst of m - f honest ones; its mean
    # is within reach and one diameter of every honest update.
    mean = move("multi_krum", rows, {"f": f})
    wide = (far + np.sqrt(square(honest).max())) * (1 + EPS)
    assert (np.linalg.norm(honest - mean, axis=1) <= wide).all()
    if np.linalg.norm(bad[:, None] - honest, axis=2).min() > far:  # outliers are never chosen
        assert (honest == got).all(axis=1).any()
        bound = 1.01 * EPS * np.abs(mean) + 1e-12
        lowest, highest = honest.min(0) - bound, honest.max(0) + bound
        assert ((lowest <= mean) & (mean <= highest)).all()


@pytest.mark.parametrize("kind, options", KINDS_OF_ATTACK)
@pytest.mark.parametrize("one_pass", [False, True])
def test_bulyan_holds_every_number(kind: str, options: dict[str, Any], one_pass: bool) -> None:
    """The chosen hold at most f attackers and theta - f >= theta - 2f honest ones, so their median
    is in the honest range, and the k-th closest is no farther from it than the k-th closest honest
    one, which is at most the range."""
    rows, honest, _ = attacked(kind, options)
    got = move("bulyan", rows, {"f": F, "one_pass": one_pass})
    low, high = honest.min(0), honest.max(0)
    slack = 1.01 * EPS * np.abs(got) + 1e-12
    assert (got >= low - (high - low) - slack).all() and (got <= high + (high - low) + slack).all()


def test_one_number_moves_krum_and_not_bulyan() -> None:
    rows, honest, _ = attacked("one number", {})
    high = honest[:, 3].max()
    assert move("krum", rows, {"f": F})[3] > high
    assert move("bulyan", rows, {"f": F})[3] <= high


@pytest.mark.parametrize("kind, options", KINDS_OF_ATTACK)
def test_geometric_median_stays_near(kind: str, options: dict[str, Any]) -> None:
    """||z - c|| <= (2 (1 - a) r + e) / (1 - 2a): r the honest radius around their mean c, a the
    attackers' share, e by how much z misses the minimum, at most nu for smoothing where its
    objective is no worse than c's."""
    rows, honest, _ = attacked(kind, options)
    z, c, a = move("geometric_median", rows), honest.mean(0), F / (H + F)
    x = rows.double().numpy()
    cost = [float(np.linalg.norm(p - x, axis=1).mean()) for p in (z, c)]
    assert cost[0] <= cost[1] * (1 + 2e-15) + 1e-6
    r = float(np.linalg.norm(honest - c, axis=1).max())
    assert np.linalg.norm(z - c) <= (2 * (1 - a) * r + 1e-6) / (1 - 2 * a) + EPS * np.linalg.norm(z)


@pytest.mark.parametrize("kind, options", KINDS_OF_ATTACK)
def test_fedavg_goes_where_the_attackers_pull(kind: str, options: dict[str, Any]) -> None:
    """By f/m of their distance, and so out of the honest range, and beyond every bound above, as
    soon as they are loud."""
    rows, honest, bad = attacked(kind, options)
    got, c = move("fedavg", rows), honest.mean(0)
    bound = 2 * EPS * (np.abs(got) + np.abs(rows.double().numpy()).mean(0))
    assert (np.abs(got - c - F / (H + F) * (bad.mean(0) - c)) <= bound).all()
    loud = max(options.get("factor", 0), options.get("std", 0), abs(options.get("z", 0))) >= 50
    outside = (got < honest.min(0)) | (got > honest.max(0))
    if loud:
        assert outside[USED].mean() > 0.5
        r = float(np.linalg.norm(honest - c, axis=1).max())
        assert np.linalg.norm(got - c) > 2 * r * (1 - F / (H + F)) / (1 - 2 * F / (H + F))
