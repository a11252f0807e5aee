"""Local training of many clients in shared passes, on one device."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.adapters import AdapterBank
from fedsim.batch import PackedBatch, Reading, on_device
from fedsim.config import Config
from fedsim.core import ClientMemory, ClientUpdates, LocalRule, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.dp_sgd import DPSGD
from fedsim.errors import RunError
from fedsim.graphs import runner
from fedsim.idle import idle
from fedsim.local_terms import LocalTerms, Starts
from fedsim.lora import Dropout, Pass
from fedsim.memory import out_of_memory
from fedsim.model import Base
from fedsim.packing import Parts, filled, pack, passes
from fedsim.plan import Shift
from fedsim.visits import Finished, State, Visit

if TYPE_CHECKING:
    from fedsim.record import Meter


class Trainer:
    """Works lanes of clients off through the K slots of one device.

    Args:
        host: leave the rows of finished clients on the CPU.
        rows: that the rule keeps of each client in training.
    """

    def __init__(
        self, base: Base, store: TokenStore, population: Population, config: Config, key: int,
        *, host: bool = False, rows: int = 0,
    ) -> None:  # fmt: skip
        self.base, self.store, self.population = base, store, population
        self.config, self.key, self._host = config, key, host
        self.limits = base.limits(config, rows)
        self.budget = self.limits.budget
        self.bank = AdapterBank(
            base.layout, self.limits.slots, base.device, lora_plus=config.adapter.lora_plus
        )
        self.halved = False
        self._left = 0  # passes, empty ones included, that this process owes the others
        self.run = runner(self.backward, self.bank.grads, config, base)

    def train(
        self, plan: RoundPlan, rule: LocalRule, meter: Meter, memory: ClientMemory | None = None,
        least: int = 0,
    ) -> Iterator[ClientUpdates]:  # fmt: skip
        """Every client of the plan, in the plan's order, one update each.

        Args:
            memory: needed by rules whose clients keep something.
            least: passes to make.
        """
        self._left = least
        if self.limits.note and self.limits.note not in meter.notes:
            meter.notes.append(self.limits.note)
        starts = Starts(rule, plan, self.bank, self.config, memory)
        terms = LocalTerms(rule, self.bank)
        self._private = DPSGD.of(self.config, plan, rule, self.bank, self.population, self.key)
        for lane in plan.lanes:
            yield from self._in_order(plan, lane, starts, terms, meter)
        for _ in range(self._left):
            idle(self.base, self.config, self.key)
        self.base.rest()

    def _in_order(
        self, plan: RoundPlan, lane: np.ndarray, starts: Starts, terms: LocalTerms, meter: Meter
    ) -> Iterator[ClientUpdates]:
        """A lane's updates, in its order. Where memory runs out in a pass, whoever is not finished
        begins again, with half the budget."""
        waiting, left = deque(map(int, lane)), lane
        finished: dict[int, Finished] = {}  # by position in the plan
        while waiting:
            try:
                for done in chain(self._lane(plan, left, starts, terms, meter), [{}]):
                    # Those of earlier passes: the device is busy with this one meanwhile.
                    while waiting and waiting[0] in finished:
                        yield finished.pop(waiting.popleft()).update()
                    finished |= done
            except (RuntimeError, MemoryError) as failure:
                if not out_of_memory(failure):
                    raise
                self._halve(failure, meter)
            left = np.array([i for i in waiting if i not in finished], dtype=np.int64)

    def _halve(self, failure: BaseException, meter: Meter) -> None:
        """From now on passes have half the budget. Raises RunError the second time, where a chunk
        would not fit, and over a sharded base, where others are amid the same pass."""
        half = self.budget // 2
        if self.halved or self.base.shards or half < self.config.largest_chunk:
            raise RunError(
                f"memory has run out in a pass of at most {self.budget:,} tokens",
                remedy="Lower train.budget_tokens or train.slots, or set train.recompute = "
                '"always".',
            ) from failure
        self.base.rest()
        self.budget, self.halved = half, True
        meter.notes.append(
            f"memory has run out: passes of at most {half:,} tokens from now on; clients who had "
            "not finished begin again"
        )

    def passes(self, plan: RoundPlan) -> int:
        """How many `train` makes."""
        return sum(1 for lane in plan.lanes for _ in self._passes(plan, lane))

    def _passes(self, plan: RoundPlan, lane: np.ndarray) -> Iterator[tuple[Shift, Parts]]:
        return passes(
            self.config, self.store, self.population, plan, lane, self.bank.slots, self.budget,
            self.key,
        )  # fmt: skip

    def _lane(
        self, plan: RoundPlan, lane: np.ndarray, starts: Starts, terms: LocalTerms, meter: Meter
    ) -> Iterator[dict[int, Finished]]:
        """Queue pass after pass; yields those who leave after it, by position in the plan."""
        visits: dict[int, Visit] = {}
        state = State(self.bank.slots, self.base.device, heeds=self._private is None)
        for shift, parts in self._passes(plan, lane):
            for slot, at in shift.enter:
                index = int(lane[at])
                visits[slot] = Visit(index, starts.of(index), time.perf_counter())
                self.bank.load(slot, visits[slot].start)
                terms.enter(slot, visits[slot].start, starts.control(index))
            who = {slot: visit.index for slot, visit in visits.items()}
            loss, rows = self.gradients(plan, who, parts)
            if self._private:
                loss = self._private.add(who, parts, loss)
            completed = self._optimise(plan, who, shift, parts, state, terms, loss)
            tokens = 0
            for part, step in parts:
                visits[part.slot].tokens += step.tokens(part)
                tokens += step.tokens(part)
            meter.count(
                clients=len(parts), steps=sum(p.completes for p in shift.parts), tokens=tokens,
                rows=rows, budget=self.budget, losses=completed,
            )  # fmt: skip
            left = {}
            if shift.leave:
                figures = state.read()
                for slot, _ in shift.leave:
                    row = self.bank.rows[slot].clone()
                    kept, visit = Reading(row) if self._host else row, visits.pop(slot)
                    left[visit.index] = Finished(visit, slot, kept, figures)
            yield left

    def gradients(self, plan: RoundPlan, who: dict[int, int], parts: Parts) -> tuple[Tensor, int]:
        """Add one pass to the bank's gradients; those of a step that begins are zeroed first, and
        under privacy of examples those of every pass.

        Args:
            who: slot -> position in the plan.
            parts: by ascending slot.

        Returns:
            Each slot's share of its loss in this pass (K,) fp64, and the real rows.
        """
        tile = self.config.train.rows_per_product
        for part, _ in parts:
            if not part.first or self.config.privacy.of_examples:
                self.bank.grads[part.slot].zero_()
        if not (parts := filled(parts)):
            if self.base.shards:
                self._left -= 1
                idle(self.base, self.config, self.key)
            return self.base.anchor.new_zeros(self.bank.slots, dtype=torch.float64), 0
        batch = pack(
            self.store, parts, tile, ranks=self._ranks(plan, who), device=self.base.device
        )  # fmt: skip
        scale = np.zeros(self.bank.slots)
        for slot, index in who.items():
            scale[slot] = plan.scale[index]
        work = Pass(
            segments=batch.segments,
            factors=self.bank.factors,
            grads=self.bank.grad_factors,
            scale=on_device(scale, self.base.device, torch.float32),
            anchor=self.base.anchor,
            tile=tile,
            dropout=self._dropout(plan, who, parts, batch),
            label_rows=batch.label_rows,
            label_segments=batch.label_segments,
            label_repeats=batch.label_repeats,
        )
        self._left -= 1
        return self.run(batch, work), batch.rows

    def backward(self, batch: PackedBatch, work: Pass) -> Tensor:
        """Forward and backward of one pass; each slot's share of its loss (K,) fp64."""
        hidden = self.base.hidden(batch.input_ids, batch.position_ids, work)
        loss = self.base.loss(hidden, batch, self.bank.slots, work.tile)
        loss.sum().backward()
        return loss.detach()

    def _ranks(self, plan: RoundPlan, who: dict[int, int]) -> tuple[int, ...]:
        """Of each slot; () where every client of the plan has the layout's."""
        if (plan.rank == self.base.layout.rank).all():
            return ()
        return tuple(int(plan.rank[who[s]]) if s in who else 0 for s in range(self.bank.slots))

    def _dropout(
        self, plan: RoundPlan, who: dict[int, int], parts: Parts, batch: PackedBatch
    ) -> Dropout | None:
        p = self.config.adapter.dropout
        if not p:
            return None
        clients, steps = (np.zeros(self.bank.slots, dtype=np.int64) for _ in range(2))
        for part, _ in parts:
            clients[part.slot] = plan.client_ids[who[part.slot]]
            steps[part.slot] = part.step

        def rows(values: np.ndarray, padding: int = 0) -> Tensor:
            return on_device(batch.per_row(values, padding), self.base.device)

        padding = rows(np.zeros_like(batch.slot), padding=-1) < 0
        counters = seeds.row_counters(
            client=rows(clients[batch.slot]), round=plan.round, step=rows(steps[batch.slot]),
            sequence=rows(batch.sequence), position=batch.position_ids.masked_fill(padding, -1),
        )  # fmt: skip
        return Dropout(p, self.key, counters)

    def _optimise(
        self, plan: RoundPlan, who: dict[int, int], shift: Shift, parts: Parts, state: State,
        terms: LocalTerms, loss: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """One AdamW step of every client whose step is complete; nothing waits for the device.

        Returns:
            (K,) losses of the completed steps, NaN elsewhere, or None where there are none.
        """
        table = np.zeros((7, self.bank.slots), dtype=np.float32)
        enters, begins, first, active, unlabelled, lr, number = table
        number[:] = 1
        for slot, _ in shift.enter:
            enters[slot] = 1
        for part in shift.parts:
            begins[part.slot] = part.first == 0
            active[part.slot] = part.completes
            first[part.slot] = part.completes and part.step == 0
            lr[part.slot] = plan.rate(who[part.slot], part.step)
            number[part.slot] = part.step + 1
        for part, step in parts:
            unlabelled[part.slot] = part.completes and not step.labels.any()
        told = on_device(table, self.base.device, torch.float32)
        flags = told[:5] != 0
        completes = flags[3]
        state.add(
            loss, enters=flags[0], begins=flags[1], first=flags[2], completes=completes,
            unlabelled=flags[4],
        )  # fmt: skip
        if not active.any():
            return None
        ranks = {p.slot: int(plan.rank[who[p.slot]]) for p in shift.parts if p.completes}
        terms.add(ranks)
        train = self.config.train
        norms = self.bank.step(
            lr=told[5], step=told[6], active=completes & state.ok,
            betas=(train.beta1, train.beta2), eps=train.eps,
            weight_decay=train.weight_decay,
            max_norm=math.inf if self._private else train.clip_norm,
        )  # fmt: skip
        state.ok &= ~completes | torch.isfinite(norms)
        terms.move(ranks, lr, state.ok)
        return torch.where(completes, state.loss, float("nan"))
