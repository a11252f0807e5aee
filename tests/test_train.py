"""Continuous clients: slots that refill, passes that are filled, and nobody who notices.

Proved here, on tiny random models: clients of very different sizes that share two or three slots
learn what they learn alone; a slot keeps nothing of the client before; a pass needs no more memory
than the slots have; clients of a lower rank learn exactly what an adapter of that rank learns;
LoRA+ is AdamW with two parameter groups; in strict mode no packing changes a bit; the plan's
figures are the run's. About 40 s on one thread.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim import cost, simulate
from fedsim.adapters import AdapterBank, initial_row
from fedsim.config import Config
from fedsim.core import ClientUpdates, LocalRule, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.model import Base
from fedsim.plan import step_examples
from fedsim.record import Meter
from fedsim.train import Trainer
from tests.lab import DELTA, KEY, distance, open_base, stored

M = 7
SIZES = (3, 20, 5, 30, 9, 2, 12)  # examples of each client
STEPS = (1, 7, 2, 10, 3, 1, 4)
CPU = torch.device("cpu")


def examples(seed: int = 5) -> TokenStore:
    """Sequences of 12 to 60 tokens, longer for some clients than for others. Each client's begin
    alike; some have no labels. The seed changes tokens, but no length."""
    shape, rng = np.random.default_rng(5), np.random.default_rng(seed)
    ids, starts = [], []
    for c, size in enumerate(SIZES):
        prefix = rng.integers(1, 384, 8 + c)
        for e in range(size):
            answer = 0 if e % 6 == 5 else int(shape.integers(1, 5))
            own = int(shape.integers(3, 10 + 5 * c)) + answer
            ids.append(np.concatenate([prefix, rng.integers(1, 384, own)]))
            starts.append(len(ids[-1]) - answer)
    return stored(ids, starts)


@dataclass(frozen=True)
class Lab:
    """One base and its clients, trained in any company."""

    config: Config
    base: Base
    start: Tensor
    store: TokenStore

    def plan(self, clients: Sequence[int], rank: int | Sequence[int] | None = None) -> RoundPlan:
        ids, m = np.array(clients), len(clients)
        ranks = np.broadcast_to(self.config.adapter.rank if rank is None else rank, m)
        return RoundPlan(
            round=1, client_ids=ids, weights=1.0 + ids, rank=ranks, scale=2.0 - 0.1 * ids,
            steps=np.array(STEPS)[ids], lr=1e-2 * (1 + ids % 3), version=np.zeros(m, int),
            lanes=(np.arange(m),), population=len(SIZES),
        )  # fmt: skip

    def trainer(self, **train: Any) -> Trainer:
        section = self.config.train.model_copy(update=train)
        config = self.config.model_copy(update={"train": section})
        offsets = np.concatenate([[0], np.cumsum(SIZES)])
        population = Population(offsets, np.arange(sum(SIZES)))
        return Trainer(self.base, self.store, population, config, KEY)

    def updates(
        self, clients: Sequence[int], *, rank: int | Sequence[int] | None = None,
        meter: Meter | None = None, **train: Any,
    ) -> list[ClientUpdates]:  # fmt: skip
        plan = self.plan(clients, rank)
        return list(self.trainer(**train).train(plan, LocalRule(self.start), meter or Meter()))

    def rows(self, clients: Sequence[int], **how: Any) -> dict[int, Tensor]:
        """client -> what it learnt, all of them healthy."""
        done = self.updates(clients, **how)
        assert all(u.ok.all() for u in done)
        return {c: u.row[0] for c, u in zip(clients, done, strict=True)}


@pytest.fixture
def lab(settings: Callable[..., Config]) -> Callable[..., Lab]:
    def make(architecture: str = "llama", seed: int = 5, **changes: Any) -> Lab:
        changes = {"data__max_length": 64, "clients__number": M, "server__fraction": 1.0, **changes}
        config = settings(architecture, **changes)
        base = open_base(config)
        start = initial_row(base.layout, KEY)
        generator = torch.Generator().manual_seed(3)
        for _, b in base.layout.factors(start[None]).values():
            b.normal_(std=0.05, generator=generator)
        return Lab(config, base, start, examples(seed))

    return make


# ---------------------------------------------------------------------------- slots that refill


@pytest.mark.parametrize("shared_prefix", [False, True])
@pytest.mark.parametrize(("slots", "budget"), [(2, 64), (3, 150), (3, 400), (7, 1000)])
def test_clients_of_any_size_learn_what_they_learn_alone(
    lab: Callable[..., Lab], slots: int, budget: int, shared_prefix: bool
) -> None:
    one, meter = lab(), Meter()
    how = {"shared_prefix": shared_prefix}
    together = one.updates(range(M), slots=slots, budget_tokens=budget, meter=meter, **how)
    assert [int(u.index[0]) for u in together] == list(range(M))
    for client, got in enumerate(together):
        (alone,) = one.updates([client], slots=1, budget_tokens=10_000, **how)
        assert distance(got.row, alone.row, one.start) <= DELTA
        owned = np.arange(sum(SIZES[:client]), sum(SIZES[: client + 1]))
        steps = [step_examples(one.config, owned, KEY, client, 1, s) for s in range(STEPS[client])]
        assert got.tokens == sum(one.store.lengths[e].sum() for e in steps)
        assert got.ok.all()
        # The first loss is that of the start; later ones are of weights that differ in rounding.
        assert got.loss_first == pytest.approx(alone.loss_first, rel=1e-5, nan_ok=True)
        assert got.loss_last == pytest.approx(alone.loss_last, rel=1e-2, nan_ok=True)
    assert meter.steps == meter.steps_done == sum(STEPS)
    assert meter.tokens == sum(int(u.tokens.sum()) for u in together)
    assert meter.utilisation is not None and 0 < meter.utilisation <= 1


def test_updates_come_while_others_train(lab: Callable[..., Lab]) -> None:
    """Clients of two steps, two slots: the first is there before the last ones begin."""
    one, meter = lab(), Meter()
    plan = replace(one.plan(range(M)), steps=np.full(M, 2))
    coming = one.trainer(slots=2, budget_tokens=150).train(plan, LocalRule(one.start), meter)
    assert int(next(coming).index[0]) == 0 and meter.steps <= 6
    assert len(list(coming)) == M - 1 and meter.steps == 2 * M


def test_same_run_same_bits(lab: Callable[..., Lab]) -> None:
    one = lab()
    first, second = (one.rows(range(M), slots=3, budget_tokens=150) for _ in range(2))
    assert all(torch.equal(first[c], second[c]) for c in range(M))


def test_data_of_the_client_before_changes_no_bit(lab: Callable[..., Lab]) -> None:
    """One slot, three clients one after another; only the first one's tokens differ."""
    one = lab()
    other = examples(seed=6)
    mixed = one.store.ids.copy()
    end = one.store.offsets[SIZES[0]]
    mixed[:end] = other.ids[:end]
    ours = one.rows([0, 1, 2], slots=1)
    theirs = replace(one, store=replace(one.store, ids=mixed)).rows([0, 1, 2], slots=1)
    assert not torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_sick_client_leaves_nothing_in_its_slot(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    """Clients 0 and 3 are sick from the start; those that have their slots later do not notice."""
    one, how = lab(), {"slots": 2, "budget_tokens": 150}
    healthy = one.rows(range(M), **how)
    entered: list[int] = []
    load = AdapterBank.load

    def poisoned(self: AdapterBank, slot: int, row: Tensor) -> None:
        load(self, slot, row)
        entered.append(slot)
        if len(entered) in (1, 4):
            self.rows[slot] *= poison

    monkeypatch.setattr(AdapterBank, "load", poisoned)
    got = one.updates(range(M), **how)
    sick = [c for c, u in enumerate(got) if not u.ok[0]]
    assert len(sick) == 2 and len(entered) == M
    for client, update in enumerate(got):
        if client in sick:
            assert torch.equal(update.row[0].nan_to_num(9), (one.start * poison).nan_to_num(9))
        else:
            assert torch.equal(update.row[0], healthy[client])


def test_a_client_that_was_sick_once_stays_out(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of client 1's gradients is NaN: it rests where it is; its slot goes on."""
    one, how = lab(), {"slots": 2, "budget_tokens": 150}
    healthy = one.rows(range(M), **how)
    step, seen = AdapterBank.step, []

    def spy(self: AdapterBank, **given: Any) -> Tensor:
        for slot in range(2):
            if given["active"][slot] and torch.equal(self.rows[slot], marked["row"]):
                seen.append(slot)
                self.grads[slot] = float("nan")
        return step(self, **given)

    # Client 1's row after its first step, found by training it for one step.
    plan = one.plan(range(M))
    short = replace(plan, steps=np.where(plan.client_ids == 1, 1, plan.steps))
    first = list(one.trainer(**how).train(short, LocalRule(one.start), Meter()))[1].row[0]
    marked = {"row": first}
    monkeypatch.setattr(AdapterBank, "step", spy)
    got = one.updates(range(M), **how)
    assert len(seen) == 1 and [u.ok[0] for u in got] == [c != 1 for c in range(M)]
    assert torch.equal(got[1].row[0], first)
    for client in set(range(M)) - {1}:
        assert torch.equal(got[client].row[0], healthy[client])


# ---------------------------------------------------------------------------- slots and memory


def test_a_load_touches_its_slot_alone(lab: Callable[..., Lab]) -> None:
    bank = AdapterBank(lab().base.layout, 3, CPU)
    matrices = [bank.rows, bank.grads, bank._m, bank._v]
    for i, matrix in enumerate(matrices):
        matrix.fill_(float("nan") if i == 1 else 1 + i)
    before = [matrix.clone() for matrix in matrices]
    row = torch.randn(bank.rows.shape[1])
    bank.load(1, row)
    for matrix, old in zip(matrices, before, strict=True):
        assert torch.equal(matrix[[0, 2]].nan_to_num(9), old[[0, 2]].nan_to_num(9))
    assert torch.equal(bank.rows[1], row) and not bank._m[1].any() and not bank._v[1].any()
    held = {v.data_ptr(): v.numel() * v.element_size() for v in vars(bank).values()
            if isinstance(v, Tensor) and v.ndim == 2}  # fmt: skip
    assert sum(held.values()) == 16 * bank.rows.numel()


class Calls(TorchDispatchMode):
    """Notes every operation and the shapes of what it newly makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, set[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in args if isinstance(x, Tensor)}
        shapes = self.made.setdefault(str(func), set())
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.data_ptr() not in given:
                shapes.add(tuple(made.shape))
        return out


def test_a_pass_makes_no_matrix_and_asks_for_no_number(lab: Callable[..., Lab]) -> None:
    """A client more costs its row, gradient and moments: nothing of (K, P) is made on the way.
    And no value is read before the updates are: on a GPU, reading one stops the device."""
    one = lab(adapter__lora_plus=2.0)
    trainer = one.trainer(slots=3, budget_tokens=150)
    with Calls() as calls:
        list(trainer.train(one.plan(range(M)), LocalRule(one.start), Meter()))
    matrix = tuple(trainer.bank.rows.shape)
    assert [name for name, shapes in calls.made.items() if matrix in shapes] == []
    assert any("adamw" in name for name in calls.made)
    assert [n for n in calls.made if "local_scalar" in n or "nonzero" in n or "equal" in n] == []


# ---------------------------------------------------------------------------- ranks


def test_a_lower_rank_learns_what_an_adapter_of_that_rank_learns(lab: Callable[..., Lab]) -> None:
    """R = 4; clients of rank 1, 2, 3 and 4 beside each other, and rank r alone in a layout of r."""
    one = lab()
    layout, ranks = one.base.layout, [4, 2, 3, 1, 2, 4, 1]
    got = one.updates(range(M), rank=ranks, slots=3, budget_tokens=150)
    for client, (update, rank) in enumerate(zip(got, ranks, strict=True)):
        small = lab(adapter__rank=rank)
        mine = small.start[None].clone()
        for (a, b), (whole_a, whole_b) in zip(
            small.base.layout.factors(mine).values(),
            layout.factors(one.start[None]).values(), strict=True,
        ):  # fmt: skip
            a.copy_(whole_a[:, :rank])
            b.copy_(whole_b[:, :, :rank])
        (alone,) = replace(small, start=mine[0]).updates([client], slots=1)
        begun, learnt = layout.factors(update.start[None]), layout.factors(update.row)
        want = small.base.layout.factors(alone.row)
        inside = torch.zeros(1, small.base.layout.size)
        for name, (a, b) in small.base.layout.factors(inside).items():
            for i, part in enumerate((a, b)):
                used, rest = (slice(None, rank), slice(rank, None))
                cut = (slice(None), used) if i == 0 else (slice(None), slice(None), used)
                over = (slice(None), rest) if i == 0 else (slice(None), slice(None), rest)
                part.copy_(learnt[name][i][cut])
                assert not learnt[name][i][over].any() and not begun[name][i][over].any()
                whole = layout.factors(one.start[None])[name][i]
                assert torch.equal(begun[name][i][cut], whole[cut])
                assert (part != whole[cut]).any() and want[name][i].shape == part.shape
        assert distance(inside, alone.row, mine[0]) <= DELTA
        assert (update.delta == update.row - update.start).all()


# ---------------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_is_adamw_with_two_groups(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    """Fed the same gradients, within 1e-6 of torch.optim.AdamW and clip_grad_norm_, each step."""
    one = lab(adapter__lora_plus=ratio, train__weight_decay=0.1, train__clip_norm=0.05)
    layout, train, client = one.base.layout, one.config.train, 3
    seen: list[tuple[Tensor, Tensor]] = []
    step = AdapterBank.step

    def spy(self: AdapterBank, **given: Any) -> Tensor:
        seen.append((self.rows[0].clone(), self.grads[0].clone()))
        return step(self, **given)

    monkeypatch.setattr(AdapterBank, "step", spy)
    (update,) = one.updates([client], slots=1)
    rows = [row for row, _ in seen[1:]] + [update.row[0]]
    pairs = list(layout.factors(one.start[None].clone()).values())
    groups = [[nn.Parameter(pair[i][0].clone()) for pair in pairs] for i in (0, 1)]
    lr = float(one.plan([client]).lr[0])
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "lr": lr}, {"params": groups[1], "lr": ratio * lr}],
        betas=(train.beta1, train.beta2), eps=train.eps, weight_decay=train.weight_decay,
    )  # fmt: skip
    assert len(seen) == STEPS[client]
    for (_, grad), row in zip(seen, rows, strict=True):
        for name, pair in enumerate(layout.factors(grad[None]).values()):
            for i in (0, 1):
                groups[i][name].grad = pair[i][0].clone()
        nn.utils.clip_grad_norm_([*groups[0], *groups[1]], train.clip_norm)
        optimizer.step()
        for name, pair in enumerate(layout.factors(row[None]).values()):
            for i in (0, 1):
                torch.testing.assert_close(pair[i][0], groups[i][name].data, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- strict mode

STRICT = {"mode": "strict", "chunk_tokens": 96, "tile": 32}


@pytest.mark.parametrize(
    ("architecture", "dtype", "dropout"),
    [("llama", "float32", 0.0), ("llama", "float32", 0.3), ("llama", "bfloat16", 0.0),
     ("gemma2", "float32", 0.0), ("phi3", "bfloat16", 0.3)],
)  # fmt: skip
def test_strict_is_bit_for_bit_the_same_in_any_packing(
    lab: Callable[..., Lab], architecture: str, dtype: str, dropout: float
) -> None:
    """Slots, budgets, order, company, and steps of one or of several passes; mixed ranks."""
    one = lab(architecture, adapter__dropout=dropout, model__dtype=dtype)
    ranks = np.array([4, 2, 4, 3, 1, 2, 4])
    want = one.updates(range(M), rank=ranks, slots=4, budget_tokens=10_000, **STRICT)
    lots: list[tuple[Sequence[int], dict[str, int]]] = [
        (range(M), {"slots": 1, "budget_tokens": 10_000}),
        (range(M), {"slots": 2, "budget_tokens": 96}),
        (range(M), {"slots": 3, "budget_tokens": 200}),
        ((6, 2, 4, 0, 1, 5, 3), {"slots": 4, "budget_tokens": 512}),
        ((3, 1), {"slots": 2, "budget_tokens": 300}),
        *(([client], {"slots": 1, "budget_tokens": 96}) for client in (0, 3)),
    ]
    for clients, how in lots:
        updates = one.updates(clients, rank=ranks[list(clients)], **how, **STRICT)
        for client, got in zip(clients, updates, strict=True):
            assert torch.equal(got.row, want[client].row), (clients, how, client)
            np.testing.assert_array_equal(got.loss_first, want[client].loss_first)
            np.testing.assert_array_equal(got.loss_last, want[client].loss_last)


def test_strict_equals_fast(lab: Callable[..., Lab]) -> None:
    """The same mathematics, in other units."""
    one = lab()
    fast, strict = one.rows(range(M)), one.rows(range(M), **STRICT)
    for client in range(M):
        assert distance(strict[client][None], fast[client][None], one.start) <= DELTA


# ---------------------------------------------------------------------------- plans and records


@pytest.mark.parametrize("mode", ["fast", "strict"])
def test_the_plan_foretells_the_first_round(settings: Callable[..., Config], mode: str) -> None:
    config = settings(
        server__rounds=1, server__fraction=1.0, train__mode=mode, train__slots=3, train__steps=3,
        train__budget_tokens=512, train__chunk_tokens=128, train__tile=32, adapter__ranks=[1, 4],
    )  # fmt: skip
    planned = cost.estimate(config)
    assert planned.work is not None
    folder = simulate.run(config)
    (line,) = [json.loads(text) for text in (folder / "rounds.jsonl").read_text().splitlines()]
    assert line["passes"] == planned.work.passes
    assert line["utilisation"] == pytest.approx(planned.work.utilisation, abs=1e-12)
    assert line["tokens"] == planned.work.tokens
    assert line["up_mib"] + line["down_mib"] == pytest.approx(planned.mib)
    assert planned.work.longest <= 512
    visits = [json.loads(text) for text in (folder / "clients.jsonl").read_text().splitlines()]
    assert {v["rank"] for v in visits} == {1, 4} and len(visits) == 8


def test_utilisation_is_real_rows_over_the_budget() -> None:
    """90 and 60 of 100, then a sequence of 150 alone: 300 of 350. A round begins at nothing."""
    meter = Meter()
    assert meter.utilisation is None
    for rows in (90, 60, 150):
        meter.count(rows=rows, budget=100, clients=1, steps=1, tokens=rows)
    assert meter.utilisation == 300 / 350 and meter.passes == 3
    meter.begin(2, steps=5)
    assert meter.utilisation is None and (meter.passes, meter.steps, meter.steps_total) == (0, 0, 5)
    assert meter.steps_done == 3 and meter.tokens == 300
