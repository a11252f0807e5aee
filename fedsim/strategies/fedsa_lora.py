"""FedSA-LoRA: both factors train, A is shared and averaged, each client keeps its own B.

    A <- sum_k p_k A_k,   client k goes on from (A, B_k)

The server's B stays as it was at the start: no adapter is everybody's, so the clients' own are
evaluated. A client's B is read from its own last visit and from nowhere else: public code that
leaves it on the one shared model hands it to the next client. By hand: A = (1, 3), p = 1/2, B_1 =
5: client 1 goes on from (2, 5).

Paper: Guo et al., arXiv:2410.01463.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedsim.core import ClientMemory, ClientUpdates, LocalRule, RoundPlan, ServerState
from fedsim.reduce import Reduce
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedSALoRA(FedAvg):
    """FedAvg of A; rows `row` of the client memory hold each B, and magnitudes."""

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """A from the server, the rest from the client's last visit."""
        return LocalRule(server.row, down=("A",), up=("A",), personal=("B", "mag"))

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """Fold A; each healthy client's row is kept as it passes."""

        def kept() -> Iterator[ClientUpdates]:
            for block in updates:
                for i in np.flatnonzero(block.ok):
                    memory.write("row", int(plan.client_ids[block.index[i]]), block.row[i])
                yield block

        mean = self.step(plan, kept(), reduce)
        shared = reduce.layout.mask(("A",)).to(mean.device)
        return server.after(plan, server.row + torch.where(shared, mean, 0))


STRATEGY = FedSALoRA
