"""How fast are single operations? The figures of bench_engine.py that need no whole step.

    lora_vs_loop      grouped LoRA, forward + backward of the first layer's q, k, v and gate, up for
                      32 clients of 64 rows, against a Python loop over adapters in plain PyTorch:
                      PEFT's formulas, module by module, adapters and their arithmetic in fp32
    adamw_vs_foreach  AdamW with clipping of 32 clients' rows against 32 torch.optim.AdamW(foreach)
                      with clip_grad_norm_, on a tensor for each A and B as PEFT has them
    reduce_over_copy  bytes that the weighted sum of 32 rows reads in a second over the bytes that
                      torch's copy_ of the same rows reads and writes in a second
    utilisation       real rows over the budget, of the passes for 200 clients whose numbers of
                      examples are log-normal (sigma 0.8), one epoch each, 32 slots; of two budgets
                      the worse, low and high over both

Both arms of a ratio must give equal results first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from harness import Arm, Figure
from torch import Tensor

from fedsim.core import AdapterLayout
from fedsim.errors import ModelError
from fedsim.lora import Site
from fedsim.model import Base
from fedsim.plan import Load, schedule
from fedsim_kernels import reduce  # noqa: F401  registers the operation
from fedsim_kernels.segments import Segments

CLIENTS, ROWS = 32, 64
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
LR, MAX_NORM = 5e-5, 1.0
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest number


def must_agree(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Raises ModelError where max |got - want| > tolerance x max |want|."""
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max())
    if not error <= tolerance:
        raise ModelError(f"{what}: relative difference", got=error, expected=f"<= {tolerance}")


class Batch(NamedTuple):
    """What grouped LoRA reads and writes at one site, client after client."""

    columns: list[int]
    widths: list[int]
    tables: list[Tensor]
    y: Tensor  # (T, C)
    x: Tensor  # (T, I)
    a: Tensor  # (K, n R, I)
    b: Tensor  # (K, O_1 + ... + O_n, R)
    scale: Tensor  # (K,)
    g: Tensor  # (T, C)
    grad_a: Tensor
    grad_b: Tensor
    grad_x: Tensor  # (T, I)

    @classmethod
    def build(cls, site: Site, rank: int, dtype: torch.dtype) -> Batch:
        """Random numbers of the site's sizes."""
        features, n = site.weight.shape[1], len(site.adapted)
        t, o = CLIENTS * ROWS, sum(site.widths)
        make = torch.Generator().manual_seed(0)
        y, g = (torch.randn(t, len(site.weight), generator=make).to(dtype) for _ in range(2))
        x, grad_x = (torch.randn(t, features, generator=make).to(dtype) for _ in range(2))
        a = torch.randn(CLIENTS, n * rank, features, generator=make) * features**-0.5
        b = torch.randn(CLIENTS, o, rank, generator=make)
        tables = Segments.build([ROWS] * CLIENTS, range(CLIENTS)).tables(x.device)
        return cls(
            site.columns, site.widths, tables, y, x, a, b, torch.full((CLIENTS,), 2.0), g,
            torch.zeros_like(a), torch.zeros_like(b), grad_x,
        )  # fmt: skip

    @property
    def changed(self) -> tuple[Tensor, ...]:
        return self.y, self.grad_a, self.grad_b, self.grad_x

    def copy(self) -> Batch:
        """The same, with what is changed cloned."""
        y, grad_a, grad_b, grad_x = (t.clone() for t in self.changed)
        return self._replace(y=y, grad_a=grad_a, grad_b=grad_b, grad_x=grad_x)


def grouped(w: Batch) -> None:
    """One call forward and one backward for all clients and modules."""
    h = torch.ops.fedsim.grouped_lora(w.y, w.x, w.a, w.b, w.scale, w.tables, w.columns, w.widths)
    torch.ops.fedsim.grouped_lora_backward(
        w.g, w.x, h, w.a, w.b, w.scale, w.grad_a, w.grad_b, w.grad_x, w.tables, w.columns, w.widths
    )  # fmt: skip


def looped(w: Batch) -> None:
    """Client by client and module by module, as a mixed batch goes through PEFT."""
    r = w.b.shape[2]
    for k in range(len(w.scale)):
        rows, first = slice(k * ROWS, (k + 1) * ROWS), 0
        for m, (column, width) in enumerate(zip(w.columns, w.widths)):
            ranks, outs = slice(m * r, (m + 1) * r), slice(first, first + width)
            columns = slice(column, column + width)
            a, b, x = w.a[k, ranks], w.b[k, outs], w.x[rows].float()
            h = x @ a.T
            w.y[rows, columns] += (h @ b.T * w.scale[k]).to(w.y.dtype)
            g = w.g[rows, columns].float() * w.scale[k]
            u = g @ b
            w.grad_b[k, outs] += g.T @ h
            w.grad_a[k, ranks] += u.T @ x
            w.grad_x[rows] += (u @ a).to(w.x.dtype)
            first += width


def lora_vs_loop(base: Base, repeats: int) -> Figure:
    """Both multi-module sites of the first layer, one after the other."""
    sites = [site for site in base.sites if len(site.adapted) > 1][:2]
    batches = [Batch.build(site, base.layout.rank, base.dtype) for site in sites]
    for batch in batches:
        ours, theirs = batch.copy(), batch.copy()
        grouped(ours)
        looped(theirs)
        for got, want in zip(ours.changed, theirs.changed):
            must_agree("grouped LoRA and the loop", got, want, TOLERANCE[base.dtype])
    arms = {
        name: Arm(*[lambda run=run: [run(batch) for batch in batches]] * 2)
        for name, run in (("loop", looped), ("grouped", grouped))
    }
    timed = harness.time_arms(arms, repeats, "lora_vs_loop")
    return harness.figure(
        harness.ratio(timed["loop"].seconds, timed["grouped"].seconds),
        widths=[b.widths for b in batches], milliseconds=1e3 * timed["grouped"].median,
    )  # fmt: skip


def foreach_adam(
    layout: AdapterLayout, row: Tensor, grad: Tensor
) -> tuple[list[list[Tensor]], list[torch.optim.AdamW]]:
    """For each client of (K, P) matrices its own tensors, with gradients, and its optimiser."""
    clients, optimisers = [], []
    for k in range(len(row)):
        mine = []
        for piece in layout.pieces:
            p = layout.view(row[k : k + 1], piece)[0].clone().requires_grad_()
            p.grad = layout.view(grad[k : k + 1], piece)[0].clone()
            mine.append(p)
        clients.append(mine)
        optimisers.append(torch.optim.AdamW(mine, lr=LR, foreach=True, **ADAM))
    return clients, optimisers


def adamw_vs_foreach(base: Base, repeats: int) -> Figure:
    """Each arm holds 2.5 GB at rank 16 of SmolLM2-135M."""
    layout, make = base.layout, torch.Generator().manual_seed(0)
    rows, grads = torch.zeros(2, CLIENTS, layout.size).unbind()
    for piece in layout.pieces:  # gaps between pieces stay zero
        for matrix in (rows, grads):
            layout.view(matrix, piece).uniform_(-0.05, 0.05, generator=make)
    clients, optimisers = foreach_adam(layout, rows, grads)
    m, v = torch.zeros_like(rows), torch.zeros_like(rows)
    lr, active = torch.full((CLIENTS,), LR), torch.ones(CLIENTS, dtype=torch.bool)
    count = torch.zeros(CLIENTS)

    def ours() -> None:
        count.add_(1)
        torch.ops.fedsim.adamw(
            rows, grads, m, v, lr, count, active, None, *ADAM["betas"], ADAM["eps"],
            ADAM["weight_decay"], MAX_NORM,
        )  # fmt: skip

    def theirs() -> None:
        for mine, optimiser in zip(clients, optimisers):
            torch.nn.utils.clip_grad_norm_(mine, MAX_NORM, foreach=True)
            optimiser.step()

    ours(), theirs()
    for piece, p in zip(layout.pieces, clients[-1]):
        must_agree("AdamW and torch's", layout.view(rows, piece)[-1], p.detach(), 1e-6)
    timed = harness.time_arms(
        {"foreach": Arm(theirs), "ours": Arm(ours)}, repeats, "adamw_vs_foreach"
    )
    return harness.figure(
        harness.ratio(timed["foreach"].seconds, timed["ours"].seconds),
        tensors=len(layout.pieces), milliseconds=1e3 * timed["ours"].median,
    )  # fmt: skip


def reduce_over_copy(base: Base, repeats: int) -> Figure:
    """Rows, start and sum are read once; what the sum writes is not counted."""
    size, make = base.layout.size, torch.Generator().manual_seed(0)
    rows = torch.empty(CLIENTS, size).uniform_(-1, 1, generator=make)
    start, other = rows[0].clone(), torch.empty_like(rows)
    weights = torch.linspace(0.1, 1.0, CLIENTS, dtype=torch.float64)
    total = torch.zeros(size, dtype=torch.float64)
    torch.ops.fedsim.weighted_rows(total, rows, start, weights)
    few = slice(0, min(size, 4096))
    want = weights @ (rows[:, few].double() - start[few])
    must_agree("the weighted sum of rows", total[few], want, 1e-12)

    def ours() -> None:
        torch.ops.fedsim.weighted_rows(total, rows, start, weights)

    def copy() -> None:
        other.copy_(rows)

    timed = harness.time_arms({"copy": Arm(copy, copy), "sum": Arm(ours, ours)}, repeats, "reduce")
    read, moved = rows.nbytes + start.nbytes + total.nbytes, 2 * rows.nbytes
    found = harness.ratio(timed["copy"].seconds, timed["sum"].seconds, read / moved)
    return harness.figure(found, copy_gb_per_second=moved / timed["copy"].median / 1e9)


def log_normal(seed: int, clients: int, batch: int) -> list[list[Load]]:
    """The steps of clients with 80 examples in the median (sigma 0.8), whose sequences of 16 to 512
    tokens are log-normal around 90 (sigma 0.5)."""
    rng = np.random.default_rng(seed)
    out = []
    for size in np.exp(rng.normal(math.log(80), 0.8, clients)).astype(int).clip(1):
        lengths = np.exp(rng.normal(math.log(90), 0.5, size)).astype(int).clip(16, 512).tolist()
        out.append([Load(tuple(lengths[a : a + batch])) for a in range(0, size, batch)])
    return out


def _load(loads: list[list[Load]], client: int, step: int) -> Load:
    return loads[client][step]


def utilisation(
    seeds: int, clients: int = 200, slots: int = 32, budgets: Sequence[int] = (2048, 16384)
) -> Figure:
    """Scheduling alone: the same for every machine."""
    found: dict[int, list[float]] = {budget: [] for budget in budgets}
    for seed in range(seeds):
        loads = log_normal(seed, clients, batch=16)
        for budget in budgets:
            count, load = [len(steps) for steps in loads], partial(_load, loads)
            rows = [shift.rows for shift in schedule(count, load, slots, budget)]
            found[budget].append(sum(rows) / sum(max(r, budget) for r in rows))
    medians = {budget: float(np.median(values)) for budget, values in found.items()}
    every = [value for values in found.values() for value in values]
    worst = {"median": min(medians.values()), "low": min(every), "high": max(every), "n": seeds}
    return harness.figure(worst, by_budget={str(k): v for k, v in medians.items()})
