"""Philox-4x32-10 in PyTorch: random words as a function of counters.

Paper: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Random123).
"""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(key: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Four random words per counter: Philox-4x32 with ten rounds.

    Args:
        key: unsigned 64-bit integer.
        c0, c1, c2, c3: int64 tensors (broadcastable) holding 32-bit values.

    Returns:
        Four int64 tensors of the broadcast shape, each value in [0, 2^32).
    """
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The int64 product wraps modulo 2^64; its two 32-bit halves are right despite the sign.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3
