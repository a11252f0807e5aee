"""What a run will cost: parameters, bytes, tokens, memory. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim import domains, peft_io, seeds, strategies, weights
from fedsim.config import Config
from fedsim.core import AdapterLayout, pick_device
from fedsim.data import partition, sources, tokens
from fedsim.display import over_budget
from fedsim.model import check_config, compute_dtype, target_linears
from fedsim.plan import pass_budget, plan_round, step_examples, waves
from fedsim.record import MIB, total_mib, transfer_mib

# fp32 rows, gradients and two moments; three more while AdamW steps, one row set going out.
_BYTES_PER_SLOT_NUMBER = 32


@dataclass(frozen=True)
class Estimate:
    """Figures of a run before it runs."""

    config: Config
    base_numbers: int
    adapter_numbers: int
    row_numbers: int
    tokens: int | None
    longest_step: int | None
    bytes_per_number: int

    @property
    def mib(self) -> float:
        """MiB sent in the whole run, both directions."""
        c = self.config
        return total_mib(self.adapter_numbers, c.per_round, c.server.rounds)

    @property
    def over_budget(self) -> str:
        return over_budget(self.mib)

    @property
    def memory_mib(self) -> float:
        """Base and slots; activations come on top, by tokens in a pass."""
        slots = max(len(w) for w in waves(np.arange(self.config.per_round),
                                          self.config.train.slots))  # fmt: skip
        state = slots * self.row_numbers * _BYTES_PER_SLOT_NUMBER
        return (self.base_numbers * self.bytes_per_number + state) / MIB

    def lines(self) -> Iterator[tuple[str, str]]:
        """(what, figure), for people."""
        c = self.config
        share = self.adapter_numbers / self.base_numbers
        yield "base", f"{self.base_numbers:,} parameters"
        yield "adapter", f"{self.adapter_numbers:,} parameters ({share:.2%} of the base)"
        yield (
            "clients",
            (
                f"{c.per_round} of {c.clients.number} a round, {c.server.rounds} rounds, "
                f"{c.server.rounds * c.per_round} visits"
            ),
        )
        yield "one transfer", f"{transfer_mib(self.adapter_numbers):,.1f} MiB"
        yield "all transfers", f"{self.mib:,.0f} MiB"
        yield "optimiser steps", f"{c.server.rounds * c.per_round * c.train.steps:,}"
        if self.tokens is not None:
            yield "tokens trained", f"{self.tokens:,}"
            yield "longest pass", f"{self.longest_step:,} tokens before sharing prefixes"
        else:
            yield "tokens trained", "unknown: the data or the tokenizer are not here"
        yield "memory", f"{self.memory_mib:,.0f} MiB for base and slots, activations on top"


def estimate(config: Config) -> Estimate:
    """Count a run's cost from the model's configuration and, where they are here, its data."""
    from transformers import AutoConfig, AutoModelForCausalLM

    strategies.load(config.server.strategy)
    found = weights.find(config.model.name, config.model.revision)
    hf = AutoConfig.from_pretrained(found.path)
    check_config(hf, config.data.max_length)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    targets = config.adapter.targets or peft_io.default_targets(hf.model_type)
    shapes = {n: (m.in_features, m.out_features)
              for n, m in target_linears(model, targets).items()}  # fmt: skip
    layout = AdapterLayout.build(shapes, config.adapter.rank)
    store = _store(config, found)
    count, longest = _tokens(config, store) if store else (None, None)
    dtype = compute_dtype(config, pick_device(config.run.device))
    return Estimate(config, sum(p.numel() for p in model.parameters()), layout.numel(),
                    layout.size, count, longest, dtype.itemsize)  # fmt: skip


def _store(config: Config, found: weights.Weights) -> tokens.TokenStore | None:
    if not (found.path / "tokenizer.json").is_file():
        return None
    domain = domains.load(config.data.domain)
    dataset = sources.training_set(config.data, domain)
    rows = sources.load(config.data, domain, dataset, domain.columns)
    return tokens.training_store(rows, domain, weights.tokenizer(found), config)


def _tokens(config: Config, store: tokens.TokenStore) -> tuple[int, int]:
    """Exactly the tokens that the run will train, and those of its longest pass."""
    key = seeds.run_key(config.run.seed)
    population = partition.build(config, len(store))
    lengths = store.lengths
    total = longest = 0
    for round in range(1, config.server.rounds + 1):
        plan = plan_round(config, population, round, key)
        per_step = np.zeros((len(plan), config.train.steps), dtype=np.int64)
        for i, client in enumerate(plan.client_ids):
            owned = population.of(int(client))
            for step in range(config.train.steps):
                picked = step_examples(config, owned, key, int(client), round, step)
                per_step[i, step] = lengths[picked].sum()
        total += int(per_step.sum())
        for wave in waves(np.arange(len(plan)), config.train.slots):
            longest = max(longest, int(per_step[wave].sum(0).max()))
    return total, min(longest, pass_budget(config, pick_device(config.run.device)))
