"""Local training of many clients in one pass, on one device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim.adapters import AdapterBank
from fedsim.config import Config
from fedsim.core import ClientUpdates, LocalRule, PackedBatch, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.lora import Dropout, Pass
from fedsim.model import Base
from fedsim.plan import pack_step, pass_budget, step_examples, waves
from fedsim_kernels.segments import Segments

if TYPE_CHECKING:
    from fedsim.record import Meter


class Trainer:
    """Works lanes of clients off through the K slots of one device."""

    def __init__(
        self, base: Base, store: TokenStore, population: Population, config: Config, key: int
    ) -> None:
        self.base, self.store, self.population = base, store, population
        self.config, self.key = config, key
        slots = max(len(w) for w in waves(np.arange(config.per_round), config.train.slots))
        self.bank = AdapterBank(base.layout, slots, base.device)

    def train(self, plan: RoundPlan, rule: LocalRule, meter: Meter) -> Iterator[ClientUpdates]:
        """Every client of the plan, in the plan's order, wave by wave."""
        for lane in plan.lanes:
            for wave in waves(lane, self.config.train.slots):
                yield self._wave(plan, rule, wave, meter)

    def _wave(
        self, plan: RoundPlan, rule: LocalRule, wave: np.ndarray, meter: Meter
    ) -> ClientUpdates:
        began = time.perf_counter()
        bank, device, k = self.bank, self.base.device, len(wave)
        bank.load(rule.start.to(device))
        steps = plan.steps[wave]
        losses = torch.full((int(steps.max()), bank.slots), float("nan"), device=device)
        ok = torch.ones(bank.slots, dtype=torch.bool, device=device)
        lr = torch.zeros(bank.slots, device=device)
        lr[:k] = torch.as_tensor(plan.lr[wave], dtype=torch.float32)
        tokens = np.zeros(k, dtype=np.int64)
        train = self.config.train
        for step in range(int(steps.max())):
            work = [
                (int(slot), self._examples(plan, int(wave[slot]), step))
                for slot in np.flatnonzero(step < steps)
            ]
            for slot, examples in work:
                tokens[slot] += self.store.lengths[examples].sum()
            losses[step] = self.gradients(plan, wave, work, step)
            active = torch.zeros(bank.slots, dtype=torch.bool)
            active[[slot for slot, _ in work]] = True
            active = active.to(device, non_blocking=True)
            norms = bank.step(
                lr=lr, step=torch.full_like(lr, step + 1), active=active & ok,
                betas=(train.beta1, train.beta2), eps=train.eps,
                weight_decay=train.weight_decay, max_norm=train.clip_norm,
            )  # fmt: skip
            ok &= ~active | (torch.isfinite(losses[step]) & torch.isfinite(norms))
            meter.step(k, sum(int(self.store.lengths[e].sum()) for _, e in work), losses[step, :k])
        table = losses[:, :k].double().cpu().numpy()
        return ClientUpdates(
            index=wave,
            row=bank.rows[:k].clone(),
            start=rule.start.to(device),
            tokens=tokens,
            loss_first=table[0],
            loss_last=table[steps - 1, np.arange(k)],
            ok=ok[:k].cpu().numpy(),
            seconds=time.perf_counter() - began,
        )

    def _examples(self, plan: RoundPlan, index: int, step: int) -> np.ndarray:
        client = int(plan.client_ids[index])
        owned = self.population.of(client)
        return step_examples(self.config, owned, self.key, client, plan.round, step)

    def gradients(
        self, plan: RoundPlan, wave: np.ndarray, work: list[tuple[int, np.ndarray]], step: int
    ) -> Tensor:
        """Fill the bank's gradients with one local step's; returns each slot's loss (K,)."""
        self.bank.grads.zero_()
        total = torch.zeros(self.bank.slots, device=self.base.device)
        p = self.config.adapter.dropout
        batches = pack_step(
            self.store, work, budget=pass_budget(self.config, self.base.device),
            shared_prefix=self.config.train.shared_prefix and p == 0, device=self.base.device,
        )  # fmt: skip
        scale = [0.0] * self.bank.slots
        scale[: len(wave)] = [float(s) for s in plan.scale[wave]]
        for batch in batches:
            shared = Pass(
                segments=Segments.build(batch.lengths, batch.slot, batch.parent),
                factors=self.bank.factors,
                grads=self.bank.grad_factors,
                scale=tuple(scale),
                anchor=self.base.anchor,
                dropout=self._dropout(plan, wave, batch, step) if p else None,
            )
            hidden = self.base.hidden(batch.input_ids, batch.position_ids, shared)
            loss = self.base.loss(
                hidden.index_select(0, batch.label_rows), batch.targets, batch.label_slot,
                batch.label_weight, self.bank.slots,
            )  # fmt: skip
            loss.sum().backward()
            total += loss.detach()
        return total

    def _dropout(self, plan: RoundPlan, wave: np.ndarray, batch: PackedBatch, step: int) -> Dropout:
        device = self.base.device
        rows = torch.as_tensor(batch.lengths)

        def per_row(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values).repeat_interleave(rows).to(device)

        return Dropout(
            p=self.config.adapter.dropout, key=self.key, round=plan.round,
            client=per_row(plan.client_ids[wave][batch.slot]),
            step=torch.full_like(batch.input_ids, step), sequence=per_row(batch.sequence),
            position=batch.position_ids,
        )  # fmt: skip
