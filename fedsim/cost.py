"""What a run will cost: parameters, bytes, tokens, passes, memory. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim import domains, peft_io, pretrained, rehearsal, seeds, strategies, weights
from fedsim.accountant import Ledger
from fedsim.channel import Wire
from fedsim.config import Config
from fedsim.core import AdapterLayout, Population, Strategy, pick_device
from fedsim.data import sources, tokens, training
from fedsim.display import over_budget
from fedsim.linears import linears, target_linears
from fedsim.memory import (
    GIB,
    RUNTIME,
    Activations,
    Limits,
    activations,
    fits,
    free_bytes,
    limits,
    recomputes,
    slot_bytes,
)
from fedsim.model import check_config
from fedsim.packing import filled, pack, passes
from fedsim.plan import plan_round, step_examples
from fedsim.quantised import bytes_each, holds
from fedsim.record import MIB, Meter, traffic, transfer_mib


@dataclass(frozen=True)
class Work:
    """What is passed through the model: tokens of all rounds; passes of the first."""

    tokens: int
    passes: int
    utilisation: float
    longest: int


@dataclass(frozen=True)
class Memory:
    """Bytes that a process takes when a pass of a round is at its peak.

    Attributes:
        free: of the device, before anything is loaded.
        rows: of the longest pass.
    """

    base: int
    slot: int
    kept: Activations
    limits: Limits
    rows: int
    runtime: int
    free: int
    fits: bool

    @property
    def activations(self) -> int:
        return self.kept.of(self.rows, recompute=self.limits.recompute)

    @property
    def total(self) -> int:
        return self.runtime + self.base + self.limits.slots * self.slot + self.activations

    @property
    def fitting(self) -> int:
        """Slots beside the base and such a pass."""
        left = self.free - self.runtime - self.base - self.activations
        return max(0, left // self.slot)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, figure), for people."""
        said = f"; {self.limits.note}" if self.limits.note else ""
        said = said if self.fits else "; not even one client fits"
        yield "memory", f"{self.total / MIB:,.0f} MiB of {self.free / MIB:,.0f}{said}"
        yield "  runtime", f"{self.runtime / MIB:,.0f} MiB"
        yield "  base", f"{self.base / MIB:,.0f} MiB"
        slots, each = self.limits.slots, self.slot / MIB
        yield (
            "  slots",
            f"{slots * each:,.0f} MiB: {slots} of {each:,.1f}; {self.fitting:,} would fit",
        )
        how = "recomputed" if self.limits.recompute else "kept"
        heap = self.rows * self.kept.heap
        figure = f"{(self.activations - heap) / MIB:,.0f} MiB of {self.rows:,} tokens, {how}"
        yield "  activations", figure
        if heap:
            yield "  heap", f"about {heap / MIB:,.0f} MiB lost between blocks"


@dataclass(frozen=True)
class Estimate:
    """Figures of a run before it runs."""

    config: Config
    base_numbers: int
    layout: AdapterLayout
    wire: Wire
    joins: bool  # clients also receive what joins the base
    mib: float  # sent in the whole run, both directions
    work: Work | None  # None where the data or the tokenizer are not here
    memory: Memory
    epsilon: float | None  # of the whole run, where the privacy and the data that it hangs on are
    lost: str  # what the data lose as examples; "" where nothing, or where they are not here

    @property
    def adapter_numbers(self) -> int:
        """Of the largest rank."""
        return self.layout.numel()

    @property
    def over_budget(self) -> str:
        return over_budget(self.mib)

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, figure), for people."""
        c, train = self.config, self.config.train
        share = self.adapter_numbers / self.base_numbers
        ranks = sorted(set(c.adapter.ranks or [c.adapter.rank]))
        about = "about " if c.privacy.of_clients else ""  # a round may have any number of clients
        yield "base", f"{self.base_numbers:,} parameters"
        yield "adapter", f"{self.adapter_numbers:,} parameters ({share:.2%} of the base)"
        yield "ranks", ", ".join(map(str, ranks)) + (", by client" if ranks[1:] else "")
        yield (
            "clients",
            (
                f"{about}{c.per_round} of {c.clients.number} a round, {c.server.rounds} rounds, "
                f"{about}{c.server.rounds * c.per_round} visits"
            ),
        )
        numbers = [self.layout.numel(r) for r in (ranks[0], ranks[-1])]
        sizes = [f"{transfer_mib(n):,.1f}" for n in numbers]
        yield "one transfer", " to ".join(dict.fromkeys(sizes)) + " MiB"
        if self.wire != Wire():
            sizes = [f"{self.wire.up(n, c.per_round) / MIB:,.1f}" for n in numbers]
            yield "one upload", " to ".join(dict.fromkeys(sizes)) + " MiB"
        least = "at least " if self.joins else ""  # what joins the base is known round by round
        yield "all transfers", f"{least}{self.mib:,.0f} MiB"
        if c.privacy.on:
            spent = "unknown" if self.epsilon is None else f"{self.epsilon:.2f}"
            whose = "whole clients" if c.privacy.of_clients else "single examples, of any client"
            yield "privacy", f"epsilon {spent} at delta {c.privacy.delta:g}, of {whose}"
        yield "optimiser steps", f"{about}{c.server.rounds * c.per_round * train.steps:,}"
        chunks = f" in chunks of {train.chunk_tokens}, products of {train.tile} rows"
        yield "mode", train.mode + (chunks if train.mode == "strict" else "")
        m = self.memory
        yield "passes", f"at most {m.limits.budget:,} tokens of {m.limits.slots} clients"
        if self.work is not None:
            w = self.work
            yield "tokens trained", f"{w.tokens:,}"
            if self.lost:
                yield "  of", self.lost
            yield (
                "first round",
                f"{w.passes:,} passes, {w.utilisation:.0%} full; at most {w.longest:,} tokens",
            )
        else:
            yield "tokens trained", "unknown: the data or the tokenizer are not here"
        yield from m.lines()


def estimate(config: Config) -> Estimate:
    """Count a run's cost from the model's configuration and, where they are here, its data."""
    strategy = strategies.load(config.server.strategy, config.server.options)
    wire = rehearsal.wire(config, strategy)
    found = weights.find(config.model.name, config.model.revision)
    model = pretrained.outline(found)
    check_config(model.config, config.data.max_length)
    targets = config.adapter.targets or peft_io.default_targets(model.config.model_type)
    shapes = {n: (m.in_features, m.out_features)
              for n, m in target_linears(model, targets).items()}  # fmt: skip
    layout = AdapterLayout.build(shapes, config.adapter.rank, dora=config.adapter.dora)
    data = _data(config, found, model.get_input_embeddings().num_embeddings)
    device = pick_device(config.run.device)
    dtype = pretrained.compute_dtype(config, device)
    numbers = sum(p.numel() for p in model.parameters())
    base = numbers * dtype.itemsize
    if holds(numbers, config, dtype, device):
        few = sum(m.weight.numel() for m in linears(model).values())
        base += int(few * (bytes_each(config) - dtype.itemsize))
    kept = activations(model, targets, config, device, dtype)
    rows = rehearsal.rows_kept(strategy, config.most_clients)
    slot, runtime = slot_bytes(config, layout.size, rows), RUNTIME[device.type]
    free = int(config.train.memory * GIB) or free_bytes(device)
    room = free - runtime - base
    again = recomputes(config, kept, room, device)
    at = limits(config, kept, slot, room, device, recompute=again)
    work = _work(config, data.store, data.population, at) if data else None
    memory = Memory(
        base, slot, kept, at, work.longest if work else at.budget, runtime,
        free, fits(config, kept, slot, room),
    )  # fmt: skip
    return Estimate(
        config, numbers, layout, wire, strategy.joins, _traffic(config, layout, strategy, wire),
        work, memory, _epsilon(config, data.population if data else None),
        data.said(config.data.max_length) if data else "",
    )  # fmt: skip


def _epsilon(config: Config, population: Population | None) -> float | None:
    """Of the whole run; of examples it hangs on who holds how many."""
    if not config.privacy.on or (config.privacy.of_examples and population is None):
        return None
    n = config.clients.number
    population = population or Population(np.arange(n + 1), np.arange(n))
    ledger = Ledger(config, population, seeds.run_key(config.run.seed))
    return ledger.spent(config.server.rounds)


def _traffic(
    config: Config, layout: AdapterLayout, strategy: Strategy, wire: Wire
) -> float:  # fmt: skip
    """MiB of the whole run: what the rule sends each client of its rank, and back.

    Exact where what a rule sends does not depend on the rounds before.
    """
    key = seeds.run_key(config.run.seed)
    # Who they are matters only where their ranks differ; else no round draws from all N.
    n = config.most_clients if not config.adapter.ranks else config.clients.number
    population = Population(np.arange(n + 1), np.arange(n))
    server = strategy.start(torch.zeros(layout.size), layout)
    total = 0.0
    for round in range(1, config.server.rounds + 1):
        plan = plan_round(config, population, round, key)
        rule = strategy.rule(server, plan)
        total += sum(traffic(rule, layout, plan.rank.tolist(), wire))
    return total


def _data(config: Config, found: weights.Weights, size: int) -> training.Training | None:
    """The training examples and who holds them; None where the tokenizer is not here.

    Args:
        size: rows of the model's embedding.
    """
    if not (found.path / "tokenizer.json").is_file():
        return None
    domain = domains.load(config.data.domain)
    dataset = sources.training_set(config.data, domain)
    names = training.columns(config, domain)
    rows = sources.load(config.data, domain, dataset, names, domain.optional)
    key = seeds.run_key(config.run.seed)
    tokenizer = weights.tokenizer(found)
    data = training.load(config, rows, domain, tokenizer, key)
    training.check_tokens(data.store, size, tokenizer, rows.origin)
    return data


def _work(
    config: Config, store: tokens.TokenStore, population: Population, at: Limits
) -> Work:  # fmt: skip
    """Exactly the tokens that the run will train, and exactly the first round's passes."""
    key, lengths = seeds.run_key(config.run.seed), store.lengths
    total = 0
    for round in range(1, config.server.rounds + 1):
        plan = plan_round(config, population, round, key)
        for client, steps in zip(plan.client_ids.tolist(), plan.steps.tolist(), strict=True):
            owned = population.of(client)
            for step in range(steps):
                picked = step_examples(config, owned, key, client, round, step)
                total += int(lengths[picked].sum())
    plan = plan_round(config, population, 1, key)
    meter, longest = Meter(), 0
    for lane in plan.lanes:
        for _, parts in passes(config, store, population, plan, lane, at.slots, at.budget, key):
            if not (parts := filled(parts)):
                continue
            batch = pack(store, parts, config.train.rows_per_product)
            meter.count(rows=batch.rows, budget=at.budget)
            longest = max(longest, len(batch))
    assert meter.utilisation is not None
    return Work(total, meter.passes, meter.utilisation, longest)
