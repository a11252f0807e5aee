"""The questions of a run: every configured task in the form of its protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim import seeds
from fedsim.config import Config
from fedsim.data import sources
from fedsim.domains import Domain, Form, Item, Row
from fedsim.errors import DataError


@dataclass(frozen=True)
class Questions:
    """One task: its form, its questions, and where they come from."""

    form: Form
    items: list[Item]
    origin: str
    digest: str
    whole: bool  # every row of the set, not a subset

    @property
    def content(self) -> str:
        """sha256 of the questions as they are asked, in their order."""
        h = hashlib.sha256()
        for item in self.items:
            h.update(
                json.dumps(
                    [item.prompt, item.gold, item.choices, item.facts], default=str, sort_keys=True
                ).encode()
            )
        return h.hexdigest()


@dataclass(frozen=True)
class Suite:
    """The tasks of one domain under one protocol."""

    domain: str
    protocol: str
    tasks: dict[str, Questions]

    def __len__(self) -> int:
        return sum(len(t.items) for t in self.tasks.values())


def items(form: Form, rows: Sequence[Row], origin: str) -> list[Item]:
    """Rows -> questions. Raises DataError naming the row that is none."""
    out = []
    for i, row in enumerate(rows):
        try:
            out.append(form.item(row))
        except (KeyError, TypeError, ValueError, LookupError, AttributeError, OverflowError) as bad:
            raise DataError(
                f"{origin}, row {i} is no question ({type(bad).__name__}: {bad})",
                expected="the columns and values that the data set's page describes",
                remedy="Mend or remove the row.",
            ) from bad
    return out


def suite(config: Config, domain: Domain, key: int) -> Suite:
    """Load the configured tasks; `evaluate.limit` takes a counted random subset."""
    protocol, limit = config.run.protocol, config.evaluate.limit
    tasks: dict[str, Questions] = {}
    if limit == 0:
        return Suite(domain.name, protocol, tasks)
    for name, task in sources.tasks(config.data, domain, config.evaluate.tasks).items():
        rows = sources.load(config.data, domain, task.data, task.columns)
        picked = np.arange(len(rows))
        if limit is not None:
            order = seeds.permutation(key, seeds.Purpose.SUBSET, len(rows))
            picked = np.sort(order[:limit])
        form = task.forms[protocol]
        tasks[name] = Questions(
            form, items(form, [rows.rows[i] for i in picked], rows.origin), rows.origin,
            rows.digest, len(picked) == len(rows),
        )  # fmt: skip
    return Suite(domain.name, protocol, tasks)
