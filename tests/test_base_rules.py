"""The classic rules against their pages' numbers, and on quadratics where the optimum is known.

SCAFFOLD and FedDyn must reach the minimum that FedAvg of several local steps misses. About 4 s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core import KINDS, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.errors import ConfigError
from fedsim.strategies import load
from tests.rules import EPS, LAYOUT, Kept, M, blocks, plan_of, random_rows, reduce, step

ZERO = torch.zeros(LAYOUT.size)
D = (0.5, -0.25, 0.75, 0.125)
ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")


def adaptive(name: str, b1: float, like: str) -> Iterator[float]:
    """x after every round of D with eta = tau = 0.5, as the paper and the two programs write it."""
    m, v, x = 0.0, 0.0 if like == "flower" else 0.25, 0.0
    for t, d in enumerate(D, start=1):
        m = d if like == "openfedllm" and t == 1 else b1 * m + (1 - b1) * d
        square, rate = (m if like == "openfedllm" else d) ** 2, 0.5
        v = {"fedadagrad": v + square, "fedadam": 0.99 * v + 0.01 * square,
             "fedyogi": v - 0.01 * square * float(np.sign(v - square))}[name]  # fmt: skip
        if name == "fedadam" and like == "flower":
            rate *= math.sqrt(1 - 0.99 ** (t + 1)) / (1 - b1 ** (t + 1))
        x += rate * m / (math.sqrt(v) + 0.5)
        yield x


def put(rule: Strategy, server: ServerState, plan: RoundPlan, rows: Tensor,
        ok: Sequence[bool] | None = None, memory: Kept | None = None) -> ServerState:  # fmt: skip
    memory = memory or Kept()
    after = rule.aggregate(server, plan, blocks(server.row, rows, ok), reduce(), memory)
    memory.commit()
    return after


def play(rule: Strategy, updates: Sequence[float]) -> list[float]:
    """x after rounds of scalar updates, from 0."""
    server, out = rule.start(ZERO, LAYOUT), []
    for d in updates:
        server = step(rule, server, (server.row + d)[None], [3.0])
        assert all(torch.isfinite(value).all() for value in server.memory.values())
        out.append(float(server.row[0]))
    return out


def follows(rule: Strategy, updates: Sequence[float], want: list[float], gain: float) -> bool:
    """A round rounds x_k and d, which `gain` rounds of movement magnify, and the new x."""
    largest = max(map(abs, want)) + max(map(abs, updates))
    off = [abs(a - b) for a, b in zip(play(rule, updates), want, strict=True)]
    return all(e <= t * (2 * gain + 1) * EPS * largest for t, e in enumerate(off, start=1))


@pytest.mark.parametrize("name, like", [*product(ADAPTIVE, ("paper", "flower", "openfedllm"))])
def test_adaptive_rounds(name: str, like: str) -> None:
    """Gain: x moves by eta m / (sqrt(v) + tau) <= m, as eta = tau."""
    for b1 in (0.0, 0.9):
        rule = load(name, {"eta": 0.5, "beta1": b1, "tau": 0.5, "like": like})
        assert follows(rule, D, [*adaptive(name, b1, like)], 1.0)
    assert follows(rule, D, [*adaptive(name, 0.9, "paper")], 1.0) == (like == "paper")


def test_yogi_and_adam_grow_alike_below_the_square() -> None:
    """v < d^2: both grow; v > d^2: both fall. Yogi by 0.01 d^2, Adam by 0.01 |v - d^2|."""
    for tau, d in ((0.1, 1.0), (1.0, 0.1)):
        for name, size in (("fedyogi", d**2), ("fedadam", abs(tau**2 - d**2))):
            rule = load(name, {"tau": tau})
            v = step(rule, rule.start(ZERO, LAYOUT), ZERO[None] + d, [1.0]).memory["v"]
            want = tau**2 + math.copysign(0.01 * size, d - tau)
            assert float((v - want).abs().max()) <= 4 * EPS * 0.01 * d**2


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_defaults_suit_lora(name: str) -> None:
    """d = 1e-3 in every round, ten AdamW steps at 1e-4: the common eta 0.1 goes 25 times as far."""
    for options, most, least in (({}, 5e-3, 1e-3), ({"eta": 0.1}, 1.0, 25e-3)):
        x = play(load(name, options), [1e-3] * 60)
        assert least / 2 < max(b - a for a, b in pairwise(x)) < most
    assert all(map(math.isfinite, play(load(name), [1e30, 1.0])))  # its square is none in fp32


def test_moments_by_hand() -> None:
    """fedavgm: d = 1 gives v = (1 - beta^t) / (1 - beta); and the study's was FedAvg."""
    one, ones = {"tau": 1.0, "eta": 1.0}, [1.0] * 3
    for name, options, updates, want in (
        ("fedadagrad", one, [1.0], [1 / (2**0.5 + 1)]), ("fedadam", one, [1.0], [0.05]),
        ("fedyogi", one, [2.0], [0.2 / (1.04**0.5 + 1)]), ("fedavgm", {"eta": 2.0}, [1.0], [2.0]),
        ("fedavgm", {"ema": True}, [1.0, 2.0], [1.0, 2.1]), ("fedavgm", {}, ones, [1.0, 2.9, 5.61]),
        ("fedavgm", {"nesterov": True}, ones, [1.9, 4.61, 8.049]),
    ):  # fmt: skip
        assert follows(load(name, options), updates, want, 3.0)
    plain = play(load("fedavg"), D)
    assert play(load("fedavgm", {"beta": 0.0}), D) == plain != play(load("fedavgm"), D)
    with pytest.raises(ConfigError, match="nesterov and ema"):
        load("fedavgm", {"nesterov": True, "ema": True})


@pytest.mark.parametrize(("name", "options"), [
    ("fedavgm", {"beta": 0.0}), ("fednova", {}), ("fedprox", {}), ("scaffold", {"equal": False}),
    ("fedadam", {"beta1": 0.0, "beta2": 0.0, "eta": 5.0, "tau": 1.0}),
])  # fmt: skip
def test_weights(name: str, options: dict[str, float]) -> None:
    """By examples, unless `equal`; FedAdam with these options goes to 5 d / (d + 1)."""
    rows, seen = ZERO + torch.tensor([[1.0], [4.0]]), []
    for more in ({}, {"equal": True}, {"like": "openfedllm"})[: 3 if name == "fedadam" else 2]:
        rule = load(name, {**options, **more})
        seen.append(float(step(rule, rule.start(ZERO, LAYOUT), rows, [1.0, 2.0]).row[0]))
    want = [15 / 4, 25 / 7, 25 / 7] if name == "fedadam" else [3.0, 2.5]
    assert np.allclose(seen, want, rtol=2 * EPS, atol=0)


def test_fednova() -> None:
    """By hand; n = 1 and 3: (1 + 12)/4 steps, (8 + 1.5)/4 a step. Equal steps are FedAvg."""
    rule, server = load("fednova"), ServerState(0, ZERO)
    for d, n, want in (((2.0, 8.0), (1, 1), 5.0), ((8.0, 2.0), (1, 1), 10.625),
                       ((8.0, 2.0), (1, 3), 13 / 4 * 9.5 / 4)):  # fmt: skip
        plan = replace(plan_of(n), steps=np.array([1, 4]))
        got = put(rule, server, plan, ZERO + torch.tensor(d)[:, None]).row
        assert float((got - want).abs().max()) <= EPS * want
    a, b = (step(r, server, random_rows(3, M), range(1, 7)).row for r in (load("fedavg"), rule))
    assert float((a - b).abs().max()) <= 2 * EPS * float(a.abs().max())


def fair(options: dict[str, float], rows: Tensor, losses: Sequence[float]) -> Tensor:
    rule, plan = load("qfedavg", options), plan_of(range(1, len(rows) + 1))
    sent = (replace(block, loss_first=np.array(losses)) for block in blocks(ZERO, rows))
    return rule.aggregate(ServerState(0, ZERO), plan, sent, reduce(), Kept()).row


def test_qfedavg() -> None:
    """By hand; q = 0; L = 1/lr = 1000 against the equation; a small L is the mean by F^q."""
    rows = torch.outer(torch.tensor([1.0, 3.0]), torch.eye(LAYOUT.size)[0])
    got = fair({"q": 1.0, "lipschitz": 1.0}, rows, [1.0, 2.0])
    assert abs(float(got[0]) - 7 / 13) <= EPS + 1e-10 and not got[1:].any()
    d, loss = random_rows(4, M), [0.5, 1.0, 1.5, 2.0, 0.0, 3.0]
    f, bound = torch.tensor(loss).double() + 1e-10, 2 * EPS * float(d.abs().max())
    assert float((fair({"q": 0.0}, d, loss) - d.mean(0)).abs().max()) <= bound
    top, h = (f**2) @ d.double(), 2 * f * d.double().square().sum(1)
    want = 1e3 * top / (1e6 * h.sum() + 1e3 * (f**2).sum())
    assert float((fair({"q": 2.0}, d, loss) - want).abs().max()) <= EPS * float(want.abs().max())
    want, rest = top / (f**2).sum(), 1e-9 * float(h.sum() / (f**2).sum())
    got = fair({"q": 2.0, "lipschitz": 1e-9}, d, loss)
    assert float((got - want).abs().max()) <= bound + rest * float(want.abs().max())


def test_qfedavg_of_a_client_without_labels() -> None:
    """It has no loss and, but for weight decay, no update: what is left is client 1's 1 / 2."""
    rows = torch.outer(torch.tensor([1.0, 0.5]), torch.eye(LAYOUT.size)[0])
    got = fair({"q": 1.0, "lipschitz": 1.0}, rows, [1.0, float("nan")])
    assert abs(float(got[0]) - 1 / 2) <= EPS + 1e-10


def test_a_schedule_may_end_at_rate_0() -> None:
    plan, memory, row = replace(plan_of([1.0] * M), lr=np.zeros(M)), Kept(), random_rows(1, 1)[0]
    for rule in (load("scaffold"), load("qfedavg")):
        got = put(rule, rule.start(row, LAYOUT), plan, row.repeat(M, 1), memory=memory)
        assert torch.equal(got.row, row) and not memory.now


# Quadratics: F_k(x) = 1/2 sum_j curve_kj (x_j - at_kj)^2

CURVE = 0.5 + 1.5 * torch.rand(M, LAYOUT.size, generator=torch.Generator().manual_seed(5)).double()
AT = random_rows(8, M).double()
OPTIMUM = (CURVE * AT).sum(0) / CURVE.sum(0)
RATE, STEPS = 0.1, 5
# Rows are fp32: a round rounds those of clients (again in c_k) and the server's, and errors shrink
# by (1 - 0.1 * 0.5)^5 = 0.77 a round: 3 EPS / (1 - 0.77) = 13 EPS.
FLOOR = 13 * EPS * float(AT.abs().max())
Local = Callable[[LocalRule, int, Tensor], Tensor]


def descend(make: Callable[..., torch.optim.Optimizer], scale: float, rule: LocalRule, client: int,
            control: Tensor) -> Tensor:  # fmt: skip
    """Steps down the gradient that `LocalRule` documents, of scale F_k."""
    x = torch.nn.Parameter(rule.start.double())
    optimiser = make([x], lr=RATE)
    for _ in range(STEPS):
        own = scale * CURVE[client] * (x.detach() - AT[client])
        x.grad = own + rule.prox_mu * (x.detach() - rule.start) - control
        x.grad += 0.0 if rule.correction is None else rule.correction
        optimiser.step()
    return x.detach()


sgd: Local = partial(descend, torch.optim.SGD, 1.0)
adam: Local = partial(descend, torch.optim.Adam, 1e-3)  # as small as a model's gradients


def solved(rule: LocalRule, client: int, control: Tensor) -> Tensor:
    """Where that gradient is zero."""
    curve, mu = CURVE[client], rule.prox_mu
    return (curve * AT[client] + mu * rule.start + control) / (curve + mu)


def round_of(who: Sequence[int], number: int = 1, rank: int = 3, population: int = M) -> RoundPlan:
    m = len(who)
    return replace(plan_of(range(1, m + 1), number, population), client_ids=np.array(who),
        steps=np.full(m, STEPS), lr=np.full(m, RATE), rank=np.full(m, rank))  # fmt: skip


def federate(rule: Strategy, local: Local, rounds: int, sample: int = M,
             fails: Sequence[int] = ()) -> tuple[float, ServerState, Kept]:  # fmt: skip
    """Rounds of these clients and the distance from the optimum; `fails` are NaN in odd rounds."""
    server, memory = rule.start(random_rows(6, 1)[0], LAYOUT), Kept()
    for number in range(1, rounds + 1):
        who = sorted(np.random.default_rng(number).choice(M, sample, replace=False).tolist())
        plan, terms = round_of(who, number), rule.rule(server, round_of(who, number))
        kept = [memory.read("control", c) if terms.control else None for c in who]
        rows = [local(terms, c, (ZERO if k is None else k).double()) for c, k in zip(who, kept)]
        ok = [not (client in fails and number % 2) for client in who]
        sent = torch.where(torch.tensor(ok)[:, None], torch.stack(rows).float(), float("nan"))
        server = put(rule, server, plan, sent, ok, memory)
    return float((server.row.double() - OPTIMUM).abs().max()), server, memory


def controls(memory: Kept) -> Tensor:
    return torch.stack([row.double() for row in memory.now.values()])


def test_scaffold_reaches_the_optimum() -> None:
    """With Adam only where a mean step counts as a gradient's size: at scale 1 it drowns it."""
    assert federate(load("fedavg"), sgd, 120)[0] > 1e-2
    rule = load("scaffold", {"scale": 1.0})
    assert federate(rule, sgd, 120)[0] <= FLOOR and federate(rule, sgd, 400, 3)[0] <= FLOOR
    ends = [federate(load("scaffold", {"scale": s}), adam, 60)[0] for s in (1.0, 1e-3)]
    assert ends[0] > 1.0 > 4 * ends[1]


def test_c_is_the_mean_of_all_controls() -> None:
    """Also with clients that were never there, whose c_k is 0, and with those that failed."""
    for rounds, (sample, fails) in product((1, 2, 9), ((M, ()), (M, (1, 4)), (3, ()))):
        _, server, memory = federate(load("scaffold"), sgd, rounds, sample, fails)
        assert rounds > 1 or len(memory.now) == sample - len(fails)
        error = float((server.memory["c"] - controls(memory).sum(0) / M).abs().max())
        assert error <= rounds * M * 2.0**-53 * float(controls(memory).abs().max())


def test_scaffold_by_hand() -> None:
    """K lr = 0.5, eta = 2; then c_0 = 2 - 4 + 1 / 0.5 = 0, c = 4 - 2 / 2, and client 1 fails."""
    rule, memory = load("scaffold", {"scale": 1.0, "eta": 2.0}), Kept()
    server, plan = rule.start(ZERO, LAYOUT), round_of([0, 1], population=2)
    for sent, c, kept, x in (([-1.0, -3.0], 4, [2, 6], -4), ([-1.0, math.nan], 3, [0, 6], -6)):
        ok = [not math.isnan(d) for d in sent]
        server = put(rule, server, plan, server.row + torch.tensor(sent)[:, None], ok, memory)
        assert (server.row == x).all() and (controls(memory) == torch.tensor(kept)[:, None]).all()
        terms = rule.rule(server, plan)
        assert terms.correction is not None and (terms.correction == c).all()
        assert terms.more_down == terms.more_up == LAYOUT.numel() and terms.control == "control"


def test_scaffold_of_a_lower_rank() -> None:
    """What a client does not have stays out of its c_k and of c; scale is 1 / sqrt(P)."""
    rule, memory, have = load("scaffold"), Kept(), LAYOUT.mask(KINDS)[None]
    server = replace(rule.start(ZERO, LAYOUT), memory={"c": have[0].double()})
    for a, b in LAYOUT.factors(have).values():
        a[:, 2:], b[..., 2:] = False, False
    rows = random_rows(9, 1) * have
    got = put(rule, server, round_of([0], rank=2), rows, memory=memory)
    want = -1.0 * have[0] - LAYOUT.numel() ** -0.5 / 0.5 * rows[0]  # K lr = 0.5
    for change in (memory.now["control", 0], M * (got.memory["c"] - server.memory["c"])):
        assert float((change - want).abs().max()) <= 3 * EPS * float(want.abs().max())


def test_feddyn() -> None:
    """h_k ends as the gradient of F_k, their sum is 0. By hand: x = 1; then h = -0.5 + 1 = 0.5."""
    rule = load("feddyn", {"alpha": 1.0})
    _, server, memory = federate(rule, solved, 4, 3, (1, 4))  # h is the mean of all N h_k
    error = (server.memory["h"] - controls(memory).sum(0) / M).abs().max()
    assert float(error) <= 4 * EPS * float(controls(memory).abs().max())
    for sample, rounds in ((M, 60), (3, 400)):
        off, server, memory = federate(rule, solved, rounds, sample)
        slopes = torch.stack([CURVE[c] * (OPTIMUM - AT[c]) for _, c in memory.now])
        assert off <= FLOOR and float((controls(memory) - slopes).abs().max()) <= 4 * FLOOR
    memory, plan, server = Kept(), round_of([0], population=1), rule.start(ZERO, LAYOUT)
    for end, x, h in ((0.5, 1.0, -0.5), (0.0, -0.5, 0.5)):
        server = put(rule, server, plan, ZERO[None] + end, memory=memory)
        seen = server.row[0], server.memory["h"][0], controls(memory)[0, 0]
        assert [float(value) for value in seen] == [x, h, h]


def test_fedprox() -> None:
    """The study's was FedAvg: mu must reach the clients; a larger one keeps them closer."""
    server, plan, moved = ServerState(0, random_rows(6, 1)[0]), round_of(range(M)), []
    assert load("fedprox").rule(server, plan).prox_mu > 0
    for mu in (0.0, 0.01, 0.1, 1.0, 10.0):
        terms = load("fedprox", {"mu": mu}).rule(server, plan)
        ends = [local(terms, c, ZERO.double()) for local in (sgd, solved) for c in range(M)]
        assert terms == replace(load("fedavg").rule(server, plan), prox_mu=mu)
        moved.append((torch.stack(ends) - server.row).norm(dim=1))
    assert all((less < more).all() for more, less in pairwise(moved))
    x = torch.tensor(0.5, requires_grad=True)  # by hand, of the squared norm
    (0.5 * (x - 1) ** 2 + 1.0 / 2 * x**2).backward()
    assert x.grad == 0
