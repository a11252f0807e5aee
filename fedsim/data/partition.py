"""Who holds which example. Every partitioner returns a Population and is a pure function.

Each shuffles the rows with the seed first and gives, client by client and in order, what Flower's
FederatedDataset(shuffle=True, seed=s) gives with its partitioner of the same seed; where that one
would leave examples out, it deals out all of them or raises. To reproduce another library's
draws, the randomness here is NumPy's and not that of `seeds`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedsim.clients import BY_LABEL
from fedsim.config import Config
from fedsim.core import Population
from fedsim.data.labels import Labels
from fedsim.errors import ConfigError

_DRAWS = 11  # of a Dirichlet partition before it fails, as many as Flower makes


def _fits(examples: int, clients: int, min_size: int = 1) -> None:
    if clients * min_size > examples:
        each = f", {min_size} each" if min_size > 1 else ""
        raise ConfigError(
            "clients.number", got=clients,
            expected=f"at most {examples // min_size}, the training examples{each}",
            remedy="Lower clients.number or use more data.",
        )  # fmt: skip


def _even(total: int, parts: int) -> np.ndarray:
    """Sizes that differ by at most one, the larger ones first."""
    return total // parts + (np.arange(parts) < total % parts)


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _shuffled(examples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(examples).astype(np.int64)


def _by_label(labels: Labels, seed: int) -> np.ndarray:
    """The shuffled examples, brought in the order of their labels."""
    order = _shuffled(len(labels), seed)
    return order[np.argsort(labels.codes[order], kind="stable")]


def _dealt(order: np.ndarray, owner: np.ndarray, clients: int) -> Population:
    """Examples in this order, each to the owner that stands beside it."""
    sizes = np.bincount(owner, minlength=clients)
    return Population(_offsets(sizes), order[np.argsort(owner, kind="stable")])


def _mixed(population: Population, rng: np.random.Generator) -> Population:
    """The same, with each client's examples in random order: labels no longer lie together."""
    examples = population.examples.copy()
    for first, end in zip(population.offsets, population.offsets[1:]):
        rng.shuffle(examples[first:end])
    return Population(population.offsets, examples)


def iid(examples: int, clients: int, seed: int) -> Population:
    """Contiguous parts whose sizes differ by at most one (IidPartitioner).

    FlowerTune uses seed 42.
    """
    _fits(examples, clients)
    return Population(_offsets(_even(examples, clients)), _shuffled(examples, seed))


def _proportional(weights: np.ndarray, examples: int, seed: int) -> Population:
    """Contiguous parts: floor(E weight / sum), and what is left over to the last client."""
    sizes = (weights / weights.sum() * examples).astype(np.int64)
    sizes[-1] += examples - sizes.sum()
    return Population(_offsets(sizes), _shuffled(examples, seed))


def power(examples: int, clients: int, seed: int, *, skew: float) -> Population:
    """Client c = 1..N has a share of c^skew (LinearPartitioner: 1, SquarePartitioner: 2)."""
    _fits(examples, clients)
    return _proportional(np.linspace(1, clients, clients) ** skew, examples, seed)


def exponential(examples: int, clients: int, seed: int, *, skew: float) -> Population:
    """Client c = 1..N has a share of e^(skew c) (ExponentialPartitioner: 1)."""
    _fits(examples, clients)
    return _proportional(np.exp(skew * np.arange(1 - clients, 1)), examples, seed)


def lognormal(
    examples: int, clients: int, seed: int, *, skew: float, min_size: int = 1
) -> Population:
    """Everyone has `min_size`; the rest is shared as exp(skew z), z standard normal."""
    _fits(examples, clients, min_size)
    rng = np.random.default_rng(seed)
    order = rng.permutation(examples).astype(np.int64)
    z = rng.standard_normal(clients)
    weights = np.exp(skew * (z - z.max()))
    exact = weights / weights.sum() * (examples - clients * min_size)
    sizes = min_size + exact.astype(np.int64)
    nearest = np.argsort(sizes - exact, kind="stable")  # largest remainder first
    sizes[nearest[: examples - sizes.sum()]] += 1
    return Population(_offsets(sizes), order)


def dirichlet(
    labels: Labels, clients: int, seed: int, *, alpha: float, min_size: int = 1
) -> Population:
    """Each label is shared out by one draw of Dirichlet(alpha, ..., alpha) (DirichletPartitioner).

    Drawn again while a client has fewer than `min_size`; Flower's default there is 10.
    arXiv:1905.12022.
    """
    _fits(len(labels), clients, min_size)
    rows, rng = _by_label(labels, seed), np.random.default_rng(seed)
    for _ in range(_DRAWS):
        sizes = np.empty((len(labels.values), clients), dtype=np.int64)
        for size, count in zip(sizes, labels.counts):
            ends = np.cumsum(rng.dirichlet(np.full(clients, alpha))) * count
            size[:] = np.diff(np.append(ends[:-1].astype(np.int64), count), prepend=0)
        if sizes.sum(axis=0).min() >= min_size:
            owner = np.repeat(np.tile(np.arange(clients), len(sizes)), sizes.ravel())
            return _mixed(_dealt(rows, owner, clients), rng)
    raise ConfigError(
        f"clients.alpha: in {_DRAWS} draws with alpha {alpha} one of {clients} clients had fewer "
        f"than {min_size} examples",
        remedy="Raise clients.alpha, lower clients.number or clients.min_size, or use shards.",
    )


def pathological(labels: Labels, clients: int, seed: int, *, classes: int) -> Population:
    """Each client has exactly `classes` labels, one of them its own number modulo the labels.

    The others are random; a label is shared evenly by those that have it (PathologicalPartitioner
    with first-deterministic assignment; it drops labels that nobody has). arXiv:2102.02079.
    """
    _fits(len(labels), clients)
    known = len(labels.values)
    if classes > known:
        raise ConfigError(
            "clients.classes", got=classes, expected=f"at most {known}, the number of labels"
        )
    rng = np.random.default_rng(seed)
    holders: list[list[int]] = [[] for _ in range(known)]
    for client in range(clients):
        held = {client % known}
        while len(held) < classes:
            held.add(int(rng.integers(0, known)))
        for label in held:
            holders[label].append(client)
    for value, holding, count in zip(labels.values, holders, labels.counts):
        if not 1 <= len(holding) <= count:
            raise ConfigError(
                f"clients.classes: label {value!r} falls to {len(holding)} clients",
                expected=f"1 to {count}, its examples",
                remedy="Change clients.classes, clients.number or the number of labels.",
            )
    owner = np.concatenate([
        np.repeat(holding, _even(count, len(holding)))
        for holding, count in zip(holders, labels.counts.tolist())
    ])  # fmt: skip
    return _mixed(_dealt(_by_label(labels, seed), owner, clients), rng)


def shards(labels: Labels, clients: int, seed: int, *, shards: int) -> Population:
    """Sorted by label and cut into N x `shards` blocks, of which each client has `shards`.

    Blocks differ by at most one example (ShardPartitioner's are equal, and it drops examples where
    N x shards does not divide E). arXiv:1602.05629.
    """
    blocks = clients * shards
    if blocks > len(labels):
        raise ConfigError(
            "clients.shards", got=shards,
            expected=f"at most {len(labels) // clients}: {clients} clients share {len(labels)} "
            "examples",
            remedy="Lower clients.shards or clients.number.",
        )  # fmt: skip
    rng = np.random.default_rng(seed)
    place = np.argsort(rng.permutation(blocks))  # of each block in the dealing order
    dealt = _dealt(
        _by_label(labels, seed), np.repeat(place, _even(len(labels), blocks)), blocks
    )  # fmt: skip
    return _mixed(Population(dealt.offsets[::shards], dealt.examples), rng)


def natural(labels: Labels, clients: int, seed: int) -> Population:
    """A client for each label, in the order of the labels (NaturalIdPartitioner)."""
    known = len(labels.values)
    if clients != known:
        raise ConfigError(
            "clients.number", got=clients,
            expected=f"{known}, the number of labels: a natural partition has a client for each",
            remedy=f"Set clients.number = {known}.",
        )  # fmt: skip
    return Population(_offsets(labels.counts), _by_label(labels, seed))


PARTITIONERS: dict[str, Callable[..., Population]] = {
    "iid": iid, "power": power, "exponential": exponential, "lognormal": lognormal,
    "dirichlet": dirichlet, "pathological": pathological, "shards": shards, "natural": natural,
}  # fmt: skip


def build(config: Config, examples: int, labels: Labels | None = None) -> Population:
    """The configured partition; `flowertune` always shuffles with seed 42.

    Args:
        labels: of the first `examples` rows (`labels.of`), for partitions by label.

    Raises:
        ConfigError: the clients do not fit the data, or one has fewer than clients.min_size.
    """
    clients = config.clients
    seed = 42 if config.run.protocol == "flowertune" else config.run.seed
    data = labels if clients.partition in BY_LABEL else examples
    if data is None:
        raise ConfigError(
            "clients.partition", got=clients.partition, expected="labels of the examples with it",
            remedy="Pass what `fedsim.data.labels.of` returns.",
        )  # fmt: skip
    population = PARTITIONERS[clients.partition](data, clients.number, seed, **clients.options)
    least = int(population.sizes.argmin())
    if (size := int(population.sizes[least])) < clients.min_size:
        raise ConfigError(
            f"clients.min_size: client {least} has {size} examples",
            expected=f"at least {clients.min_size}",
            remedy="Lower clients.number or clients.min_size, or make the partition more even.",
        )
    return population
