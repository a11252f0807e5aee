"""What a rule asks of local training is what the clients do, batched as without any rule.

The oracle trains one client after another: the engine's plain gradient, the rule's terms added in
float64 as `LocalRule` states them, `torch.optim.AdamW`. Personal rows, controls and frozen pieces
never reach another client, whatever slot or company it has. About 10 s on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.core import KINDS, ClientUpdates, LocalRule
from fedsim.errors import RunError
from fedsim.record import Meter
from tests.lab import CLIENTS, DELTA, LR, SCALE, STEPS, Lab, distance, plan_of
from tests.rules import Kept


def like(one: Lab, seed: int, scale: float) -> Tensor:
    """A random row (P,) whose gaps are zero."""
    row = scale * torch.randn(one.start.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(one.base.layout.mask(KINDS), row, 0)


def memory_of(one: Lab, name: str, clients: tuple[int, ...], scale: float) -> Kept:
    kept = Kept()
    for client in clients:
        kept.write(name, client, like(one, 50 + client, scale))
    kept.commit()
    return kept


def train(one: Lab, rule: LocalRule, memory: Kept | None = None, **train: Any) -> Tensor:
    """The rows (M, P) of all clients."""
    blocks = list(one.trainer(**train).train(plan_of(range(CLIENTS)), rule, Meter(), memory))
    return torch.cat([b.row for b in blocks])


def oracle(one: Lab, rule: LocalRule, start: Tensor, client: int, control: Tensor | None) -> Tensor:
    """One client alone in float64; only the model's own gradient is the engine's."""
    section = one.config.train
    x = torch.nn.Parameter(start.double().clone())
    trained = one.base.layout.mask(rule.trained)
    rates = torch.ones_like(x)
    for kind, rate in rule.rates.items():
        rates[one.base.layout.mask((kind,))] = rate
    adam = torch.optim.AdamW(
        [x], lr=LR[client], betas=(section.beta1, section.beta2), eps=section.eps,
        weight_decay=section.weight_decay,
    )  # fmt: skip
    for step in range(STEPS[client]):
        _, grads = one.gradients([client], step=step, rows=x.detach().float()[None])
        g = grads[0].double() + tail(one, rule, x.detach())
        if not rule.behind:
            g += pull(rule, x.detach(), start, control)
        x.grad = torch.where(trained, g, 0)
        torch.nn.utils.clip_grad_norm_([x], section.clip_norm)
        before = x.detach().clone()
        adam.step()
        with torch.no_grad():
            x.copy_(torch.where(trained, before + rates * (x - before), before))
            if rule.behind:
                x -= LR[client] * torch.where(trained, pull(rule, x, start, control), 0)
    return x.detach().float()


def pull(rule: LocalRule, x: Tensor, start: Tensor, control: Tensor | None) -> Tensor:
    """mu (x - x_k) + correction - control_k."""
    out = rule.prox_mu * (x - start.double())
    if rule.correction is not None:
        out = out + rule.correction
    return out if control is None else out - control


def tail(one: Lab, rule: LocalRule, row: Tensor) -> Tensor:
    """By autograd: weight sum ||B[:, g:]|| ||A[g:]||."""
    if not rule.tail_weight:
        return torch.zeros_like(row)
    x = row.clone().requires_grad_()
    first = max(int(rule.tail_from * one.base.layout.rank), rule.tail_least)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in one.base.layout.factors(x[None]).values():
        total = total + a[0, first:].norm() * b[0, :, first:].norm()
    (grad,) = torch.autograd.grad(rule.tail_weight * total, x)
    return grad


RULES = {
    "proximal": {"prox_mu": 3.0},
    "proximal, decoupled": {"prox_mu": 3.0, "behind": True},
    "frozen A, pulled behind": {"trained": ("B", "mag"), "prox_mu": 3.0, "behind": True},
    "frozen A": {"trained": ("B", "mag")},
    "frozen B": {"trained": ("A",)},
    "rate of B": {"rates": {"B": 3.0}},
    "tail": {"tail_weight": 0.5, "tail_from": 0.5},
    "tail, at least": {"tail_weight": 0.5, "tail_from": 0.2, "tail_least": 3},
    "rates and a pull behind": {"rates": {"B": 3.0}, "prox_mu": 3.0, "behind": True},
}


@pytest.mark.parametrize("terms", RULES.values(), ids=list(RULES))
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_shared_terms(lab: Callable[..., Lab], terms: dict[str, Any], decay: float) -> None:
    one = lab(train__weight_decay=decay)
    rule = LocalRule(one.start, **terms)
    got = train(one, rule)
    want = torch.stack([oracle(one, rule, one.start, c, None) for c in range(CLIENTS)])
    assert distance(got, want, one.start) <= DELTA
    plain = train(one, LocalRule(one.start))
    assert distance(got, plain, one.start) > 10 * DELTA
    frozen = one.base.layout.mask([k for k in KINDS if k not in rule.trained])
    assert torch.equal(got[:, frozen], one.start[frozen].expand(CLIENTS, -1))
    for slots, budget in ((1, 0), (3, 60)):
        again = train(one, rule, slots=slots, budget_tokens=budget)
        assert distance(again, got, one.start) <= DELTA


@pytest.mark.parametrize("behind", [False, True])
def test_correction_and_control(lab: Callable[..., Lab], behind: bool) -> None:
    """Clients 1 and 3 have been here before; the others' control is zero."""
    one = lab()
    size = 0.5 if behind else 0.02  # that of steps, or of gradients
    rule = LocalRule(one.start, correction=like(one, 9, size), control="c", prox_mu=0.5,
                     behind=behind, trained=("B", "mag") if behind else KINDS)  # fmt: skip
    memory = memory_of(one, "c", (1, 3), 1.5 * size)
    got = train(one, rule, memory, slots=2)
    controls = [memory.read("c", c) for c in range(CLIENTS)]
    want = torch.stack([oracle(one, rule, one.start, c, controls[c]) for c in range(CLIENTS)])
    assert distance(got, want, one.start) <= DELTA
    without = train(one, replace(rule, control=""), slots=2)
    assert torch.equal(got[[0, 2]], without[[0, 2]])
    assert all(distance(got[[i]], without[[i]], one.start) > 10 * DELTA for i in (1, 3))


def test_a_slot_forgets_the_last_clients_control(lab: Callable[..., Lab]) -> None:
    """In one slot those with a control come first and between; the others train as without any."""
    one = lab()
    rule = LocalRule(one.start, control="c")
    for visited in ((0, 2), (1, 3)):
        got = train(one, rule, memory_of(one, "c", visited, 0.03), slots=1)
        plain = train(one, LocalRule(one.start), slots=1)
        others = [c for c in range(CLIENTS) if c not in visited]
        assert torch.equal(got[others], plain[others])
        assert all(distance(got[[i]], plain[[i]], one.start) > 10 * DELTA for i in visited)


def test_nothing_grows_beyond_a_clients_rank(lab: Callable[..., Lab]) -> None:
    """Correction and control are full rows; a client of rank 2 has none of what lies beyond."""
    one = lab()
    rule = LocalRule(one.start, correction=like(one, 9, 0.02), control="c", prox_mu=0.5)
    plan = replace(plan_of(range(CLIENTS)), rank=np.array([4, 2, 4, 2]))
    memory = memory_of(one, "c", (1, 2), 0.03)
    rows = torch.cat([b.row for b in one.trainer().train(plan, rule, Meter(), memory)])
    beyond = ~one.base.layout.mask(KINDS, 2)
    assert not rows[[1, 3]][:, beyond].any() and rows[[0, 2]][:, beyond].any()


def test_personal_rows_stay_with_their_client(lab: Callable[..., Lab]) -> None:
    """The public leak: a client that starts from the private factor of the one before it."""
    one = lab()
    memory = memory_of(one, "row", (0, 2), 0.05)
    rule = LocalRule(one.start, personal=("B",))
    own = one.base.layout.mask(("B",))
    starts = []
    for client in range(CLIENTS):
        kept = memory.read("row", client)
        starts.append(one.start if kept is None else torch.where(own, kept, one.start))
    got = train(one, rule, memory, slots=1)
    for client, start in enumerate(starts):
        alone = oracle(one, rule, start, client, None)
        assert distance(got[[client]], alone[None], start) <= DELTA
    together = train(one, rule, memory, slots=3)
    for client, start in enumerate(starts):
        assert distance(together[[client]], got[[client]], start) <= DELTA


def test_updates_say_where_they_started(lab: Callable[..., Lab]) -> None:
    one = lab()
    memory = memory_of(one, "row", (2,), 0.05)
    rule, own = LocalRule(one.start, personal=("B",)), one.base.layout.mask(("B",))
    blocks: list[ClientUpdates] = list(
        one.trainer().train(plan_of(range(CLIENTS)), rule, Meter(), memory)
    )
    kept = memory.read("row", 2)
    assert kept is not None
    assert torch.equal(blocks[2].start, torch.where(own, kept, one.start))
    assert all(torch.equal(blocks[c].start, one.start) for c in (0, 1, 3))


def test_without_a_memory(lab: Callable[..., Lab]) -> None:
    one = lab()
    with pytest.raises(RunError, match="'row' trains without a client memory"):
        train(one, LocalRule(one.start, personal=("B",)))


def test_the_scaled_product_at_a_lower_rank(lab: Callable[..., Lab]) -> None:
    """alpha / R at R = 4 and alpha / r at r = 2: B of the smaller client is halved."""
    one = lab()
    ranks = np.array([4, 2, 4, 2])
    plan = replace(plan_of(range(CLIENTS)), rank=ranks, scale=np.array(SCALE))
    for same in (True, False):
        rule = LocalRule(one.start, same_product=same)
        starts = [b.start for b in one.trainer().train(plan, rule, Meter())]
        for rank, start in zip(ranks, starts, strict=True):
            for module, (a, b) in one.base.layout.factors(start[None]).items():
                whole_a, whole_b = one.base.layout.factors(one.start[None])[module]
                assert torch.equal(a[:, :rank], whole_a[:, :rank]) and not a[:, rank:].any()
                factor = rank / 4 if same else 1.0
                assert torch.equal(b[..., :rank], factor * whole_b[..., :rank])
                assert not b[..., rank:].any()


def test_a_rate_of_nothing_is_an_error(lab: Callable[..., Lab]) -> None:
    one = lab()
    with pytest.raises(ValueError, match=r"rates of \['C'\]; expected kinds"):
        train(one, LocalRule(one.start, rates={"C": 2.0}))


def test_a_bank_forgets_the_last_rule(lab: Callable[..., Lab]) -> None:
    """One trainer, a frozen factor in the first round and none in the second."""
    one = lab()
    trainer, plan = one.trainer(), plan_of(range(CLIENTS))
    for rule in (LocalRule(one.start, trained=("B",)), LocalRule(one.start)):
        got = torch.cat([b.row for b in trainer.train(plan, rule, Meter())])
        fresh = torch.cat([b.row for b in one.trainer().train(plan, rule, Meter())])
        assert torch.equal(got, fresh)
