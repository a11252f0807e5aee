"""The vocabulary: the frozen types that the parts of a simulation hand to each other.

Letters: N clients in the population, M in a round, K slots trained at once, P parameters of an
adapter, T packed tokens in a pass, B sequences in it, R rank, I/O linear in/out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
    kind: str  # "A" (R, I) or "B" (O, R)
    shape: tuple[int, int]
    offset: int

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class AdapterLayout:
    """Where each LoRA factor lies in a row of P numbers.

    A piece starts at a multiple of 16 elements; the gaps between pieces stay zero and count
    neither in norms nor in traffic. A client of rank r < R uses the first r rows of A and the
    first r columns of B; the rest stays exactly zero.
    """

    pieces: tuple[Piece, ...]
    rank: int
    size: int

    @classmethod
    def build(cls, targets: Mapping[str, tuple[int, int]], rank: int) -> AdapterLayout:
        """Lay out A and B of every target module, in the order given.

        Args:
            targets: module name -> (in features I, out features O).
            rank: R, the largest rank of any client.
        """
        pieces, offset = [], 0
        for module, (features_in, features_out) in targets.items():
            for kind, shape in (("A", (rank, features_in)), ("B", (features_out, rank))):
                pieces.append(Piece(module, kind, shape, offset))
                offset += -(-shape[0] * shape[1] // _ALIGN) * _ALIGN
        return cls(tuple(pieces), rank, offset)

    def view(self, matrix: Tensor, piece: Piece) -> Tensor:
        """One piece of every row: (K, P) -> strided view (K, *shape), no copy."""
        span = matrix[:, piece.offset : piece.offset + piece.size]
        return span.view(len(matrix), *piece.shape)

    def factors(self, matrix: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """module -> views (A (K, R, I), B (K, O, R)) of a (K, P) matrix."""
        out: dict[str, tuple[Tensor, Tensor]] = {}
        for a, b in zip(self.pieces[::2], self.pieces[1::2], strict=True):
            out[a.module] = (self.view(matrix, a), self.view(matrix, b))
        return out

    def numel(self, rank: int | None = None) -> int:
        """Numbers that one client of this rank trains and sends: sum of r (I + O)."""
        r = self.rank if rank is None else rank
        return sum(p.size // self.rank * r for p in self.pieces)


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
    its K slots. They follow from the plan and the configuration alone, never from the device.
    """

    round: int
    client_ids: np.ndarray  # (M,) int64, ascending
    weights: np.ndarray  # (M,) float64, e.g. examples held
    rank: np.ndarray  # (M,) int64
    scale: np.ndarray  # (M,) float64, alpha / rank
    steps: np.ndarray  # (M,) int64 optimiser steps
    lr: np.ndarray  # (M,) float64
    version: np.ndarray  # (M,) int64, the server round the client starts from
    lanes: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.client_ids)


@dataclass(frozen=True)
class PackedBatch:
    """One pass: sequences of several clients, end to end, without padding.

    Sequences of a slot are adjacent. `parent[b]` is the sequence whose tokens precede b's
    (a shared prefix), or -1; positions continue from it.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    lengths: np.ndarray  # (B,) int64
    slot: np.ndarray  # (B,) int64
    sequence: np.ndarray  # (B,) int64, index within its client's step
    parent: np.ndarray  # (B,) int64
    label_rows: Tensor  # (L,) int64 packed rows whose next token is a label
    targets: Tensor  # (L,) int64
    label_slot: Tensor  # (L,) int64
    label_weight: Tensor  # (L,) fp32, 1 / label tokens of the client's whole step

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class LocalRule:
    """Local training as data, so that every rule trains batched: never a callback."""

    start: Tensor  # (P,) fp32, the row that every client starts from


@dataclass(frozen=True)
class ClientUpdates:
    """What k clients sent back, in the plan's order."""

    index: np.ndarray  # (k,) int64 positions in the plan
    row: Tensor  # (k, P) fp32
    start: Tensor  # (P,) fp32
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
