"""Bulyan: Krum chooses clients one by one, and each number is averaged around their median.

    theta = m - 2f times: Krum's winner among those that are left moves to the chosen
    x_j <- x_j + mean of the theta - 2f chosen (x_k - x)_j closest to their median

Krum bounds an attacker's distance, which a single number may use up; here each number is held.
m >= 4f + 3 clients must have returned. Ties go to the smaller client id.

By hand: updates 0, 5, 6, 7, 8, 9, 20 with f = 1: Krum takes 7, 6, 8, 5 and, of 0 and 9 that tie, 0;
their median is 6, the 3 closest are 5, 6, 7: x moves by 6. One ranking takes 5 to 9, and gives 7.

Paper: El Mhamdi et al., arXiv:1802.07927. Flower's `Bulyan` chooses all theta by one
ranking (`one_pass`). The authors' code chooses theta = m - 2f - 2 means of several clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedsim.reduce import Rows
from fedsim.strategies.krum import Krum, ranking, squared_distances
from fedsim.strategies.median import columns


@dataclass(frozen=True)
class Bulyan(Krum):
    """Krum, and then a mean around the median.

    Attributes:
        one_pass: rank all clients once, as Flower does, instead of anew after each choice.
    """

    one_pass: bool = False
    times: ClassVar[int] = 4

    def choose(self, delta: Tensor, ids: np.ndarray, f: int) -> np.ndarray:
        """theta positions, by ascending id."""
        distances, theta = squared_distances(delta), len(ids) - 2 * f
        if self.one_pass:
            chosen = ranking(distances, ids, f)[:theta]
        else:
            left, chosen = np.arange(len(ids)), np.zeros(theta, dtype=np.int64)
            for i in range(theta):
                best = ranking(distances[np.ix_(left, left)], ids[left], f)[0]
                chosen[i], left = left[best], np.delete(left, best)
        return chosen[np.argsort(ids[chosen])]

    def combine(self, found: Rows, ids: np.ndarray, f: int, round: int) -> Tensor:
        """Each number's mean around its median, in fp64."""
        chosen = torch.from_numpy(self.choose(found.delta, ids, f)).to(found.delta.device)
        theta, parts = len(chosen), []
        for part in columns(found.delta):
            x = part[chosen].double()
            middle = x.sort(dim=0).values[(theta - 1) // 2 : theta // 2 + 1].mean(0)
            order = (x - middle).abs().argsort(dim=0, stable=True)
            parts.append(x.gather(0, order[: theta - 2 * f]).mean(0))
        return torch.cat(parts)


STRATEGY = Bulyan
