"""The section `channel`: what happens to an update between client and server, and what it takes.

Bytes that a client sends of n numbers in pieces (`Wire`), those besides (`more_up`) being fp32:

    none      4 n
    int8      n + 4 ceil(n / block)                  a code each, an fp32 scale a block
    int4      ceil(n / 2) + 4 ceil(n / block)
    top_k     4 k + min(4 k, ceil(n / 8)),           k values, and where they are: a 4-byte index
              k = ceil(keep n)                       each, or a bit for each of the n
    secure    ceil(v (n + 1) bits / 8) + 2 K + 2 (m - 1) S + m S

Secure aggregation (arXiv:1611.04482) among m clients sends v masked vectors, one for each way of
weighing, with the weight as one more number; K, S = 32 bytes of a public key and of a share of a
secret. A client sends its two keys, two encrypted shares to every other, and in the end a share of
each one's secret; it receives 2 (m - 1) keys and as many encrypted shares: together the paper's
2 m K + (5 m - 4) S. By hand, m = 3: up 2 x 32 + 4 x 32 + 3 x 32 = 288, down 4 x 32 + 4 x 32 = 256.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, model_validator

from fedsim.section import Section, with_defaults

KEY, SHARE = 32, 32  # bytes: X25519, and a share of a secret of 256 bits
BITS = {"int8": 8, "int4": 4}
# What each compression, and secure aggregation, takes besides, with its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "int8": {"block": 256, "feedback": False},
    "int4": {"block": 256, "feedback": False},
    "top_k": {"keep": 0.01, "feedback": True},
}
SECURE: dict[str, Any] = {"threshold": 2 / 3, "bits": 32, "range": 1.0}


class Channel(Section):
    """Keys that the channel does not use stay unset, and setting one is an error."""

    compression: Literal["none", "int8", "int4", "top_k"] = Field(
        "none", description="of the pieces that clients send; see fedsim/compress.py"
    )
    block: int | None = Field(
        None, ge=1, description="int8, int4: numbers that share a scale; or 256"
    )
    keep: float | None = Field(
        None, gt=0, le=1, description="top_k: the share that is sent; or 0.01"
    )
    feedback: bool | None = Field(
        None, description="what compression lost is added to the next update; or: with top_k"
    )
    secure: bool = Field(False, description="the server sees sums only; see fedsim/secure.py")
    threshold: float | None = Field(
        None, gt=0.5, le=1, description="secure: the share of a round that must return; or 2/3"
    )
    bits: int | None = Field(None, ge=16, le=48, description="secure: of the ring; or 32")
    range: float | None = Field(
        None, gt=0, description="secure: the largest number of a weighted update; or 1"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        values = with_defaults(values, "compression", OPTIONS)
        on = isinstance(values, Mapping) and values.get("secure") is True
        return {**SECURE, **values} if on else values

    def misfit(self, clients: int) -> str:
        """What does not go together, in the words of an error; or "".

        Args:
            clients: of a round.
        """
        for key in ("block", "keep", "feedback"):
            value, takers = getattr(self, key), [c for c in OPTIONS if key in OPTIONS[c]]
            if (value is not None) != (self.compression in takers):
                return (
                    f"channel.{key}: got {value}; expected only, and then, with "
                    f"channel.compression = {' or '.join(takers)}, which is {self.compression}"
                )
        for key in SECURE:
            value = getattr(self, key)
            if (value is not None) != self.secure:
                return f"channel.{key}: got {value}; expected only, and then, with channel.secure"
        if not self.secure:
            return ""
        if self.compression != "none":
            return (
                f"channel.compression: got {self.compression}; expected none with "
                "channel.secure: a masked vector has all its numbers, and each is as long as the "
                "ring's"
            )
        if clients < 2:
            return (
                f"channel.secure: got true with {clients} client a round; expected 2 or more: the "
                "sum of one is its update"
            )
        if largest(self.bits or 0, clients) < 127:
            return (
                f"channel.bits: got {self.bits}; expected more for {clients} clients a round, or "
                "each has less than 8 of them"
            )
        return ""


def largest(bits: int, clients: int) -> int:
    """The largest integer of which `clients` add up in Z_2^bits without a wrap, either sign."""
    return ((1 << (bits - 1)) - 1) // clients


def kept(keep: float, numbers: int) -> int:
    """k = ceil(keep n), in decimals as written: of 0.07 among 100 numbers 7, not 8."""
    return math.ceil(Fraction(str(keep)) * numbers)


@dataclass(frozen=True)
class Wire:
    """Bytes of a client's update on the way.

    Attributes:
        vectors: v, the ways of weighing of the rule; with secure aggregation.
    """

    channel: Channel = field(default_factory=Channel)
    vectors: int = 1

    def up(self, numbers: int, clients: int) -> int:
        """Sent by each client of a round for the numbers in its pieces."""
        c = self.channel
        if c.secure:
            assert c.bits is not None
            vectors = -(-self.vectors * (numbers + 1) * c.bits // 8)
            return vectors + 2 * KEY + (2 * (clients - 1) + clients) * SHARE
        if c.keep is not None:
            k = kept(c.keep, numbers)
            return 4 * k + min(4 * k, -(-numbers // 8))
        if c.block is not None:
            return -(-numbers * BITS[c.compression] // 8) + 4 * -(-numbers // c.block)
        return 4 * numbers

    def down(self, clients: int) -> int:
        """Received by each client of a round besides fp32 numbers."""
        return 2 * (clients - 1) * (KEY + SHARE) if self.channel.secure else 0
