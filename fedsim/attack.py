"""Attacks: what clients that mean harm do to their updates, or to the answers that they train on.

d = x_k - x of an attacker becomes, in the numbers that it sends:

    sign_flip   -factor d
    scale       factor d                              arXiv:1807.00459, boosting
    gaussian    noise of standard deviation `std`     arXiv:1703.02757
    a_little    mean - z std of the honest updates    arXiv:1902.06156

`a_little` needs all updates of a round, and so memory O(M P); the paper estimates mean and std from
the attackers' own updates, here they know the honest ones. Who attacks is a function of the seed.

By hand: sign_flip with factor 2 sends -6 for 3; a_little among honest 1 and 3 with z = 0.5 sends
2 - 0.5 = 1.5. Its own z for m = 50, f = 24: s = 26 - 24 = 2, Phi(z) = (50 - 24 - 2) / (50 - 24),
z = 1.43.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import NormalDist
from typing import Annotated, Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedsim import options as options_
from fedsim import seeds
from fedsim.core import AdapterLayout, ClientUpdates, Population, RoundPlan
from fedsim.errors import ConfigError, DataError, RunError, nearest


@dataclass(frozen=True)
class Sent:
    """What k clients that returned are about to send.

    Attributes:
        delta: (k, P) fp32.
        has: (k, P) bool, the numbers that each sends.
        clients: (k,) int64 ids. bad: (k,) bool, who attacks.
        round, key: of counted randomness.
    """

    delta: Tensor
    has: Tensor
    clients: np.ndarray
    bad: np.ndarray
    round: int
    key: int


class Attack(Protocol):
    """A frozen dataclass whose fields are its options.

    Attributes:
        whole: it looks at all updates of a round at once.
    """

    whole: ClassVar[bool]

    def __call__(self, sent: Sent) -> Tensor:
        """What the attackers send instead, in their order: (number of them, P) fp32."""
        ...


@dataclass(frozen=True)
class SignFlip:
    """The opposite of what was learnt."""

    factor: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    whole: ClassVar[bool] = False

    def __call__(self, sent: Sent) -> Tensor:
        """-factor d."""
        return -self.factor * sent.delta[_where(sent)]


@dataclass(frozen=True)
class Scale:
    """What was learnt, louder."""

    factor: Annotated[float, Field(allow_inf_nan=False)] = 10.0
    whole: ClassVar[bool] = False

    def __call__(self, sent: Sent) -> Tensor:
        """factor d."""
        return self.factor * sent.delta[_where(sent)]


@dataclass(frozen=True)
class Gaussian:
    """Noise in place of what was learnt, each attacker and round its own."""

    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    whole: ClassVar[bool] = False

    def __call__(self, sent: Sent) -> Tensor:
        """std n, n ~ N(0, 1), the same on every device."""
        p = sent.delta.shape[1]
        rows = [
            seeds.normal(sent.key, seeds.Purpose.ATTACK, p, client=int(client), round=sent.round)
            for client in sent.clients[sent.bad]
        ]
        return (self.std * torch.stack(rows)).to(sent.delta)


@dataclass(frozen=True)
class ALittle:
    """All attackers send the same point, just inside the honest spread.

    Attributes:
        z: standard deviations from the mean; the default, none, is the paper's for m and f.
    """

    z: Annotated[float, Field(allow_inf_nan=False)] | None = None
    whole: ClassVar[bool] = True

    def __call__(self, sent: Sent) -> Tensor:
        """mean - z std of each number; where nobody is honest, what was learnt."""
        m, f = len(sent.bad), int(sent.bad.sum())
        if f == m:
            return sent.delta
        z = z_max(m, f) if self.z is None else self.z
        honest = torch.from_numpy(np.flatnonzero(~sent.bad)).to(sent.delta.device)
        parts = []
        for part in sent.delta.split(max(1, (1 << 22) // m), dim=1):
            std, mean = torch.std_mean(part[honest].double(), dim=0, correction=0)
            parts.append((mean - z * std).float())
        return torch.cat(parts).expand(f, -1)


KINDS: Mapping[str, type[Attack]] = {
    "sign_flip": SignFlip, "scale": Scale, "gaussian": Gaussian, "a_little": ALittle,
}  # fmt: skip


def attack(kind: str, options: Mapping[str, Any] | None = None) -> Attack:
    """An attack by name, with its options.

    Raises:
        ConfigError: there is no such attack, or an option is unknown or impossible.
    """
    if kind not in KINDS:
        raise ConfigError("attack.kind", got=kind, remedy=nearest(kind, KINDS))
    made: Attack = options_.make(KINDS[kind], options or {}, "attack.options", kind)
    return made


def attackers(key: int, clients: int, fraction: float) -> np.ndarray:
    """Who attacks, floor(fraction N) of N clients: (N,) bool; more with a larger fraction."""
    out = np.zeros(clients, dtype=bool)
    count = math.floor(Fraction(str(fraction)) * clients)
    out[seeds.permutation(key, seeds.Purpose.ATTACK, clients)[:count]] = True
    return out


def poison(
    how: Attack, updates: Iterable[ClientUpdates], *, plan: RoundPlan, bad: np.ndarray,
    layout: AdapterLayout, up: Sequence[str], key: int,
) -> Iterator[ClientUpdates]:  # fmt: skip
    """A round's updates as the server gets them; those of honest and failed clients unchanged.

    Args:
        bad: (N,) bool, who attacks. up: kinds of pieces that travel; others stay.
    """
    groups = [list(updates)] if how.whole else ([block] for block in updates)
    for group in groups:
        if not group:
            return
        index, ok = (np.concatenate([getattr(u, n) for u in group]) for n in ("index", "ok"))
        ids = plan.client_ids[index]
        if not (bad[ids] & ok).any():
            yield from group
            continue
        delta = torch.cat([u.delta[torch.from_numpy(u.ok).to(u.row.device)] for u in group])
        has = torch.stack([layout.mask(up, int(r)) for r in plan.rank[index[ok]]]).to(delta.device)
        sent = Sent(delta, has, ids[ok], bad[ids[ok]], plan.round, key)
        yield from _replaced(group, sent, how(sent), bad[ids] & ok)


def _replaced(
    group: list[ClientUpdates], sent: Sent, new: Tensor, which: np.ndarray
) -> Iterator[ClientUpdates]:
    """The blocks with the attackers' rows put in their place; a server refuses what overflows."""
    has, at, seen = sent.has[_where(sent)], 0, 0
    for block in group:
        mine = np.flatnonzero(which[at : at + len(block.index)])
        row, ok = block.row.clone() if len(mine) else block.row, block.ok.copy()
        for i in mine:
            start = block.start if block.start.ndim == 1 else block.start[i]
            row[i] = torch.where(has[seen], start + new[seen], row[i])
            ok[i], seen = bool(row[i].isfinite().all()), seen + 1
        at += len(block.index)
        yield replace(block, row=row, ok=ok)


def _where(sent: Sent) -> Tensor:
    return torch.from_numpy(np.flatnonzero(sent.bad)).to(sent.delta.device)


def z_max(m: int, f: int) -> float:
    """How far from the mean f of m can go while enough honest clients are farther out.

    s = floor(m/2 + 1) - f honest ones make a majority with them: the largest z with
    Phi(z) < (m - f - s) / (m - f), or 0 where that is on the other side of the mean.

    Raises:
        RunError: the attackers are a majority by themselves: no z is too large.
    """
    s = m // 2 + 1 - f
    if s <= 0:
        raise RunError(
            f"a_little: f = {f} of m = {m} clients attack", expected="less than a majority",
            remedy="Set its z, or lower the fraction that attacks.",
        )  # fmt: skip
    share = (m - f - s) / (m - f)
    return max(0.0, NormalDist().inv_cdf(share)) if share > 0 else 0.0


def flipped(answers: Sequence[str], population: Population, bad: np.ndarray) -> np.ndarray:
    """Label flip: the example whose answer each example trains on, (E,) int64; else itself.

    The distinct answers of an attacker, in the order of their text, are a ring, and each becomes
    the next: all change, equal ones to equal ones. Labels that a client holds so change places
    (arXiv:2007.08432); with free text every question gets the answer to another of the same client.
    One that has a single answer takes the ring of everybody's.

    Raises:
        DataError: all examples have the same answer.
    """
    out = np.arange(len(answers))
    everybody: dict[str, int] = {}
    for client in np.flatnonzero(bad):
        own = population.of(int(client))
        ring = _ring(answers, own)
        if len(ring) == 1:
            ring = everybody = everybody or _ring(answers, out)
            if len(ring) == 1:
                raise DataError("all examples have the same answer", expected="two or more")
        out[own] = [ring[answers[i]] for i in own]
    return out


def _ring(answers: Sequence[str], among: np.ndarray) -> dict[str, int]:
    """Each distinct answer -> the first example of the next one."""
    first: dict[str, int] = {}
    for i in sorted(among.tolist()):
        first.setdefault(answers[i], i)
    texts = sorted(first)
    return {text: first[after] for text, after in zip(texts, texts[1:] + texts[:1], strict=True)}
