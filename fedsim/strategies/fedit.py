"""FedIT: A and B are averaged apart, each weighted by examples.

    A <- sum_k p_k A_k,   B <- sum_k p_k B_k

The product of means is not the mean of products; `rounds.jsonl` has the error of every round
(`aggregation_error.py`). By hand: A = (1, 3), B = (1, 3), p = 1/2: B A = 4, the mean product is 5.

Paper: Zhang et al., arXiv:2305.05644.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True)
class FedIT(FedAvg):
    """FedAvg by its name for LoRA."""


STRATEGY = FedIT
