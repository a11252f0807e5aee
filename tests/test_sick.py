"""Promise 7: NaN or overflow in one client fails that client, visibly, and nobody else.

Proved with the C++ kernels and in PyTorch: clients that start sick, diverge, are sick once, or
would overflow in their last step fail alone, and keep their last finite row; means are over the
healthy. About 6 seconds on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim.adapters import AdapterBank
from fedsim.core import ClientUpdates
from fedsim.errors import RunError
from fedsim.model import Base
from fedsim_kernels import dispatch, native
from tests.conftest import ARCHITECTURES
from tests.lab import CLIENTS, LR, Lab, plan_of
from tests.rules import reduce

BOTH = [("native", name) for name in ARCHITECTURES if native.available()]
BOTH += [("reference", "llama"), ("reference", "gemma2")]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("which", "architecture"), BOTH)
def test_a_sick_start_fails_one_client(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, which: Any, architecture: str,
    poison: float,
) -> None:  # fmt: skip
    one, steps = lab(architecture), (2,) * CLIENTS  # of equal clients, each has its own slot
    load = AdapterBank.load

    def poisoned(self: AdapterBank, slot: int, row: Tensor) -> None:
        load(self, slot, row * poison if slot == 1 else row)

    with dispatch.use(which):
        healthy, ok = one.train(range(CLIENTS), steps)
        assert ok.all()
        monkeypatch.setattr(AdapterBank, "load", poisoned)
        rows, ok = one.train(range(CLIENTS), steps)
    assert ok.tolist() == [True, False, True, True]
    assert torch.equal(rows[[0, 2, 3]], healthy[[0, 2, 3]])
    assert torch.equal(rows[1].nan_to_num(9), (one.start * poison).nan_to_num(9))


def test_a_diverged_client_keeps_its_last_finite_row(
    lab: Callable[..., Lab], implementation: str
) -> None:
    one = lab()
    healthy, _ = one.train(range(CLIENTS), (3, 3, 3, 3))
    rates = (*LR[:2], 1e30, LR[3])
    once, _ = one.train(range(CLIENTS), (1, 1, 1, 1), rates)
    rows, ok = one.train(range(CLIENTS), (3, 3, 3, 3), rates)
    assert ok.tolist() == [True, True, False, True]
    assert torch.equal(rows[[0, 1, 3]], healthy[[0, 1, 3]])
    assert torch.isfinite(rows[2]).all() and torch.equal(rows[2], once[2])
    assert not torch.equal(once[2], one.start)


def test_a_client_that_was_sick_once_stays_out(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    """Only its first gradient is NaN: it fails and rests at its start, others train on."""
    one = lab()
    healthy, _ = one.train(range(CLIENTS), (3,) * CLIENTS)
    step = AdapterBank.step

    def spy(self: AdapterBank, **settings: Any) -> Tensor:
        if settings["step"][1] == 1:
            self.grads[1] = float("nan")
        return step(self, **settings)

    monkeypatch.setattr(AdapterBank, "step", spy)
    rows, ok = one.train(range(CLIENTS), (3,) * CLIENTS)
    assert ok.tolist() == [True, False, True, True]
    assert torch.equal(rows[1], one.start)
    assert torch.equal(rows[[0, 2, 3]], healthy[[0, 2, 3]])


def test_a_loss_that_is_not_finite_fails_its_client(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients may be finite all the same."""
    one = lab()
    healthy, _ = one.train(range(CLIENTS), (2,) * CLIENTS)
    loss = Base.loss

    def infinite(self: Base, *given: Any) -> Tensor:
        return loss(self, *given) + torch.tensor([0, torch.inf, 0, 0])

    monkeypatch.setattr(Base, "loss", infinite)
    rows, ok = one.train(range(CLIENTS), (2,) * CLIENTS)
    assert ok.tolist() == [True, False, True, True]
    assert torch.equal(rows[[0, 2, 3]], healthy[[0, 2, 3]])
    assert torch.equal(rows[1], one.start)


def test_a_step_that_could_overflow_is_not_taken(
    lab: Callable[..., Lab], implementation: str
) -> None:
    """A first step is at most one learning rate long. Up to FLT_MAX / 1.01 it is taken; beyond,
    the rounding of its parts may overflow. A second one would go on from there."""
    one = lab()
    largest = torch.finfo(torch.float32).max
    for lr, steps, ok_2 in ((largest / 1.01, 1, True), (largest, 1, False),
                            (largest / 1.01, 2, False)):  # fmt: skip
        rows, ok = one.train(range(CLIENTS), (steps,) * CLIENTS, (*LR[:2], lr, LR[3]))
        assert ok.tolist() == [True, True, ok_2, True]
        assert torch.isfinite(rows).all()
        assert torch.equal(rows[2], one.start) == (lr == largest)


def updates(ok: Sequence[bool]) -> Iterator[ClientUpdates]:
    """Two blocks of two clients; the updates are 1, 10, 100, NaN."""
    start = torch.tensor([5.0])
    delta = torch.tensor([[1.0], [10.0], [100.0], [float("nan")]])
    none = np.zeros(2)
    for block in (slice(0, 2), slice(2, 4)):
        yield ClientUpdates(
            np.arange(4)[block], start + delta[block], start, none, none, none,
            np.array(ok[block]), 0.0,
        )  # fmt: skip


def test_mean_is_over_the_healthy() -> None:
    """Weights 1, 2, 3, 4: (1 x 1 + 3 x 100) / (1 + 3) without the second and the fourth."""
    plan = plan_of(range(CLIENTS))
    mean = reduce().mean
    assert mean(plan, updates((True, False, True, False))).item() == 301 / 4
    assert mean(plan, updates((True, True, True, False))).item() == pytest.approx(321 / 6)
    with pytest.raises(RunError, match="none of the 4 clients"):
        mean(plan, updates((False,) * 4))
