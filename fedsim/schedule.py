"""The learning rate from step to step of a visit: transformers' schedules, as factors of a rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["constant", "constant_with_warmup", "linear", "cosine", "inverse_sqrt"]


@dataclass(frozen=True)
class Schedule:
    """transformers' `get_scheduler(kind, ...)`, whose training steps are a visit's."""

    kind: Kind = "constant"
    warmup: int = 0

    def factor(self, step: int, steps: int) -> float:
        """What the visit's rate is multiplied by at one of its steps, the first of which is 0."""
        if self.kind == "constant":
            return 1.0
        if step < self.warmup:
            return step / self.warmup
        if self.kind == "constant_with_warmup":
            return 1.0
        if self.kind == "inverse_sqrt":
            scale = self.warmup or 10_000
            return 1 / math.sqrt((step - self.warmup + scale) / scale)
        rest = max(1, steps - self.warmup)
        if self.kind == "linear":
            return max(0.0, (steps - step) / rest)
        return 0.5 * (1 + math.cos(math.pi * ((step - self.warmup) / rest)))


CONSTANT = Schedule()
