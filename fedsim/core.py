"""The vocabulary: the frozen types that the parts of a simulation hand to each other.

Letters: N clients in the population, M in a round, K slots trained at once, P parameters of an
adapter, T packed tokens in a pass, B sequences in it, R rank, I/O linear in/out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from fedsim.reduce import Reduce

_ALIGN = 16  # elements; a piece starts on a 64-byte boundary in fp32, 32 in bf16


@dataclass(frozen=True)
class Piece:
    """One factor of one target module inside an adapter's row."""

    module: str
    kind: str  # "A" (R, I), "B" (O, R), or with DoRA "mag" (1, O)
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class SiteViews:
    """The factors of a site's n modules as views of a (K, P) matrix: (K, n R, I), (K, sum O, R)
    and, with DoRA, (K, sum O)."""

    a: Tensor
    b: Tensor
    mag: Tensor | None


@dataclass(frozen=True)
class AdapterLayout:
    """Where each LoRA factor lies in a row of P numbers.

    Target modules that read the same input form a site. The A of a site lie below each other, and
    so do its B, so that one product serves all of them; each of the two starts at a multiple of
    16 elements. The gaps between stay zero and count neither in norms nor in traffic. A client of
    rank r < R uses the first r rows of A and the first r columns of B; the rest stays exactly
    zero.

    Attributes:
        sites: the module names of each site.
        rank: R, the largest rank of any client.
        size: P.
    """

    pieces: tuple[Piece, ...]
    sites: tuple[tuple[str, ...], ...]
    rank: int
    size: int

    @classmethod
    def build(
        cls,
        targets: Mapping[str, tuple[int, int]],
        rank: int,
        *,
        sites: Sequence[Sequence[str]] | None = None,
        dora: bool = False,
    ) -> AdapterLayout:
        """Lay out the factors of every target module, site by site.

        Args:
            targets: module name -> (in features I, out features O).
            rank: R, the largest rank of any client.
            sites: modules that read the same input; each by itself when not given.
            dora: each output feature also has a magnitude.
        """
        groups = tuple(tuple(site) for site in sites or [[name] for name in targets])
        pieces, offset = [], 0
        for site in groups:
            for kind in ("A", "B", "mag")[: 3 if dora else 2]:
                for module in site:
                    i, o = targets[module]
                    shape = {"A": (rank, i), "B": (o, rank), "mag": (1, o)}[kind]
                    pieces.append(Piece(module, kind, shape, offset))
                    offset += shape[0] * shape[1]
                offset = -(-offset // _ALIGN) * _ALIGN
        return cls(tuple(pieces), groups, rank, offset)

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """Every target module, site by site."""
        return tuple(name for site in self.sites for name in site)

    @cached_property
    def _by_name(self) -> dict[tuple[str, str], Piece]:
        return {(p.module, p.kind): p for p in self.pieces}

    def piece(self, module: str, kind: str) -> Piece:
        """One factor of one module."""
        return self._by_name[module, kind]

    def has(self, module: str, kind: str) -> bool:
        """Does this module have such a factor?"""
        return (module, kind) in self._by_name

    def view(self, matrix: Tensor, piece: Piece) -> Tensor:
        """One piece of every row: (K, P) -> strided view (K, *shape), no copy."""
        span = matrix[:, piece.offset : piece.offset + piece.size]
        return span.view(len(matrix), *piece.shape)

    def _part(self, matrix: Tensor, module: str, kind: str) -> Tensor:
        return self.view(matrix, self.piece(module, kind))

    def factors(self, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """module -> views (A (K, R, I), B (K, O, R)) of a (K, P) matrix."""
        return {
            name: (self._part(matrix, name, "A"), self._part(matrix, name, "B"))
            for name in self.modules
        }

    def site_views(self, matrix: Tensor) -> tuple[SiteViews, ...]:
        """The factors of every site as views of a (K, P) matrix."""
        out = []
        for site in self.sites:
            views: list[Tensor | None] = []
            for kind in ("A", "B", "mag"):
                pieces = [p for m in site if (p := self._by_name.get((m, kind)))]
                if not pieces:
                    views.append(None)
                    continue
                first, last = pieces[0], pieces[-1]
                span = matrix[:, first.offset : last.offset + last.size]
                views.append(span.view(len(matrix), -1, first.shape[1]) if kind != "mag" else span)
            a, b, mag = views
            assert a is not None and b is not None
            out.append(SiteViews(a, b, mag))
        return tuple(out)

    def numel(self, rank: int | None = None) -> int:
        """Numbers that one client of this rank trains and sends: sum of r (I + O), and O with
        DoRA."""
        r = self.rank if rank is None else rank
        return sum(p.size if p.kind == "mag" else p.size // self.rank * r for p in self.pieces)


@dataclass(frozen=True)
class Population:
    """N clients as arrays: client c owns `examples[offsets[c]:offsets[c + 1]]`."""

    offsets: np.ndarray  # (N + 1,) int64
    examples: np.ndarray  # (E,) int64 indices into the token store

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)

    def of(self, client: int) -> np.ndarray:
        """The indices of one client's examples."""
        return self.examples[self.offsets[client] : self.offsets[client + 1]]


@dataclass(frozen=True)
class RoundPlan:
    """Who trains in a round, how much, and who shares a pass.

    `lanes` are ordered queues of positions in `client_ids`; a device works a lane off through
    its K slots. They follow from the plan and the configuration alone, never from the device,
    and lie behind each other: the plan's order is the order of its lanes.
    """

    round: int
    client_ids: np.ndarray  # (M,) int64, ascending within a lane
    weights: np.ndarray  # (M,) float64, e.g. examples held
    rank: np.ndarray  # (M,) int64
    scale: np.ndarray  # (M,) float64, alpha / rank, or alpha / sqrt(rank)
    steps: np.ndarray  # (M,) int64 optimiser steps
    lr: np.ndarray  # (M,) float64
    version: np.ndarray  # (M,) int64, the server round the client starts from
    lanes: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.client_ids)


@dataclass(frozen=True)
class LocalRule:
    """Local training as data, so that every rule trains batched: never a callback."""

    start: Tensor  # (P,) fp32; a client of rank r starts from its first r rows of A, columns of B


@dataclass(frozen=True)
class ClientUpdates:
    """What k clients sent back, in the plan's order."""

    index: np.ndarray  # (k,) int64 positions in the plan
    row: Tensor  # (k, P) fp32
    start: Tensor  # (P,) fp32, the row that all of them started from, cut to their rank
    tokens: np.ndarray  # (k,) int64
    loss_first: np.ndarray  # (k,) float64
    loss_last: np.ndarray  # (k,) float64
    ok: np.ndarray  # (k,) bool; False: a loss or gradient was not finite
    seconds: float

    @property
    def delta(self) -> Tensor:
        """(k, P) fp32: row - start."""
        return self.row - self.start


@dataclass(frozen=True)
class ServerState:
    """What the server remembers between rounds; checkpointed whole."""

    round: int
    row: Tensor  # (P,) fp32, the global adapter
    memory: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device) -> ServerState:
        """The same state on another device."""
        memory = {name: value.to(device) for name, value in self.memory.items()}
        return ServerState(self.round, self.row.to(device), memory)


@dataclass(frozen=True)
class Score:
    """One cell of a leaderboard."""

    round: int
    domain: str
    task: str
    metric: str
    value: float
    n: int
    stderr: float
    precision: str
    protocol: str
    source: str
    file: str
    adapter: str = "global"
    backend: str = "engine"
    whole: bool = True  # every row of the set, not a subset

    def record(self) -> dict[str, Any]:
        """Plain fields, as written to scores.json."""
        return dict(self.__dict__)


class Strategy(Protocol):
    """A federated rule: how clients start, and how their updates become the next server row."""

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState: ...

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule: ...

    def aggregate(
        self,
        server: ServerState,
        plan: RoundPlan,
        updates: Iterator[ClientUpdates],
        reduce: Reduce,
    ) -> ServerState: ...


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
