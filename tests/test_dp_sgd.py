"""DP-SGD in clients: against a loop over examples in float64, and what would break the guarantee.

The oracle is stock PEFT in float64, one example after another, autograd, clipping and AdamW in
torch. Adjacent data are data of which one example has no labels, and so no gradient: what a step
makes of them differs by the clip at most. About 25 s on one thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import cost, rehearsal, seeds, simulate, strategies
from fedsim.accountant import Ledger, epsilon
from fedsim.batch import PackedBatch
from fedsim.config import Config, build
from fedsim.core import KINDS, ClientUpdates, LocalRule, Population
from fedsim.dp_sgd import DPSGD, drawn
from fedsim.errors import ConfigError
from fedsim.folder import RunFolder
from fedsim.lora import Pass
from fedsim.plan import sampled
from fedsim.record import Meter
from fedsim.strategies.fedavg import FedAvg
from fedsim.train import Trainer
from tests.lab import (
    CLIENTS,
    DELTA,
    EXAMPLES,
    GRADIENT,
    KEY,
    STEPS,
    Lab,
    distance,
    labels,
    plan_of,
)
from tests.lab import without as unlabelled
from tests.lab import worst as worst_of
from tests.stock import Stock, watched
from tests.test_every_rule_runs import killed_and_resumed, state

# peft 0.21 reads a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
CLIP = 6.0  # the examples have gradients of norm 1 to 16
EXPECTED = 3  # q n: batches of 3 among 7


def private(**more: Any) -> dict[str, Any]:
    return {"privacy__level": "example", "privacy__noise": 1e-9, "privacy__clip": CLIP,
            "privacy__delta": 1e-3, **more}  # fmt: skip


class Loop:
    """One client, example by example, in float64."""

    def __init__(self, one: Lab, client: int, trained: Sequence[str] = KINDS) -> None:
        self.stock, self.one, self.client = Stock(one, client, torch.float64), one, client
        self.mask = one.base.layout.mask(trained)
        self.norms: list[float] = []

    def gradient(self, step: int, row: Tensor | None = None) -> Tensor:
        """g (P,) fp64, at weights (P,) if given."""
        if row is not None:
            self.stock.write(row)
        store, privacy = self.one.store, self.one.config.privacy
        assert privacy.clip is not None and privacy.noise is not None
        total = torch.zeros(len(self.mask), dtype=torch.float64)
        for example in self.one.batch(self.client, step):
            ids = torch.as_tensor(store.of(example))[None]
            wanted = labels(store, example)[None]
            self.stock.optimizer.zero_grad()
            self.stock.model(input_ids=ids, labels=wanted).loss.backward()
            g = torch.where(self.mask, self.stock.read(gradient=True), 0)
            self.norms.append(float(g.norm()))
            total += g * min(1.0, privacy.clip / self.norms[-1])
        noise = seeds.normal(KEY, seeds.Purpose.NOISE, len(total), client=self.client, round=1,
                             step=step)  # fmt: skip
        total += torch.where(self.mask, privacy.noise * privacy.clip * noise, 0)
        return total / min(self.one.config.train.batch, EXAMPLES)

    def train(self, steps: int) -> Tensor:
        """The row (P,) after so many steps."""
        for step in range(steps):
            g = self.gradient(step)
            for piece, weight in self.stock.weights.items():
                value = self.one.base.layout.view(g[None], piece)[0].view(weight.shape)
                frozen = not self.mask[piece.offset]
                weight.grad = None if frozen else value.clone()
            self.stock.optimizer.step()
        return self.stock.read().float()


# ----------------------------------------------------------------------------- against the loop


@pytest.mark.parametrize("mode", ["fast", "strict"])
def test_every_step_equals_a_loop_over_examples(
    lab: Callable[..., Lab], implementation: str, mode: str
) -> None:
    """Gradients of each step at the weights that it met; some examples are clipped, others not."""
    one, norms = lab(**private()), []
    for client in range(3):
        _, seen = watched(one, [client], 4, mode=mode)
        loop = Loop(one, client)
        for step, (weights, grads) in enumerate(seen):
            if len(one.batch(client, step)):
                want = loop.gradient(step, weights[0])
                assert worst_of(one.base.layout, grads, want[None]) <= GRADIENT
        norms += loop.norms
    assert min(norms) < CLIP / 1.5 and max(norms) > CLIP * 1.5


@pytest.mark.parametrize(
    "company",
    [{}, {"slots": 2, "budget_tokens": 40}, {"budget_tokens": 1 << 14}, {"mode": "strict"}],
)
def test_clients_learn_what_the_loop_learns(
    lab: Callable[..., Lab], company: dict[str, Any]
) -> None:
    """With noise, whatever shares a pass, and AdamW without a clipping of its own."""
    one = lab(**private(privacy__noise=0.3), train__clip_norm=1e-4)
    rows, ok = one.train(range(CLIENTS), **company)
    assert ok.all()
    for client in range(CLIENTS):
        want = Loop(one, client).train(STEPS[client])
        assert distance(rows[client, None], want[None], one.start) <= DELTA


@pytest.mark.parametrize("trained", [("A",), ("B", "mag")])
def test_only_what_trains_is_clipped_and_noised(
    lab: Callable[..., Lab], trained: tuple[str, ...]
) -> None:
    """The norm is of these numbers alone; frozen ones stay bit for bit."""
    one = lab(**private(privacy__noise=0.3), adapter__dora=True)
    rule = LocalRule(one.start, trained=trained)
    rows = torch.cat([b.row for b in one.trainer().train(plan_of([0, 1]), rule, Meter())])
    mask = one.base.layout.mask(trained)
    assert torch.equal(rows[:, ~mask], one.start[~mask].expand(2, -1))
    for client in (0, 1):
        want = Loop(one, client, trained).train(STEPS[client])
        assert distance(rows[client, None], want[None], one.start) <= DELTA


def test_steps_that_drew_nobody(lab: Callable[..., Lab]) -> None:
    """q = 1/7: 6 steps of each, of which many are noise alone; their loss is of nobody."""
    one = lab(**private(privacy__noise=0.3), train__batch=1)
    plan = replace(plan_of(range(CLIENTS)), steps=np.full(CLIENTS, 6))
    blocks = list(one.trainer(slots=3).train(plan, LocalRule(one.start), Meter()))
    counts = [[len(one.batch(c, s)) for s in range(6)] for c in range(CLIENTS)]
    assert {0, 1, 2} <= {n for count in counts for n in count}
    assert any(not count[-1] for count in counts) and any(count[-1] for count in counts)
    for client, block in enumerate(blocks):
        want = Loop(one, client).train(6)
        assert block.ok.all() and distance(block.row, want[None], one.start) <= DELTA
        assert np.isnan(block.loss_last).all() == (counts[client][-1] == 0)
        drew = sum(len(one.store.of(e)) for s in range(6) for e in one.batch(client, s))
        assert block.tokens.tolist() == [drew]


def test_the_loss_is_the_mean_of_the_examples(lab: Callable[..., Lab]) -> None:
    one = lab(**private(), train__batch=EXAMPLES)
    (block,) = one.trainer().train(plan_of([1], (1,) * CLIENTS), LocalRule(one.start), Meter())
    stock, losses = Stock(one, 1), []
    for example in one.batch(1, 0):
        ids = torch.as_tensor(one.store.of(example))[None]
        wanted = labels(one.store, example)[None]
        losses.append(stock.model(input_ids=ids, labels=wanted).loss.item())
    assert len(losses) == EXAMPLES and block.loss_first[0] == pytest.approx(np.mean(losses), 1e-5)


def test_a_lower_rank_has_noise_in_its_own_numbers(lab: Callable[..., Lab]) -> None:
    one = lab(**private(privacy__noise=1.0))
    plan = replace(plan_of([0, 1]), rank=np.array([2, 2]))
    rows = torch.cat([b.row for b in one.trainer().train(plan, LocalRule(one.start), Meter())])
    own = one.base.layout.mask(KINDS, 2)
    assert not rows[:, ~own].any() and (rows[:, own] != one.start[own]).all()


# ----------------------------------------------------------------------------------- the guarantee


def without(one: Lab, examples: Sequence[int]) -> Lab:
    """The same data of which these examples have no labels."""
    return replace(one, store=unlabelled(one.store, examples))


def first_gradient(one: Lab, client: int, **train: Any) -> Tensor:
    _, ((_, grads),) = watched(one, [client], 1, **train)
    return grads[0].double()


def test_no_example_moves_a_step_by_more_than_the_clip(lab: Callable[..., Lab]) -> None:
    """Each example of each client, as loud as it gets: B is large, so gradients are."""
    one = lab(**private(privacy__noise=0.2), train__batch=EXAMPLES)
    loud = replace(one, start=8 * one.start)
    for client in range(3):
        whole = first_gradient(loud, client)
        for example in range(client * EXAMPLES, (client + 1) * EXAMPLES):
            apart = (whole - first_gradient(without(loud, [example]), client)).norm()
            assert 0.9 * CLIP <= float(apart) * EXAMPLES <= CLIP * (1 + 1e-4)


def test_the_noise_is_that_of_the_clip(lab: Callable[..., Lab]) -> None:
    """Standard deviation z C / (q n): chi-square, 5 sigma; none in gaps; another in each step, for
    each client and in each round, the same one again for the same."""
    one = lab(**private(privacy__noise=0.7, privacy__clip=2.5))
    silent = without(one, range(CLIENTS * EXAMPLES))
    mask, std = one.base.layout.mask(KINDS), 0.7 * 2.5 / EXPECTED
    found = []
    for client in range(3):
        _, seen = watched(silent, [client], 6)
        found += [grads[0] for _, grads in seen]
    drawn_ = torch.stack(found)
    values = drawn_[:, mask].double() / std
    n = values.numel()
    assert abs(float(values.square().sum()) - n) <= 5 * math.sqrt(2 * n)
    assert abs(float(values.mean())) <= 5 / math.sqrt(n) and not drawn_[:, ~mask].any()
    apart = values @ values.T / math.sqrt(values.shape[1])  # N(0, 1) where rows are unrelated
    assert float(apart.fill_diagonal_(0).abs().max()) <= 6
    assert torch.equal(drawn_[0], first_gradient(silent, 0).float())


@pytest.mark.parametrize("norm", [0.0, 1e-30, 0.5, 1.0, 3.0, 1e30, math.inf, math.nan])
def test_a_clipped_gradient(lab: Callable[..., Lab], norm: float) -> None:
    one = lab(**private())
    trainer = one.trainer()
    sums = DPSGD.of(trainer.config, plan_of([0]), LocalRule(one.start), trainer.bank,
                    trainer.population, KEY)  # fmt: skip
    assert sums is not None
    direction = torch.where(one.base.layout.mask(KINDS), 1.0, 0.0)
    direction /= direction.norm()
    got = sums.clipped(direction * norm)
    want = min(norm, CLIP) if math.isfinite(norm) else 0.0
    assert got.isfinite().all() and torch.allclose(got, direction * want, rtol=1e-6, atol=0)


def test_a_client_cannot_tell_by_failing(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients that are not finite: the client learns noise, and returns."""
    one, plain = lab(**private(privacy__noise=0.3)), Trainer.backward

    def sick(self: Trainer, batch: PackedBatch, work: Pass) -> Tensor:
        loss = plain(self, batch, work)
        self.bank.grads[0] = math.nan
        return loss.index_fill(0, torch.tensor([0]), math.nan)

    monkeypatch.setattr(Trainer, "backward", sick)
    rows, ok = one.train([0])
    monkeypatch.undo()
    silent, _ = without(one, range(EXAMPLES)).train([0])
    assert ok.all() and torch.equal(rows, silent)


@pytest.mark.parametrize("n", [5, 7, 64])
def test_examples_join_by_themselves(n: int) -> None:
    """1,500 steps at q = 3/n: each example within 5 sigma of a binomial, pairs too, numbers drawn
    of its variance; another draw for each step, round and client."""
    q, took = 3 / n, np.zeros((1500, n))
    for i in range(1500):
        took[i, drawn(3, n, 5, client=i % 3, round=1 + i % 50, step=i // 150)] = 1
    sigma = math.sqrt(1500 * q * (1 - q))
    assert (abs(took.sum(0) - 1500 * q) <= 5 * sigma).all()
    pairs = (took.T @ took)[~np.eye(n, dtype=bool)]
    assert (abs(pairs - 1500 * q * q) <= 5 * math.sqrt(1500 * q * q * (1 - q * q))).all()
    assert 0.8 <= took.sum(1).var() / (n * q * (1 - q)) <= 1.25
    assert len(np.unique(took, axis=0)) >= min(1200, 0.8 * 2**n)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_everybody_where_there_are_few(n: int) -> None:
    assert all(drawn(3, n, 5, 0, 1, step).tolist() == list(range(n)) for step in range(20))


# ------------------------------------------------------------------------------------- the account


def config_of(**privacy: Any) -> Config:
    return build({
        "privacy": {"level": "example", "noise": 1.0, "clip": 1.0, "delta": 1e-3, **privacy},
        "clients": {"number": 5}, "server": {"rounds": 6, "fraction": 0.4},
        "train": {"steps": 4, "batch": 8},
    }, "here")  # fmt: skip


def test_the_account_is_of_the_most_betrayed() -> None:
    """Steps of its own visits, at its own q; asked round by round or at once."""
    config, sizes, key = config_of(), [5, 20, 20, 50, 300], 3
    population = Population(np.cumsum([0, *sizes]), np.arange(sum(sizes)))
    ledger, visits = Ledger(config, population, key), np.zeros(5, dtype=int)
    for round in range(1, 7):
        visits[sampled(config, 5, round, key)[0]] += 1
        each = [epsilon(q=min(1, 8 / n), noise=1.0, rounds=4 * v, delta=1e-3) if v else 0.0
                for n, v in zip(sizes, visits.tolist(), strict=True)]  # fmt: skip
        assert ledger.spent(round) == max(each)
    assert visits.sum() == 12 and len(set(visits.tolist())) > 1
    assert Ledger(config, population, key).spent(6) == max(each)


def test_delta_of_a_client_with_many_examples() -> None:
    population = Population(np.array([0, 5, 1005, 1006, 1007, 1008]), np.arange(1008))
    with pytest.raises(ConfigError, match="less than 1 / 1000"):
        Ledger(config_of(), population, 1)
    Ledger(config_of(delta=0.9e-3), population, 1)


# ------------------------------------------------------------------------------ rules and real runs


@pytest.mark.parametrize("rule", strategies.known())
def test_rules_that_need_losses_are_refused(settings: Callable[..., Config], rule: str) -> None:
    """All others may do as they like with updates that are private already."""
    config, strategy = settings(**private(), server__strategy=rule), strategies.load(rule)
    if rule != "qfedavg":
        rehearsal.wire(config, strategy)
        return
    with pytest.raises(ConfigError, match="needs losses"):
        simulate.run(config)


def test_the_server_sees_no_losses(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in the record of the simulation, and nowhere else."""
    seen: list[ClientUpdates] = []
    plain = FedAvg.step

    def spying(self: FedAvg, plan: Any, updates: Iterator[ClientUpdates], reduce: Any) -> Tensor:
        kept = list(updates)
        seen.extend(kept)
        return plain(self, plan, iter(kept), reduce)

    monkeypatch.setattr(FedAvg, "step", spying)
    folder = simulate.run(settings(**private(), evaluate__limit=0))
    assert len(seen) == 1 + 3 * 4  # the first is the rehearsal's
    for update in seen:
        figures = (update.loss_first, update.loss_last, update.tokens, [update.seconds])
        assert all(np.isnan(figure).all() for figure in figures)
    lines = RunFolder(folder).read("clients.jsonl")
    assert any(line["loss_first"] is not None for line in lines)


@pytest.mark.parametrize("rule", ["fedavg", "scaffold"])
def test_a_private_run_goes_on(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Killed in its second round and resumed: the same bits, and the same account."""
    more = private(server__strategy=rule, privacy__noise=0.5, evaluate__limit=2, train__batch=2)
    folder = simulate.run(settings(run__name="whole", **more))
    again = killed_and_resumed(settings(run__name="killed", **more), monkeypatch)
    whole, resumed = state(folder), state(again)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    spent = [[line["epsilon"] for line in RunFolder(f).read("rounds.jsonl")]
             for f in (folder, again)]  # fmt: skip
    assert spent[0] == spent[1] and 0 < spent[0][0] <= spent[0][1] <= spent[0][2]
    assert RunFolder(folder).read("rounds.jsonl")[0]["clip"] == CLIP


def test_the_plan_is_the_run(settings: Callable[..., Config]) -> None:
    """Epsilon, tokens and the passes of the first round."""
    config = settings(**private(privacy__noise=0.5), evaluate__limit=0)
    estimate = cost.estimate(config)
    lines = RunFolder(simulate.run(config)).read("rounds.jsonl")
    assert estimate.epsilon == lines[-1]["epsilon"] and estimate.work is not None
    assert estimate.work.tokens == sum(line["tokens"] for line in lines)
    shown = dict(estimate.lines())["privacy"]
    assert shown.startswith(f"epsilon {estimate.epsilon:.2f}") and "single examples" in shown


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"privacy": {"adaptive": True}}, r"privacy\.adaptive: got a value"),
        ({"privacy": {"quantile": 0.5}}, r"privacy\.quantile: got a value"),
        ({"privacy": {"noise": None}}, r"privacy\.noise: got nothing"),
        ({"privacy": {"clip": None}}, r"privacy\.clip: got nothing"),
        ({"run": {"protocol": "flowertune"}}, "the same examples at every visit"),
    ],
)
def test_a_guarantee_that_would_not_hold_is_an_error(more: dict[str, Any], said: str) -> None:
    whole = {"privacy": {"level": "example", "noise": 0.5, "clip": 1.0}}
    values = {**whole, **more, "privacy": {**whole["privacy"], **more.get("privacy", {})}}
    with pytest.raises(ConfigError, match=said):
        build(values, "here")
