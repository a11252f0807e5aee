"""The vocabulary: the frozen types that the parts of a simulation hand to each other.

Letters: N clients in the population, M in a round, K slots trained at once, P parameters of an
adapter, T packed tokens in a pass, B sequences in it, R rank, I/O linear in/out features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ConfigError
from fedsim.layout import KINDS, AdapterLayout, Piece, SiteViews
from fedsim.schedule import CONSTANT, Schedule

if TYPE_CHECKING:
    from fedsim.reduce import Reduce

__all__ = ["KINDS", "AdapterLayout", "Piece", "SiteViews"]


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
    population: int  # N
    schedule: Schedule = CONSTANT  # of `lr` over the steps of a visit

    def __len__(self) -> int:
        return len(self.client_ids)

    def rate(self, index: int, step: int) -> float:
        """A client's learning rate at one of its steps."""
        return float(self.lr[index]) * self.schedule.factor(step, int(self.steps[index]))

    def travel(self, index: int) -> float:
        """The sum of a client's learning rates over its steps."""
        steps = int(self.steps[index])
        factors = (self.schedule.factor(step, steps) for step in range(steps))
        return float(self.lr[index]) * sum(factors)


@dataclass(frozen=True)
class LocalRule:
    """Local training as data, so that every rule trains batched: never a callback.

    At each step a client k with row x, that started from x_k, takes as its gradient

        g + prox_mu (x - x_k) + correction - control_k + tail penalty's gradient

    and clips and optimises that, in the pieces of the kinds that are trained. With `behind` the
    proximal term, correction and control are kept from the optimiser: behind its step x moves by
    them times minus the client's rate, whatever `rates` are.

    Attributes:
        start: (P,) fp32; a client of rank r has its first r rows of A and columns of B.
        trained: kinds of pieces that train; the others stay bitwise as they started.
        rates: learning rates of kinds over the client's, 1 where not named.
        down, up: kinds that travel to the client and back; traffic is arithmetic on them.
        more_down, more_up: numbers that a client of full rank receives and sends besides.
        base_down: numbers that every client receives of what has joined the base.
        personal: kinds that a client keeps: it goes on from those of its last visit, its rows
            `row` in the client memory; at its first visit from those of `start`.
        same_product: at a rank below R, B is multiplied by s_R / s_r, so that the scaled product
            s B A does not depend on the rank.
        correction: (P,) fp32, the same for all clients.
        control: the name of the client memory's rows that are subtracted, zero before the first
            visit.
        tail_weight, tail_from, tail_least: lambda, gamma and least g of HetLoRA's penalty
            lambda sum over modules of ||B[:, g:r]|| ||A[g:r]||, g = floor(gamma r) or the least.
    """

    start: Tensor
    trained: tuple[str, ...] = KINDS
    rates: Mapping[str, float] = field(default_factory=dict)
    down: tuple[str, ...] = KINDS
    up: tuple[str, ...] = KINDS
    more_down: int = 0
    more_up: int = 0
    base_down: int = 0
    personal: tuple[str, ...] = ()
    same_product: bool = False
    prox_mu: float = 0.0
    correction: Tensor | None = None
    control: str = ""
    behind: bool = False
    tail_weight: float = 0.0
    tail_from: float = 1.0
    tail_least: int = 0


@dataclass(frozen=True)
class ClientUpdates:
    """What k clients sent back, in the plan's order."""

    index: np.ndarray  # (k,) int64 positions in the plan
    row: Tensor  # (k, P) fp32
    start: Tensor  # (P,) or (k, P) fp32, the rows that they started from, cut to their rank
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
    """What the server remembers between rounds; checkpointed whole.

    Attributes:
        memory: the rule's own tensors. Of these `ranks`, `clients` with `ids`, and `truncation`
            are also read by the simulation.
        base: what is added to the frozen weights of target modules, shared by all clients:
            "module.A" (R', I) and "module.B" (O, R'), whose product it is, or "module.W" (O, I);
            fp32.
    """

    round: int
    row: Tensor  # (P,) fp32, the global adapter
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)

    def after(
        self, plan: RoundPlan, row: Tensor, memory: Mapping[str, Tensor] | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> ServerState:  # fmt: skip
        """The state after a round; memory and base stay as they are where none is given."""
        return ServerState(
            plan.round, row, self.memory if memory is None else memory,
            self.base if base is None else base,
        )  # fmt: skip

    def to(self, device: torch.device) -> ServerState:
        """The same state on another device."""
        memory, base = (
            {name: value.to(device) for name, value in part.items()}
            for part in (self.memory, self.base)
        )
        return ServerState(self.round, self.row.to(device), memory, base)


class ClientMemory(Protocol):
    """Rows that clients keep between visits: a personal factor, a control variate.

    What is written in a round is read from the next one on.
    """

    def read(self, name: str, client: int) -> Tensor | None:
        """(P,) fp32 on the CPU, or None before the client's first."""
        ...

    def write(self, name: str, client: int, row: Tensor) -> None: ...

    def clients(self, name: str) -> list[int]:
        """Those that have such a row, ascending."""
        ...


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
    subject: str = ""  # whose: the content of adapter and base, "" within a run
    asked: str = ""  # of whom what: questions by content, protocol, backend and precision
    no_op: bool = False  # the adapter changes nothing: B A is zero in every module

    def record(self) -> dict[str, Any]:
        """Plain fields, as written to scores.json."""
        return dict(self.__dict__)


class Strategy:
    """A federated rule: how clients start, and how their updates become the next server row.

    A frozen dataclass whose fields are the rule's options, `server.options` in a configuration. A
    rule that keeps nothing but the row has only `step` of its own.

    Attributes:
        rewrites: each round's row has coordinates of its own: nothing of one may be added to the
            next, as error feedback does.
        prunes: it lowers clients' ranks.
        joins: it adds to the base, which clients receive besides.
    """

    rewrites: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
    joins: ClassVar[bool] = False

    def start(self, row: Tensor, layout: AdapterLayout) -> ServerState:
        """The server before the first round, from a fresh adapter (P,)."""
        return ServerState(0, row)

    def rule(self, server: ServerState, plan: RoundPlan) -> LocalRule:
        """How the clients of a round train: from the global row."""
        return LocalRule(server.row)

    def step(self, plan: RoundPlan, updates: Iterator[ClientUpdates], reduce: Reduce) -> Tensor:
        """What the row moves by, (P,) fp32 or fp64; a rule with its own `aggregate` needs none."""
        raise NotImplementedError  # `strategies.load` refuses a rule that has neither

    def aggregate(
        self, server: ServerState, plan: RoundPlan, updates: Iterator[ClientUpdates],
        reduce: Reduce, memory: ClientMemory,
    ) -> ServerState:  # fmt: skip
        """The server after a round."""
        step = self.step(plan, updates, reduce)
        return server.after(plan, (server.row.double() + step).float())


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device when there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if there else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ConfigError(
            "run.device", got=name,
            expected=f"cuda or cuda:0 to cuda:{there - 1}" if there else
            "cpu: torch finds no CUDA device",
            remedy="Set run.device to auto or cpu.",
        )  # fmt: skip
    return device
