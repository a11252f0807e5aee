"""Multi-Krum: the server moves by the mean of the c updates that lie closest to their neighbours.

    x <- x + mean of d_k over the c lowest scores s_k of Krum        c <= m - f

c = 1 is Krum; without attackers, f = 0, c = m is the uniform mean.

By hand: updates 0, 1, 2, 4, 100 with f = 1 have scores 5, 2, 5, 13, 18820. c = 4, the default,
gives 7/4; c = 2 takes 1 and, of the two that tie, the smaller id's 0: 1/2.

Paper: Blanchard et al., arXiv:1703.02757. Flower weights the chosen ones by their
examples (`weighted`), and takes c = 1 when nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim.errors import RunError
from fedsim.reduce import Rows
from fedsim.strategies.krum import Krum, ranking, squared_distances
from fedsim.strategies.median import columns


@dataclass(frozen=True)
class MultiKrum(Krum):
    """Krum's best, averaged.

    Attributes:
        c: how many are averaged; the default, none, is m - f.
        weighted: by the plan's weights, examples, instead of equally.
    """

    c: Annotated[int, Field(ge=1)] | None = None
    weighted: bool = False

    def combine(self, found: Rows, ids: np.ndarray, f: int, round: int) -> Tensor:
        """The mean of the c best, in fp64."""
        m = len(ids)
        if self.c is not None and self.c > m - f:
            raise RunError(
                f"round {round}: c = {self.c} of m = {m} clients, f = {f} of them attackers",
                expected=f"c to be at most m - f = {m - f}", remedy="Lower server.options.c.",
            )  # fmt: skip
        chosen = ranking(squared_distances(found.delta), ids, f)[: self.c or m - f]
        w = np.zeros(m)
        w[chosen] = found.weights[chosen] if self.weighted else 1.0
        weights = torch.from_numpy(w / w.sum()).to(found.delta.device)
        return torch.cat([weights @ part.double() for part in columns(found.delta)])


STRATEGY = MultiKrum
