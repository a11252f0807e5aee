"""What a run trains on: its examples, who holds them, and which of these clients attack.

A client whose examples have no labels takes its steps like the others, with a gradient of 0, and
sends back what it received, less weight decay. Its weight in the mean is that of its rows all the
same: FlowerTune weighs clients so, secure sums and privacy fix weights before anybody trains, and
else the tokenizer would choose who takes part. Its loss is no number and in no mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedsim import attack
from fedsim.config import Config
from fedsim.core import Population
from fedsim.data import labels, partition, tokens
from fedsim.data.sources import Rows
from fedsim.data.tokens import TokenStore
from fedsim.domains import RESPONSE_MARK, Domain, spaced
from fedsim.errors import DataError


@dataclass(frozen=True)
class Training:
    """Examples, clients, and the attackers among them, (N,) bool."""

    store: TokenStore
    population: Population
    bad: np.ndarray

    @property
    def counts(self) -> Mapping[str, int]:
        """How many examples there are, are cut, have no label; clients who have none at all."""
        some = self.store.labels[self.population.examples] > 0
        own = np.split(some, self.population.offsets[1:-1])
        return {
            "examples": len(self.store), "cut": int(self.store.cut.sum()),
            "unlabelled": self.store.unlabelled,
            "clients_without_labels": sum(not held.any() for held in own),
        }  # fmt: skip

    def said(self, max_length: int) -> str:
        """What was lost of the examples, in one line; "" where nothing was."""
        n = self.counts
        parts = []
        if n["cut"]:
            parts.append(f"{n['cut']:,} cut at {max_length} tokens")
        if n["unlabelled"]:
            parts.append(f"{n['unlabelled']:,} without a label")
        if n["clients_without_labels"]:
            of = len(self.population)
            parts.append(f"{n['clients_without_labels']} of {of} clients without any")
        return f"{n['examples']:,} examples: {', '.join(parts)}" if parts else ""


def columns(config: Config, domain: Domain) -> tuple[str, ...]:
    """What every row must have."""
    joined = ("instruction", "input", "output")
    wanted = joined if config.data.rows == "joined" else domain.columns
    return tuple(column for column in wanted if column not in domain.optional)


def load(config: Config, rows: Rows, domain: Domain, tokenizer: Any, key: int) -> Training:
    """Deal the rows out, then turn them into tokens; label-flipping clients get other answers.

    Raises:
        DataError: a row is no text, or too many are left without a label.
    """
    pairs = _pairs(config, rows, domain)
    population = partition.build(config, len(pairs), labels.of(config, rows.rows, domain))
    bad = attack.attackers(key, len(population), config.attack.fraction)
    digest = f"{rows.digest}/{domain.name}/{len(pairs)}" + "/joined" * (
        config.data.rows == "joined"
    )
    if config.attack.kind == "label_flip":
        of = attack.flipped([answer for _, answer in pairs], population, bad)
        pairs = [(question, pairs[i][1]) for (question, _), i in zip(pairs, of, strict=True)]
        digest += f"/{of.tolist()}"
    store = tokens.build(
        [tokens.training_text(*pair) for pair in pairs], tokenizer,
        protocol=config.run.protocol, max_length=config.data.max_length, digest=digest,
    )  # fmt: skip
    check_labels(store, config)
    return Training(store, population, bad)


def _pairs(config: Config, rows: Rows, domain: Domain) -> list[tuple[str, str]]:
    joins, out = config.data.rows == "joined", []
    pair = spaced if joins else domain.pairs[config.run.protocol]
    for i, row in enumerate(rows.rows[: config.data.limit]):
        try:
            out.append(pair(row))
        except TypeError as bad:
            raise DataError(
                f"{rows.origin}, row {i}, {bad}", remedy="Write it as one text."
            ) from None
    return out


def check_labels(store: TokenStore, config: Config) -> None:
    """Raises DataError, with the causes, where too many examples have no label to train."""
    without, most = store.labels == 0, config.data.max_unlabelled
    if not without.all() and without.mean() <= most:
        return
    limit = config.data.max_length
    causes, remedies = [], []
    if cut := int((without & store.cut & ~store.unmarked).sum()):
        causes.append(f"{cut:,} have their answer behind the first {limit} tokens")
        remedies.append("Raise data.max_length.")
    if lost := int((without & store.unmarked).sum()):
        causes.append(f"in {lost:,} this tokenizer merges {RESPONSE_MARK!r} with its neighbours")
        remedies.append("run.protocol = fedsim does not look for it.")
    if rest := int(without.sum()) - cut - lost:
        causes.append(f"{rest:,} have an empty answer")
    if not without.all():
        share = np.ceil(without.mean() * 100) / 100
        remedies.append(f"Or accept it: data.max_unlabelled = {share}.")
    raise DataError(
        f"{int(without.sum()):,} of {len(store):,} training examples have no label: "
        + ", ".join(causes),
        expected=f"at most {most:.0%} (data.max_unlabelled)",
        remedy=" ".join(remedies),
    )


def check_tokens(store: TokenStore, size: int, tokenizer: Any, origin: str) -> None:
    """Raises DataError where an example has a token that an embedding of `size` rows lacks."""
    beyond = np.flatnonzero(store.ids >= size)
    if len(beyond):
        token = int(store.ids[beyond[0]])
        row = int(np.searchsorted(store.offsets, beyond[0], side="right")) - 1
        raise DataError(
            f"{origin}, row {row}: token {tokenizer.convert_ids_to_tokens(token)!r} has number "
            f"{token}", expected=f"one below {size:,}, the rows of the model's embedding",
            remedy="Take the text out of the row, or use the tokenizer that the model came with.",
        )  # fmt: skip
