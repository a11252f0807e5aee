"""What a federated rule adds to the clients' gradients, and what it keeps from training."""

from __future__ import annotations

from collections.abc import Mapping
from math import floor

import numpy as np
import torch
from torch import Tensor

from fedsim.adapters import AdapterBank
from fedsim.config import Config
from fedsim.core import KINDS, ClientMemory, LocalRule, RoundPlan
from fedsim.errors import RunError


class Starts:
    """The rows that a round's clients start from."""

    def __init__(
        self, rule: LocalRule, plan: RoundPlan, bank: AdapterBank, config: Config,
        memory: ClientMemory | None,
    ) -> None:  # fmt: skip
        self._rule, self._plan, self._bank, self._memory = rule, plan, bank, memory
        start = rule.start.to(bank.rows.device)
        self._shared: dict[int, Tensor] = {}
        for rank in map(int, np.unique(plan.rank)):
            row = bank.cut(start, rank)
            if rule.same_product and rank != bank.layout.rank:
                ratio = config.adapter.scale() / config.adapter.scale(rank)
                row = torch.where(bank.layout.mask(("B",)).to(row.device), row * ratio, row)
            self._shared[rank] = row
        self._personal = bank.layout.mask(rule.personal).to(start.device) if rule.personal else None

    def of(self, index: int) -> Tensor:
        """(P,) of the client at a position of the plan."""
        row = self._shared[int(self._plan.rank[index])]
        if self._personal is None:
            return row
        kept = self._read("row", index)
        return row if kept is None else torch.where(self._personal, kept, row)

    def control(self, index: int) -> Tensor | None:
        """(P,) what is subtracted from the client's gradients, if it has been here before."""
        row = self._read(self._rule.control, index) if self._rule.control else None
        return None if row is None else self._bank.cut(row, int(self._plan.rank[index]))

    def _read(self, name: str, index: int) -> Tensor | None:
        if self._memory is None:
            raise RunError(
                f"a rule whose clients keep {name!r} trains without a client memory",
                remedy="Give `Trainer.train` a memory.",
            )
        row = self._memory.read(name, int(self._plan.client_ids[index]))
        return None if row is None else row.to(self._bank.rows.device)


class LocalTerms:
    """A `LocalRule`'s terms for the slots of a bank; those that it lacks take no memory.

    g + prox_mu (x - x_k) + correction - control_k + tail penalty's gradient, 0 where frozen;
    with `behind` the three in the middle act in `move` instead of in `add`
    """

    def __init__(self, rule: LocalRule, bank: AdapterBank) -> None:
        self._rule, self._bank = rule, bank
        self._start = torch.zeros_like(bank.rows) if rule.prox_mu else None
        self._control = torch.zeros_like(bank.rows) if rule.control else None
        self._correction = None
        if rule.correction is not None:
            self._correction = rule.correction.to(bank.rows.device)
        frozen = [kind for kind in KINDS if kind not in rule.trained]
        self._frozen = bank.layout.mask(frozen).to(bank.rows.device) if frozen else None
        bank.rates({**rule.rates, **dict.fromkeys(frozen, 0.0)})

    def enter(self, slot: int, start: Tensor, control: Tensor | None) -> None:
        """A client has come into a slot; rows (P,), its control None before its first visit."""
        if self._start is not None:
            self._start[slot] = start
        if self._control is not None:
            self._control[slot] = 0.0 if control is None else control

    def add(self, ranks: Mapping[int, int]) -> None:
        """Change the gradients of slots whose step is complete, before they are clipped.

        Args:
            ranks: slot -> its client's rank.
        """
        for slot, rank in ranks.items():
            grad = self._bank.grads[slot]
            if not self._rule.behind:
                self._pull(grad, slot, rank)
            if self._rule.tail_weight:
                first = max(floor(self._rule.tail_from * rank), self._rule.tail_least)
                self._tail(slot, first, rank)
            if self._frozen is not None:
                grad.masked_fill_(self._frozen, 0)

    def move(self, ranks: Mapping[int, int], rates: np.ndarray, ok: Tensor) -> None:
        """What acts behind the optimiser's step of these slots, where they are ok; (K,) each."""
        if not self._rule.behind:
            return
        for slot, rank in ranks.items():
            term = torch.zeros_like(self._bank.rows[slot])
            self._pull(term, slot, rank)
            if self._frozen is not None:
                term.masked_fill_(self._frozen, 0)
            self._bank.rows[slot].sub_(torch.where(ok[slot], float(rates[slot]) * term, 0))

    def _pull(self, term: Tensor, slot: int, rank: int) -> None:
        """term += prox_mu (x - x_k) + correction - control_k"""
        if self._start is not None:
            term.add_(self._bank.rows[slot] - self._start[slot], alpha=self._rule.prox_mu)
        if self._correction is not None:
            term.add_(self._bank.cut(self._correction, rank))
        if self._control is not None:
            term.sub_(self._control[slot])

    def _tail(self, slot: int, first: int, rank: int) -> None:
        """d/dx of weight ||B[:, first:rank]|| ||A[first:rank]||, module by module.

        Where a norm is 0 its gradient is taken as 0, one of its subgradients.
        """
        one = slice(slot, slot + 1)
        rows, grads = (self._bank.layout.factors(m[one])
                       for m in (self._bank.rows, self._bank.grads))  # fmt: skip
        for module, (a, b) in rows.items():
            da, db = grads[module]
            tail = slice(first, rank)
            a_tail, b_tail = a[0, tail], b[0, :, tail]
            na, nb = a_tail.double().norm(), b_tail.double().norm()
            weight = self._rule.tail_weight
            da[0, tail] += a_tail * torch.where(na > 0, weight * nb / na, 0).float()
            db[0, :, tail] += b_tail * torch.where(nb > 0, weight * na / nb, 0).float()
