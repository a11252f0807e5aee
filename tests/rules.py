"""What the tests of federated rules share: a small layout, plans, updates, a client memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fedsim.core import AdapterLayout, ClientUpdates, RoundPlan, ServerState, Strategy
from fedsim.correction import delta_of
from fedsim.reduce import Reduce

LAYOUT = AdapterLayout.build({"q": (12, 8), "v": (12, 4)}, 3)
SCALE = 2.0
M = 6
EPS = 2.0**-24  # half a unit in the last place of fp32, relative


def plan_of(
    weights: Sequence[float], round: int = 1, population: int = 20,
    ids: Sequence[int] | None = None,
) -> RoundPlan:  # fmt: skip
    m = len(weights)
    return RoundPlan(
        round, np.arange(m) if ids is None else np.array(ids),
        np.array(weights, dtype=np.float64), np.full(m, 3), np.full(m, SCALE), np.full(m, 5), 
        np.full(m, 1e-3), np.full(m, round - 1), (np.arange(m),), population,
    )  # fmt: skip


def random_rows(seed: int, count: int) -> Tensor:
    """Rows with zero gaps, as a layout has them."""
    rows = torch.zeros(count, LAYOUT.size)
    for piece in LAYOUT.pieces:
        generator = torch.Generator().manual_seed(1000 * seed + piece.offset)
        LAYOUT.view(rows, piece).normal_(generator=generator)
    return rows


def blocks(
    start: Tensor, rows: Tensor, ok: Sequence[bool] | None = None, cuts: Sequence[int] = ()
) -> Iterator[ClientUpdates]:
    """The updates as they arrive, cut into blocks before the given positions."""
    for index in np.split(np.arange(len(rows)), list(cuts)):
        k = len(index)
        yield ClientUpdates(
            index=index, row=rows[index], start=start, tokens=np.full(k, 9),
            loss_first=np.full(k, 2.0), loss_last=np.full(k, 1.0),
            ok=np.array(ok)[index] if ok is not None else np.ones(k, dtype=bool), seconds=0.0,
        )  # fmt: skip


class Kept:
    """A client memory of dicts: what is written is read after `commit`."""

    def __init__(self) -> None:
        self.now: dict[tuple[str, int], Tensor] = {}
        self.staged: dict[tuple[str, int], Tensor] = {}

    def read(self, name: str, client: int) -> Tensor | None:
        return self.now.get((name, client))

    def write(self, name: str, client: int, row: Tensor) -> None:
        self.staged[name, client] = row.clone()

    def clients(self, name: str) -> list[int]:
        return sorted(client for kind, client in self.now if kind == name)

    def commit(self) -> None:
        self.now |= self.staged
        self.staged = {}


def reduce() -> Reduce:
    return Reduce(LAYOUT, SCALE, 1)


def step(
    strategy: Strategy, server: ServerState, rows: Tensor, weights: Sequence[float],
    ok: Sequence[bool] | None = None, cuts: Sequence[int] = (), memory: Kept | None = None,
    ids: Sequence[int] | None = None,
) -> ServerState:  # fmt: skip
    """One round of given updates."""
    plan = plan_of(weights, server.round + 1, ids=ids)
    start, memory = strategy.rule(server, plan).start, memory or Kept()
    after = strategy.aggregate(server, plan, blocks(start, rows, ok, cuts), reduce(), memory)
    memory.commit()
    return after


def weights_of(server: ServerState) -> dict[str, Tensor]:
    """module -> what the server adds to its weight, s B A and the base's part, (O, I) fp64."""
    out = {}
    for module, (a, b) in LAYOUT.factors(server.row[None]).items():
        out[module] = SCALE * b[0].double() @ a[0].double()
        if (joined := delta_of(server.base, module)) is not None:
            out[module] += joined
    return out
