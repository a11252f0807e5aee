"""The mask of counted dropout, from its definition: what every implementation is held to."""

from __future__ import annotations

import torch
from torch import Tensor

from fedsim.seeds import Purpose
from fedsim_kernels.philox import philox


def keep_mask(
    key: int,
    p: float,
    features: int,
    *,
    client: Tensor,
    round: int,
    step: Tensor,
    sequence: Tensor,
    position: Tensor,
    module: int,
) -> Tensor:
    """Dropout mask of packed rows: keep an element when its word >= floor(p 2^32).

    Elements are indexed by (position in the sequence, feature), never by packed row, so that a
    mask does not depend on what else shares the pass.

    Args:
        p: probability of dropping, in [0, 1).
        features: number of input features I.
        client, step, sequence, position: (T,) int64, of each packed row.

    Returns:
        (T, I) bool.
    """
    blocks = (features + 3) // 4
    c0 = position[:, None] * blocks + torch.arange(blocks, device=position.device)
    c1 = (sequence << 16 | module)[:, None]
    c2 = (round << 16 | step)[:, None]
    c3 = (int(Purpose.DROPOUT) << 28 | client)[:, None]
    w = torch.stack(philox(key, c0, c1, c2, c3), dim=-1).reshape(len(position), -1)
    return w[:, :features] >= int(p * 2**32)
