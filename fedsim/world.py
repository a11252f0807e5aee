"""Everything that is loaded once and never changes during a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedsim import (
    attack,
    domains,
    evaluate,
    launch,
    model,
    peft_io,
    pissa,
    pretrained,
    record,
    seeds,
    sharded,
    weights,
)
from fedsim import config as configuration
from fedsim.adapters import initial_row
from fedsim.config import Config
from fedsim.core import (
    ClientMemory,
    ClientUpdates,
    LocalRule,
    RoundPlan,
    ServerState,
    Strategy,
    pick_device,
)
from fedsim.data import sources, training
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Sampling, own_sampling
from fedsim.mapped import mapped
from fedsim.plan import pass_budget


@dataclass(frozen=True)
class World:
    """Everything that is loaded once and never changes during a run."""

    base: model.Base
    data: training.Training
    tests: evaluate.Suite
    engine: Engine
    tokenizer: Any
    found: weights.Weights
    origin: str
    digests: dict[str, str]
    precision: str
    defaults: Sampling
    key: int
    attack: attack.Attack | None

    def first(self, strategy: Strategy, adapter: configuration.Adapter) -> ServerState:
        """The server before the first round, and what PiSSA takes from the base taken from it."""
        row = initial_row(self.base.layout, self.key).to(self.base.device)
        row = self.base.magnitudes(row)
        taken: dict[str, Tensor] = {}
        if adapter.init == "pissa":
            row, taken = pissa.split(self.base, row, adapter.scale())
            self.base.correction.apply(taken)
        return replace(strategy.start(row, self.base.layout), base=taken)

    def poisoned(
        self, updates: Iterator[ClientUpdates], plan: RoundPlan, rule: LocalRule
    ) -> Iterator[ClientUpdates]:
        """What reaches the server: the updates, those of attackers replaced."""
        if self.attack is None:
            return updates
        return attack.poison(
            self.attack, updates, plan=plan, bad=self.data.bad, layout=self.base.layout,
            up=rule.up, key=self.key,
        )  # fmt: skip

    def subject(
        self, server: ServerState, memory: ClientMemory, personal: tuple[str, ...], limit: int
    ) -> evaluate.Subject:
        """The server's adapter to evaluate; where clients keep their own, up to `limit` of those.

        Args:
            personal: kinds of pieces that a client keeps in its rows `row` of the memory.
        """
        adapters = [Adapter("global", row=server.row)]
        if (rows := server.memory.get("clients")) is not None:
            ids = server.memory["ids"].tolist()
            adapters = [Adapter(f"client {c}", row=row) for c, row in zip(ids, rows, strict=True)]
        elif personal and (ids := memory.clients("row")):
            order = seeds.permutation(self.key, seeds.Purpose.SUBSET, len(ids))[:limit]
            own, adapters = self.base.layout.mask(personal), []
            for client in (ids[i] for i in sorted(order)):
                kept = memory.read("row", client)
                assert kept is not None
                row = torch.where(own, kept, server.row.cpu())
                adapters.append(Adapter(f"client {client}", row=row.to(server.row.device)))
        return evaluate.Subject(
            self.engine, self.tokenizer, adapters, [server.round] * len(adapters), self.precision,
            self.defaults,
        )  # fmt: skip


def load_world(config: Config, key: int, shard: bool | None = None) -> World:
    """Model, tokens, clients and tests of a run.

    Args:
        shard: what the leader has decided on; None: decide, and tell the others, who load now.
    """
    of = config.attack
    hostile = attack.attack(of.kind, of.options) if of.on_updates else None
    domain = domains.load(config.data.domain)
    dataset = sources.training_set(config.data, domain)
    names = training.columns(config, domain)
    rows = sources.load(config.data, domain, dataset, names, domain.optional)
    found = weights.find(config.model.name, config.model.revision)
    tokenizer = weights.tokenizer(found)
    data = training.load(config, rows, domain, tokenizer, key)
    outline = pretrained.outline(found).get_input_embeddings()
    training.check_tokens(data.store, outline.num_embeddings, tokenizer, rows.origin)
    tests = evaluate.suite(config, domain, key)
    device = pick_device(config.run.device)
    targets = config.adapter.targets or peft_io.default_targets(weights.model_type(found))
    dtype, leads = pretrained.compute_dtype(config, device), shard is None
    if shard is None:
        shard = sharded.wanted(config, found, targets, dtype, device)
    if launch.size() > 1 and device.type == "cpu" and not shard:
        whole = partial(pretrained.stock, found, config, device, "eager")
        found = mapped(found, config, dtype, whole)
    if leads:
        launch.meet(shard)  # what loading leaves in the caches is whole now
    base = model.load(found, config, device, targets, shard=shard, tokenizer=tokenizer)
    engine = Engine(base, tokenizer, config.adapter, pass_budget(config, device))
    digests = {dataset.name: rows.digest} | {n: t.digest for n, t in tests.tasks.items()}
    return World(
        base, data, tests, engine, tokenizer, found, rows.origin, digests,
        weights.precision(base.precision, config), own_sampling(found.path), key, hostile,
    )  # fmt: skip


def describe(config: Config, world: World) -> dict[str, Any]:
    """What a run's numbers depend on, for environment.json."""
    return record.surroundings(world.base.device) | {
        "model": {
            "name": config.model.name, "origin": world.found.origin,
            "sha256": world.found.digest(), "precision": world.base.precision,
            "quantisation": config.model.quantisation, **world.base.held,
        },
        "content": {
            "the base's weights": world.found.digest(),
            "the training rows": hashlib.sha256(
                world.data.store.ids.tobytes() + world.data.store.lengths.tobytes()
                + world.data.store.trained.tobytes()
            ).hexdigest(),
            "which client holds which row": hashlib.sha256(
                world.data.population.offsets.tobytes() + world.data.population.examples.tobytes()
            ).hexdigest(),
            **{f"the questions of {n}": t.content for n, t in world.tests.tasks.items()},
        },
        "data": {
            "train": world.origin, **world.data.counts, "sha256": world.digests,
            "attackers": int(world.data.bad.sum()),
        },
        "operations": dict.fromkeys(
            record.OPERATIONS, record.implementation(world.base.device)
        ),
        "fused": world.base.fused,
    }  # fmt: skip
