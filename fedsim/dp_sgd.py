"""DP-SGD in a client: what it learns hides each of its examples, from the server as well.

    g  =  1/(q n) (sum_i g_i min(1, C / ||g_i||) + z C xi),     xi ~ N(0, 1),  q = min(1, batch / n)

Each of a client's n examples joins a step by itself, with probability q; g_i is the gradient of its
own mean loss in the numbers that train, and the noise is in these alone. A step may draw nobody,
and is noise. The rule's terms and AdamW, which does not clip again, come after, so that rows,
moments and updates are made of such g; a rule may combine them as it likes, but losses and counts
of tokens are no such thing, and the server gets none (`hidden`).

Adjacent are data of which one example has a gradient or has none; n and who is sampled are known.
A gradient that is not finite counts as 0, for a client that fails would tell. Sums are fp32 and
noise is drawn by counters: a simulation, not a hardened mechanism. By hand: C = 1, gradients (3, 4)
and (0, 0.5), q n = 2, without noise: ((0.6, 0.8) + (0, 0.5)) / 2 = (0.3, 0.65).

Paper: Abadi et al., arXiv:1607.00133, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.batch import on_device
from fedsim.core import ClientUpdates, LocalRule, Population, RoundPlan

if TYPE_CHECKING:
    from fedsim.adapters import AdapterBank
    from fedsim.config import Config
    from fedsim.packing import Parts
    from fedsim.privacy import Privacy


def drawn(batch: int, n: int, key: int, client: int, round: int, step: int) -> np.ndarray:
    """Which of a client's n examples are in a step, each with probability min(1, batch / n):
    ascending int64, none perhaps."""
    words = seeds.words(
        key, seeds.Purpose.ORDER, n, client=client, round=round, step=step
    ).numpy()  # fmt: skip
    return np.flatnonzero(words < (batch << 32) // n)


def hidden(update: ClientUpdates) -> ClientUpdates:
    """What the server gets of an update: no figure that was not made of noised gradients."""
    nothing = np.full(len(update.index), np.nan)
    return replace(
        update, tokens=nothing, loss_first=nothing, loss_last=nothing, seconds=float("nan")
    )


class DPSGD:
    """Sums of clipped gradients of the slots' present steps, (K, P) fp32.

    Args:
        expected: (N,) float64, q n of each client.
    """

    def __init__(
        self, privacy: Privacy, expected: np.ndarray, plan: RoundPlan, rule: LocalRule,
        bank: AdapterBank, key: int,
    ) -> None:  # fmt: skip
        assert privacy.noise is not None and privacy.clip is not None
        self._clip, self._std = privacy.clip, privacy.noise * privacy.clip
        self._expected, self._plan, self._bank, self._key = expected, plan, bank, key
        self._sums = torch.zeros_like(bank.rows)
        layout, device = bank.layout, bank.rows.device
        self._trains = {
            int(r): layout.mask(rule.trained, int(r)).to(device) for r in np.unique(plan.rank)
        }

    @classmethod
    def of(
        cls, config: Config, plan: RoundPlan, rule: LocalRule, bank: AdapterBank,
        population: Population, key: int,
    ) -> DPSGD | None:  # fmt: skip
        """That of a round; None where single examples are not to be hidden."""
        if not config.privacy.of_examples:
            return None
        expected = np.minimum(config.train.batch, population.sizes).astype(np.float64)
        return cls(config.privacy, expected, plan, rule, bank, key)

    def add(self, who: Mapping[int, int], parts: Parts, loss: Tensor) -> Tensor:
        """Take in a pass, whose gradients are of one example of a slot; where a step is complete,
        they become its g.

        Args:
            who: slot -> position in the plan. loss: (K,) fp64 of the single examples.

        Returns:
            (K,) fp64, what the pass adds to the means of its steps, over the examples with labels;
            NaN where one drew none.
        """
        count = np.ones(len(loss))
        for part, step in parts:
            count[part.slot] = np.count_nonzero(step.labels) or np.nan
            grad, total = self._bank.grads[part.slot], self._sums[part.slot]
            trains = self._trains[int(self._plan.rank[who[part.slot]])]
            if part.first == 0:
                total.zero_()
            if part.end > part.first:
                total.add_(self.clipped(torch.where(trains, grad, 0)))
            if part.completes:
                client = int(self._plan.client_ids[who[part.slot]])
                noise = self._noise(client, part.step).to(total.device)
                noised = total.double() + torch.where(trains, self._std * noise, 0)
                grad.copy_(noised / float(self._expected[client]))
        return loss / on_device(count, loss.device, torch.float64)

    def clipped(self, grad: Tensor) -> Tensor:
        """g min(1, C / ||g||) of one example (P,); 0 stays 0, and what is not finite becomes 0."""
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        short = grad * (self._clip / norm).clamp(max=1)
        return torch.where(norm.isfinite(), short, 0)

    def _noise(self, client: int, step: int) -> Tensor:
        """(P,) fp64 of N(0, 1)."""
        purpose, p = seeds.Purpose.NOISE, self._bank.layout.size
        return seeds.normal(
            self._key, purpose, p, client=client, round=self._plan.round, step=step
        )  # fmt: skip
