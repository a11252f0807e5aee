"""Which process trains which clients of a round."""

from __future__ import annotations

import heapq

import numpy as np

from fedsim.core import Population, RoundPlan
from fedsim.data.tokens import TokenStore


def predicted(plan: RoundPlan, population: Population, store: TokenStore, batch: int) -> np.ndarray:
    """(M,) tokens of each client's visit: its steps, of examples of its mean length."""
    lengths = store.lengths
    out = np.zeros(len(plan))
    for index, client in enumerate(plan.client_ids):
        owned = population.of(int(client))
        each = len(owned) / -(-len(owned) // batch)  # the last batch of an epoch may be short
        out[index] = plan.steps[index] * each * lengths[owned].mean()
    return out


def placed(work: np.ndarray, processes: int) -> np.ndarray:
    """(M,) int64: the process of each client, longest first, each where least is to do so far.

    Args:
        work: (M,) predicted, in any unit.
    """
    out = np.zeros(len(work), dtype=np.int64)
    loads = [(0.0, process) for process in range(processes)]
    for index in np.argsort(-work, kind="stable"):
        load, process = loads[0]
        out[index] = process
        heapq.heapreplace(loads, (load + float(work[index]), process))
    return out
