"""Everything that is loaded once and never changes during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedsim import domains, evaluate, model, peft_io, record, weights
from fedsim.config import Config
from fedsim.core import Population, pick_device
from fedsim.data import partition, sources, tokens


@dataclass(frozen=True)
class World:
    """Everything that is loaded once and never changes during a run."""

    base: model.Base
    store: tokens.TokenStore
    population: Population
    tests: evaluate.Suite
    found: weights.Weights
    origin: str
    digests: dict[str, str]


def load_world(config: Config, key: int) -> World:
    """Model, tokens, clients and tests of a run."""
    domain = domains.load(config.data.domain)
    dataset = sources.training_set(config.data, domain)
    rows = sources.load(config.data, domain, dataset, domain.columns)
    found = weights.find(config.model.name, config.model.revision)
    tokenizer = weights.tokenizer(found)
    store = tokens.training_store(rows, domain, tokenizer, config)
    population = partition.build(config, len(store))
    tests = evaluate.suite(config, domain, tokenizer, key)
    device = pick_device(config.run.device)
    targets = config.adapter.targets or peft_io.default_targets(weights.model_type(found))
    base = model.load(found, config, device, targets)
    digests = {dataset.name: rows.digest, **tests.digests}
    return World(base, store, population, tests, found, rows.origin, digests)


def describe(config: Config, world: World) -> dict[str, Any]:
    """What a run's numbers depend on, for environment.json."""
    return record.surroundings(world.base.device) | {
        "model": {
            "name": config.model.name, "origin": world.found.origin,
            "sha256": world.found.digest(), "precision": world.base.precision,
            "quantisation": config.model.quantisation,
        },
        "data": {
            "train": world.origin, "examples": len(world.store),
            "unlabelled": world.store.unlabelled, "sha256": world.digests,
        },
        "operations": dict.fromkeys(
            record.OPERATIONS, record.implementation(world.base.device)
        ),
        "fused": world.base.fused,
    }  # fmt: skip
