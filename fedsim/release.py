"""What leaves a round under client-level differential privacy: one noised sum.

    x  <-  x + 1/(q N) (sum_k d_k min(1, C / ||d_k||) + z C n),     n ~ N(0, 1)

Every client takes part with probability q, independently, and counts the same; the denominator is
fixed, so that a client changes the sum by C at most. The norm is of all numbers that travel, and
the noise is in these alone: none in a frozen factor or one that stays at home. Adaptive clipping
moves C behind the round, so that the noise is that of the C which clipped:

    C <- C exp(-eta (b - gamma)),   b = 1/2 + 1/(q N) (sum_k (1[||d_k|| <= C] - 1/2) + s n')

with s = q N / 20. The shift makes a client's part 1/2 in size, so that both releases together are
one of multiplier z when the sum's is (z^-2 - (2 s)^-2)^(-1/2).

Noise is drawn by counters in floating point, the same on every device: a simulation, not a
hardened mechanism. By hand: C = 1, updates (3, 4) and (0, 0.5), q N = 2, without noise:
((0.6, 0.8) + (0, 0.5)) / 2 = (0.3, 0.65).

Papers: McMahan et al., arXiv:1710.06963; Andrew et al., arXiv:1905.03871, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.core import ClientUpdates, RoundPlan, ServerState
from fedsim.errors import ConfigError
from fedsim.privacy import Privacy

Weigh = Callable[[ClientUpdates], np.ndarray]
KEPT = "privacy.clip"  # in the server's memory, beside the rule's own


class Release:
    """One round's only look at its clients.

    Args:
        clip: C of this round. expected: q N. travels: (P,) bool, the numbers that clients send.
    """

    def __init__(
        self, privacy: Privacy, clip: float, expected: float, travels: Tensor, key: int
    ) -> None:
        assert privacy.noise is not None
        self._privacy, self._clip, self._expected = privacy, clip, expected
        self._travels, self._key = travels, key
        self._z, self._count_noise = privacy.noise, expected / 20
        if privacy.adaptive:
            self._z = (self._z**-2 - (2 * self._count_noise) ** -2) ** -0.5
        self._clients = self._whole = 0  # that came, and that were not clipped
        self._used = False

    @classmethod
    def of(
        cls, privacy: Privacy, server: ServerState, expected: float, travels: Tensor, key: int
    ) -> Release:
        """That of the round after `server`, whose memory has the clip where it is adaptive."""
        assert privacy.clip is not None
        kept = server.memory.get(KEPT)
        clip = privacy.clip if kept is None else float(kept)
        return cls(privacy, clip, expected, travels.to(server.row.device), key)

    @property
    def clip(self) -> float:
        """C of this round."""
        return self._clip

    def sum(
        self, plan: RoundPlan, updates: Iterator[ClientUpdates], weigh: tuple[Weigh, ...], of: str
    ) -> tuple[Tensor, float]:
        """The noised sum (P,) fp64, and the q N that it is to be divided by.

        Raises:
            ConfigError: the rule asks for another sum, or for a second one.
        """
        if self._used or len(weigh) != 1 or of != "delta":
            raise refuse("more than the sum of updates")
        self._used = True
        total = torch.zeros(len(self._travels), dtype=torch.float64, device=self._travels.device)
        for block in updates:
            if not (weigh[0](block)[block.ok] == 1).all():
                raise refuse("updates weighed by clients")
            for i in np.flatnonzero(block.ok):
                total += self._clipped(block.delta[i].double())
        noise = seeds.normal(self._key, seeds.Purpose.NOISE, len(total), round=plan.round)
        total += torch.where(self._travels, self._z * self._clip * noise.to(total), 0)
        return total, self._expected

    def _clipped(self, delta: Tensor) -> Tensor:
        """d min(1, C / ||d||), of what travels; 0 stays 0."""
        sent = torch.where(self._travels, delta, 0)
        norm = float(sent.norm())
        self._clients += 1
        self._whole += norm <= self._clip
        return sent if norm <= self._clip else sent * (self._clip / norm)

    def after(self, server: ServerState) -> ServerState:
        """The server's next state with the clip of the next round, where it is adaptive."""
        p = self._privacy
        if not p.adaptive:
            return server
        assert p.clip_rate is not None and p.quantile is not None
        n = float(seeds.normal(self._key, seeds.Purpose.NOISE, 1, round=server.round, module=1))
        counted = self._whole - self._clients / 2 + self._count_noise * n
        share = 0.5 + counted / self._expected
        clip = self._clip * math.exp(-p.clip_rate * (share - p.quantile))
        kept = torch.tensor(clip, dtype=torch.float64)
        return replace(server, memory={**server.memory, KEPT: kept})


def refuse(what: str) -> ConfigError:
    """The error of a rule that looks at more than one noised sum."""
    return ConfigError(
        f"privacy.level: the rule needs {what}, which no noise hides",
        expected="one that moves by the plain mean, such as fedavg, fedadam or ffa_lora",
        remedy='Choose another server.strategy, or privacy.level = "none".',
    )
