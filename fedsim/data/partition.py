"""Who holds which example. Every partitioner returns a Population and is a pure function."""

from __future__ import annotations

import numpy as np

from fedsim.config import Config
from fedsim.core import Population
from fedsim.errors import ConfigError


def iid(examples: int, clients: int, seed: int) -> Population:
    """Shuffle, then cut into contiguous parts whose sizes differ by at most one.

    The permutation and the cuts are those of `datasets.Dataset.shuffle(seed)` followed by
    `shard(clients, i, contiguous=True)`, which is what Flower's IidPartitioner does; FlowerTune
    uses seed 42. This is the one place with a generator other than `seeds`: it must reproduce
    another library's draw.
    """
    if clients > examples:
        raise ConfigError(
            "clients.number", got=clients, expected=f"at most {examples}, the training examples",
            remedy="Lower clients.number or use more data.",
        )  # fmt: skip
    order = np.random.default_rng(seed).permutation(examples).astype(np.int64)
    base, extra = divmod(examples, clients)
    sizes = np.full(clients, base, dtype=np.int64)
    sizes[:extra] += 1
    return Population(np.concatenate([[0], np.cumsum(sizes)]), order)


def build(config: Config, examples: int) -> Population:
    """The configured partition; `flowertune` always shuffles with seed 42."""
    seed = 42 if config.run.protocol == "flowertune" else config.run.seed
    return iid(examples, config.clients.number, seed)
