"""What a run trains on: its examples, who holds them, and which of these clients attack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim import attack
from fedsim.config import Config
from fedsim.core import Population
from fedsim.data import labels, partition, tokens
from fedsim.data.sources import Rows
from fedsim.data.tokens import TokenStore
from fedsim.domains import Domain, spaced


@dataclass(frozen=True)
class Training:
    """Examples, clients, and the attackers among them, (N,) bool."""

    store: TokenStore
    population: Population
    bad: np.ndarray


def columns(config: Config, domain: Domain) -> tuple[str, ...]:
    """What every row must have."""
    joins = config.data.rows == "joined"
    return ("instruction", "input", "output") if joins else domain.columns


def load(config: Config, rows: Rows, domain: Domain, tokenizer: Any, key: int) -> Training:
    """Deal the rows out, then turn them into tokens; label-flipping clients get other answers."""
    joins = config.data.rows == "joined"
    pair = spaced if joins else domain.pairs[config.run.protocol]
    pairs = [pair(row) for row in rows.rows[: config.data.limit]]
    population = partition.build(config, len(pairs), labels.of(config, rows.rows, domain))
    bad = attack.attackers(key, len(population), config.attack.fraction)
    digest = f"{rows.digest}/{domain.name}/{len(pairs)}" + "/joined" * joins
    if config.attack.kind == "label_flip":
        of = attack.flipped([answer for _, answer in pairs], population, bad)
        pairs = [(question, pairs[i][1]) for (question, _), i in zip(pairs, of, strict=True)]
        digest += f"/{of.tolist()}"
    store = tokens.build(
        pairs, tokenizer, protocol=config.run.protocol, max_length=config.data.max_length,
        digest=digest,
    )  # fmt: skip
    return Training(store, population, bad)
