"""A round of a rule before the run: two clients on a tiny adapter who have learnt nothing.

A rule that looks at single updates where only sums may be seen is refused here and not after hours
of training; and how many sums it asks for is counted here, which `fedsim plan` needs too.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from fedsim.channel import Wire
from fedsim.config import Config
from fedsim.core import KINDS, AdapterLayout, ClientUpdates, RoundPlan, Strategy
from fedsim.errors import ConfigError, RunError
from fedsim.reduce import Reduce
from fedsim.secure import Ring

LAYOUT = AdapterLayout.build({"q": (4, 4)}, 2, dora=True)


class _Forgetful:
    """A client memory in which nothing is found."""

    def read(self, name: str, client: int) -> Tensor | None:
        return None

    def write(self, name: str, client: int, row: Tensor) -> None: ...

    def clients(self, name: str) -> list[int]:
        return []


def wire(config: Config, strategy: Strategy) -> Wire:
    """What updates take on the way in a run.

    Raises:
        ConfigError: the rule and the channel do not go together.
    """
    ring = Ring.of(config.channel)
    if ring is None:
        return Wire(config.channel)
    reduce = Reduce(LAYOUT, config.adapter.scale(), 0, ring)
    rehearse(strategy, reduce)
    if not reduce.vectors:
        raise ConfigError(
            f"channel.secure: server.strategy = {config.server.strategy} sums no updates",
            expected="a rule that combines clients", remedy="Set channel.secure = false.",
        )  # fmt: skip
    return Wire(config.channel, reduce.vectors)


def rehearse(strategy: Strategy, reduce: Reduce) -> None:
    """Aggregate two updates of 0.

    Args:
        reduce: over `LAYOUT`, as strict as the run's.

    Raises:
        ConfigError: the rule asks for what the reduce does not give.
    """
    m = 2
    plan = RoundPlan(
        1, np.arange(m), np.ones(m), np.full(m, LAYOUT.rank), np.full(m, reduce.scale),
        np.ones(m, dtype=np.int64), np.ones(m), np.zeros(m, dtype=np.int64), (np.arange(m),), m,
    )  # fmt: skip
    row = torch.where(
        LAYOUT.mask(KINDS), 0.5, 0.0
    )  # with A, B or weights of 0 rules may divide by 0
    updates = ClientUpdates(
        np.arange(m), row.expand(m, -1), row, np.ones(m, dtype=np.int64), np.ones(m), np.ones(m),
        np.ones(m, dtype=bool), 0.0,
    )  # fmt: skip
    # What else fails is of these updates, or of a round this small: `rule` is not asked.
    with suppress(RunError):
        strategy.aggregate(
            strategy.start(row, LAYOUT), plan, iter([updates]), reduce, _Forgetful()
        )  # fmt: skip
