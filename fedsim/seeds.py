"""The only source of randomness: Philox-4x32-10, counted and never drawn.

A random word is a pure function of the run's seed and of what it is for: (purpose, client,
round, step, sequence, position, module, feature). Nothing depends on the order in which work
happens, so samples and dropout masks are the same on any device, in any slot, after any resume.

Counter layout, four 32-bit words, key = the 64-bit run seed:

    c0  element // 4      (word element % 4 of the block serves the element)
    c1  sequence << 16 | module
    c2  round << 16 | step
    c3  purpose << 28 | client

Paper: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Random123).
"""

from __future__ import annotations

import enum
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim_kernels.philox import philox

_LIMITS = {
    "client": 1 << 28, "round": 1 << 16, "step": 1 << 16, "sequence": 1 << 16, "module": 1 << 16,
}  # fmt: skip


class Purpose(enum.IntEnum):
    """What a word is drawn for; the top four bits of the last counter."""

    SAMPLING = 0  # which clients take part in a round
    ORDER = 1  # the order of a client's examples
    DROPOUT = 2  # LoRA dropout masks
    INIT = 3  # the initial adapter
    SUBSET = 4  # which evaluation examples, when limited
    BOOTSTRAP = 5  # resampling for confidence intervals
    RANK = 6  # the rank of a client's adapter
    TOKEN = 7  # tokens of sampled continuations
    ATTACK = 8  # who attacks, and the noise that they send
    CHANNEL = 9  # rounding of compressed updates
    NOISE = 10  # of differential privacy


def run_key(seed: int) -> int:
    """Spread a user's small seed over 64 bits, so that seeds 0 and 1 share no key bits."""
    return int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "little")


def check_limits(**values: int) -> None:
    """Raise ConfigError when a count does not fit its counter field (it would repeat masks)."""
    for name, value in values.items():
        if not 0 <= value < _LIMITS[name]:
            raise ConfigError(f"{name} index", got=value, expected=f"less than {_LIMITS[name]}")


def words(
    key: int,
    purpose: Purpose,
    count: int,
    *,
    client: int = 0,
    round: int = 0,
    step: int = 0,
    sequence: int = 0,
    module: int = 0,
) -> Tensor:
    """The first `count` words of one stream: (count,) int64 in [0, 2^32)."""
    check_limits(client=client, round=round, step=step, sequence=sequence, module=module)
    c0 = torch.arange((count + 3) // 4, dtype=torch.int64)
    rest = [sequence << 16 | module, round << 16 | step, int(purpose) << 28 | client]
    c1, c2, c3 = (torch.tensor(c, dtype=torch.int64) for c in rest)
    return torch.stack(philox(key, c0, c1, c2, c3), dim=-1).reshape(-1)[:count]


def first_words(key: int, purpose: Purpose, clients: np.ndarray, round: int = 0) -> np.ndarray:
    """The first word of each client's stream in a round: (M,) int64 in [0, 2^32)."""
    zero = torch.zeros(len(clients), dtype=torch.int64)
    c3 = torch.as_tensor(clients) | int(purpose) << 28
    out: np.ndarray = philox(key, zero, zero, zero | round << 16, c3)[0].numpy()
    return out


def uniform(key: int, purpose: Purpose, count: int, **where: int) -> Tensor:
    """`count` numbers in (0, 1): (word + 1/2) / 2^32, float64."""
    return (words(key, purpose, count, **where).double() + 0.5) * 2.0**-32


def normal(key: int, purpose: Purpose, count: int, **where: int) -> Tensor:
    """N(0, 1) by Box and Muller, from two words each pair: (count,) float64."""
    half = (count + 1) // 2
    u, v = uniform(key, purpose, 2 * half, **where).split(half)
    r, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.cat([r * angle.cos(), r * angle.sin()])[:count]


def token_uniform(key: int, request: np.ndarray, position: np.ndarray) -> Tensor:
    """What the token at a position (n,) of a request's (n,) text is drawn by: (n,) float64 in
    (0, 1), (52 bits + 1/2) / 2^52."""
    c0, client = torch.as_tensor(position), torch.as_tensor(request)
    zero = torch.zeros_like(c0)
    high, low, *_ = philox(key, c0, zero, zero, client | int(Purpose.TOKEN) << 28)
    u: Tensor = ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52
    return u


def permutation(key: int, purpose: Purpose, count: int, **where: int) -> np.ndarray:
    """A permutation of range(count): order of the 64-bit words, ties by index; int64 (count,)."""
    w = words(key, purpose, 2 * count, **where).numpy().reshape(count, 2)
    order: np.ndarray = np.lexsort((w[:, 1], w[:, 0]))
    return order


def row_counters(
    *, client: Tensor, round: int, step: Tensor, sequence: Tensor, position: Tensor
) -> Tensor:
    """What `torch.ops.fedsim.dropout` knows of each packed row: (T, 4) int64.

    Args:
        client, step, sequence, position: (T,) int64; position < 0 marks padding.
    """
    where = [position, sequence << 16, round << 16 | step, int(Purpose.DROPOUT) << 28 | client]
    return torch.stack(where, dim=1)
