"""Local-only: clients train alone and are never averaged; the reference that federation must beat.

    x_k <- local training of k from the first row        the server's row stays

All training is one round, so that every client goes on from its own row; `fedsim run --reference
local` makes a study's configuration so. Evaluation is the mean over the clients' adapters. Memory
is O(M P): every row is kept.

By hand: start 0, clients end at 1 and 4: rows (1, 4), server 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState, Strategy
from fedsim.errors import ConfigError, RunError
from fedsim.reduce import Reduce


@dataclass(frozen=True)
class Local(Strategy):
    """Keeps every client's row, and combines nothing."""

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """Every client starts from the first row; in a second round it would start again."""
        if plan.round > 1:
            raise ConfigError(
                "server.rounds with strategy local", got=plan.round, expected="1",
                remedy="Use `fedsim run --reference local`, which puts all steps into one round.",
            )  # fmt: skip
        return super().rule(server, plan)

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """Rows of the clients whose training stayed finite, in the plan's order."""
        rows, ids = [], []
        for block in updates:
            for i, index in enumerate(block.index):
                if block.ok[i]:
                    rows.append(block.row[i].cpu())
                    ids.append(int(plan.client_ids[index]))
        if not rows:
            raise RunError(
                f"round {plan.round}: none of the {len(plan)} clients stayed finite",
                remedy="Lower train.lr_max; clients.jsonl has each client's losses.",
            )
        kept = {"clients": torch.stack(rows), "ids": torch.tensor(ids)}
        return server.after(plan, server.row, kept)


STRATEGY = Local
