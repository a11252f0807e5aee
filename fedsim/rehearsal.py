"""A round of a rule before the run: two clients on a tiny adapter who have learnt nothing.

A rule that looks at single updates where only sums may be seen is refused here and not after hours
of training; and how many sums it asks for is counted here, which `fedsim plan` needs too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from fedsim.channel import Wire
from fedsim.config import Config
from fedsim.core import (
    KINDS,
    AdapterLayout,
    ClientUpdates,
    LocalRule,
    RoundPlan,
    ServerState,
    Strategy,
)
from fedsim.dp_sgd import hidden
from fedsim.errors import ConfigError, RunError
from fedsim.reduce import Reduce
from fedsim.release import Release, refuse
from fedsim.secure import Ring

LAYOUT = AdapterLayout.build({"q": (4, 4)}, 2, dora=True)


class Forgetful:
    """A client memory in which nothing is found."""

    def read(self, name: str, client: int) -> Tensor | None:
        return None

    def write(self, name: str, client: int, row: Tensor) -> None: ...

    def clients(self, name: str) -> list[int]:
        return []


def wire(config: Config, strategy: Strategy) -> Wire:
    """What updates take on the way in a run.

    Raises:
        ConfigError: the rule does not go with the channel or with the privacy that is asked for.
    """
    fit(config, strategy)
    ring, release = Ring.of(config.channel), None
    if config.privacy.of_examples:
        rehearse(strategy, Reduce(LAYOUT, config.adapter.scale(), 0), hidden)
    if config.privacy.of_clients:
        nobody, expected = ServerState(0, torch.zeros(1)), config.expected_clients
        release = Release.of(config.privacy, nobody, expected, LAYOUT.mask(KINDS), 0)
    if ring is None and release is None:
        return Wire(config.channel)
    reduce = Reduce(LAYOUT, config.adapter.scale(), 0, ring, release)
    local = rehearse(strategy, reduce)
    if not reduce.vectors:
        raise ConfigError(
            f"{'channel.secure' if ring else 'privacy.level'}: server.strategy = "
            f"{config.server.strategy} sums no updates", expected="a rule that combines clients",
            remedy="Leave it out.",
        )  # fmt: skip
    if release and local.more_up:
        raise refuse("numbers that clients send besides their update")
    return Wire(config.channel, reduce.vectors)


def fit(config: Config, strategy: Strategy) -> None:
    """Raises ConfigError where the configuration asks for what the rule's rows cannot have."""
    name = config.server.strategy
    if strategy.rewrites and config.channel.feedback:
        raise ConfigError(
            f"channel.feedback: got true with server.strategy = {name}",
            expected="false: each round's A is another, and what was lost of B belongs to the last",
            remedy="Set channel.feedback = false.",
        )  # fmt: skip
    if strategy.prunes and config.adapter.init == "pissa":
        raise ConfigError(
            f"adapter.init: got pissa with server.strategy = {name}",
            expected="default: the base lacks factors of one rank, and the rule lowers ranks",
            remedy='Set adapter.init = "default".',
        )  # fmt: skip


def rows_kept(strategy: Strategy, clients: int) -> int:
    """How many rows the rule keeps of each client in training, of so many in a round."""
    local = strategy.rule(strategy.start(_row(), LAYOUT), _plan(clients, 1.0))
    return bool(local.prox_mu) + bool(local.control) + bool(local.personal)


def _plan(m: int, scale: float) -> RoundPlan:
    """Steps and losses are not 1: weights by them show."""
    return RoundPlan(
        1, np.arange(m), np.ones(m), np.full(m, LAYOUT.rank), np.full(m, scale), np.full(m, 2),
        np.ones(m), np.zeros(m, dtype=np.int64), (np.arange(m),), m,
    )  # fmt: skip


def _row() -> Tensor:
    """With A, B or weights of 0 rules may divide by 0."""
    return torch.where(LAYOUT.mask(KINDS), 0.5, 0.0)


def rehearse(
    strategy: Strategy, reduce: Reduce, see: Callable[[ClientUpdates], ClientUpdates] | None = None
) -> LocalRule:
    """Aggregate two updates of 0; returns how their clients would train.

    Args:
        reduce: over `LAYOUT`, as strict as the run's. see: what the server gets of updates.

    Raises:
        ConfigError: the rule asks for what the reduce does not give, or for losses it cannot see.
    """
    m = 2
    plan, row = _plan(m, reduce.scale), _row()
    updates = ClientUpdates(
        np.arange(m), row.expand(m, -1), row, np.ones(m, dtype=np.int64), np.full(m, 2.0),
        np.ones(m), np.ones(m, dtype=bool), 0.0,
    )  # fmt: skip
    server = strategy.start(row, LAYOUT)
    with suppress(RunError):  # what else fails is of a round this small
        given = iter([see(updates) if see else updates])
        after = strategy.aggregate(server, plan, given, reduce, Forgetful())
        if see and not all(v.isfinite().all() for v in (after.row, *after.memory.values())):
            raise ConfigError(
                "privacy.level: the rule needs losses of clients, which no noise hides",
                expected="one that looks at updates alone",
                remedy='Choose another server.strategy, or privacy.level = "none".',
            )
    return strategy.rule(server, plan)
