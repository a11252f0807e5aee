"""Small clients on a tiny base, and the measures that promises are stated in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import model, seeds
from fedsim.adapters import initial_row
from fedsim.config import Config
from fedsim.core import AdapterLayout, LocalRule, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.evaluate.generation import Adapter
from fedsim.evaluate.loaded import load
from fedsim.packing import cut
from fedsim.plan import schedule, step_examples
from fedsim.record import Meter
from fedsim.train import Trainer
from fedsim.weights import Weights
from fedsim_kernels.segments import Segments

# Of the largest element of a factor's gradient: the promise for fp32. The models of conftest come
# to 4.4e-6 in C++ and 4.1e-6 in PyTorch; stock PEFT is 4.9e-6 from its own float64 gradients.
GRADIENT = 1e-5
DELTA = 1e-3  # of the norm of what was learnt in ten steps: Adam divides rounding noise by |g|
KEY = seeds.run_key(1)
CLIENTS, EXAMPLES = 4, 7  # batches of 3: every third step holds one example, hence no prefix
SCALE = (2.0, 1.0, 0.5, 2.0)
LR = (1e-2, 2e-2, 5e-3, 1e-2)
STEPS = (3, 2, 4, 1)


def examples(shift: int = 0, client: int = -1) -> TokenStore:
    """Short random examples; each client's share a prompt prefix, client 2's the whole prompt.
    `shift` renames the tokens of one client, keeping every length."""
    rng = np.random.default_rng(5)
    ids, starts = [], []
    for c in range(CLIENTS):
        prefix = rng.integers(1, 384, 9 + c)
        for e in range(EXAMPLES):
            answer = 1 + (c + 2 * e) % 6
            own = 0 if c == 2 else 3 + (e * 5 + c) % 8
            row = np.concatenate([prefix, rng.integers(1, 384, own + answer)])
            ids.append((row + shift) % 383 + 1 if c == client else row)
            starts.append(len(row) - answer)
    return stored(ids, starts)


def stored(rows: Sequence[np.ndarray], starts: Sequence[int]) -> TokenStore:
    """A store of these examples, whose labels begin at `starts` and run to the end."""
    trained = [np.arange(len(row)) >= start for row, start in zip(rows, starts, strict=True)]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return TokenStore(np.concatenate(rows), offsets, np.concatenate(trained))


def without(store: TokenStore, examples: Sequence[int]) -> TokenStore:
    """The same data of which these examples have no labels."""
    gone = np.repeat(np.isin(np.arange(len(store)), examples), store.lengths)
    return replace(store, trained=store.trained & ~gone)


def labels(store: TokenStore, example: int) -> Tensor:
    """(n,) as transformers takes them: -100 is none."""
    span = slice(*store.offsets[example : example + 2])
    ids, trained = (torch.as_tensor(np.asarray(a[span])) for a in (store.ids, store.trained))
    return ids.masked_fill(~trained, -100)


@dataclass(frozen=True)
class Lab:
    """One base, the clients' data, and shortcuts to train them together or alone."""

    config: Config
    base: model.Base
    store: TokenStore
    start: Tensor  # (P,) with a random B: at B = 0 the gradient of A is 0

    def trainer(self, **train: Any) -> Trainer:
        config = self.config.model_copy(
            update={"train": self.config.train.model_copy(update=train)}
        )
        population = Population(np.arange(CLIENTS + 1) * EXAMPLES, np.arange(CLIENTS * EXAMPLES))
        return Trainer(self.base, self.store, population, config, KEY)

    def train(
        self, clients: Sequence[int], steps: Sequence[int] = STEPS, lr: Sequence[float] = LR,
        **train: Any,
    ) -> tuple[Tensor, np.ndarray]:  # fmt: skip
        """Train clients in this order; (rows (k, P), ok (k,)) in that order."""
        plan = plan_of(clients, steps, lr)
        blocks = list(self.trainer(**train).train(plan, LocalRule(self.start), Meter()))
        return torch.cat([b.row for b in blocks]), np.concatenate([b.ok for b in blocks])

    def gradients(
        self, clients: Sequence[int], *, step: int = 0, rows: Tensor | None = None, **train: Any
    ) -> tuple[Tensor, Tensor]:
        """Losses (k,) and gradients (k, P) of one local step, at the start or at rows (k, P)."""
        trainer, plan = self.trainer(**train), plan_of(clients)
        section, slots = trainer.config.train, trainer.bank.slots
        share = section.shared_prefix and not trainer.config.adapter.dropout
        steps = [cut(self.store, self.batch(c, step), section, share=share) for c in clients]
        for at in range(len(clients)):
            trainer.bank.load(at, self.start if rows is None else rows[at])
        total = torch.zeros(slots, dtype=torch.float64)
        for shift in schedule([1] * len(clients), lambda at, _: steps[at].load, slots,
                              trainer.budget):  # fmt: skip
            assert all(part.slot == part.client for part in shift.parts)
            parts = [(replace(part, step=step), steps[part.client]) for part in shift.parts]
            loss, _ = trainer.gradients(plan, {s: s for s in range(len(clients))}, parts)
            total += loss
        return total[: len(clients)], trainer.bank.grads[: len(clients)].clone()

    def batch(self, client: int, step: int) -> np.ndarray:
        """The examples of a client's local step."""
        owned = np.arange(EXAMPLES) + client * EXAMPLES
        return step_examples(self.config, owned, KEY, client, 1, step)


def plan_of(
    clients: Sequence[int], steps: Sequence[int] = STEPS, lr: Sequence[float] = LR
) -> RoundPlan:
    ids, m = np.array(clients), len(clients)
    return RoundPlan(
        round=1, client_ids=ids, weights=1.0 + ids, rank=np.full(m, 4), scale=np.array(SCALE)[ids],
        steps=np.array(steps)[ids], lr=np.array(lr)[ids], version=np.zeros(m, int),
        lanes=(np.arange(m),), population=CLIENTS,
    )  # fmt: skip


def open_base(config: Config, folder: Path | str | None = None) -> model.Base:
    path = Path(folder or config.model.name)
    return model.load(Weights(path, "test", "test"), config, torch.device("cpu"),
                      config.adapter.targets)  # fmt: skip


def open_lab(settings: Callable[..., Config], architecture: str = "llama", **changes: Any) -> Lab:
    """A lab on a tiny model; keyword `section__key` overrides its configuration."""
    config = settings(architecture, **{"data__max_length": 32, **changes})
    base = open_base(config)
    start = base.magnitudes(initial_row(base.layout, KEY))
    generator = torch.Generator().manual_seed(3)
    for _, b in base.layout.factors(start[None]).values():
        b.normal_(std=0.05, generator=generator)
    return Lab(config, base, examples(), start)


def logits(base: model.Base, row: Tensor, scale: float, ids: Tensor) -> Tensor:
    """(T, V) of one sequence under one adapter."""
    loaded = load(base, [Adapter("a", row=row, scale=scale)], Config().adapter)
    work = loaded.work(base, Segments.build([len(ids)], [0]))
    with torch.no_grad():
        return base.logits(base.hidden(ids, torch.arange(len(ids)), work))


def worst(layout: AdapterLayout, got: Tensor, want: Tensor) -> float:
    """Largest difference of a factor's gradient over that factor's largest gradient."""
    errors = []
    for piece in layout.pieces:
        g, w = layout.view(got, piece), layout.view(want, piece)
        peak = w.abs().amax((1, 2))
        assert (peak > 0).all(), f"{piece.module}.{piece.kind} has no gradient"
        errors.append(((g - w).abs().amax((1, 2)) / peak).max())
    return float(torch.stack(errors).max())


def distance(got: Tensor, want: Tensor, start: Tensor) -> float:
    """Largest ||delta - delta'|| / ||delta'|| of the rows."""
    return float(((got - want).norm(dim=1) / (want - start).norm(dim=1)).max())
