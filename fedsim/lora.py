"""Multi-LoRA linears: frozen weights shared by all clients, adapters of each packed row's slot.

Linears that read the same input form a site: one product with their frozen weights and one with
the A of all their adapters serve q, k and v, or gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim_kernels.dropout
import fedsim_kernels.grouped_lora  # noqa: F401  registers the operation
from fedsim.core import SiteViews
from fedsim.dora import magnitude, row_norms, weight_norms
from fedsim.linears import frozen_linear, joined
from fedsim.room import HeldLinear, Room, renewed
from fedsim_kernels.segments import Segments


@dataclass(frozen=True)
class Dropout:
    """What a LoRA dropout mask is a function of.

    Attributes:
        counters: (T, 4) int64 of each packed row (see `seeds.row_counters`).
    """

    p: float
    key: int
    counters: Tensor

    def __call__(self, x: Tensor, module: int) -> Tensor:
        """x / (1 - p) where the module's mask keeps an element of x (T, I), else 0."""
        signed = self.key - (1 << 64) if self.key >= 1 << 63 else self.key  # an int of torch
        out: Tensor = torch.ops.fedsim.dropout(x, self.counters, signed, module, self.p)
        return out


@dataclass(frozen=True)
class Pass:
    """Everything that the sites of one pass share. Valid until its backward has ended.

    Attributes:
        segments: slots and chunks of the packed rows.
        factors, grads: of every site, views of the slots' rows and of the gradient arena; grads is
            None when nothing trains.
        scale: (K,) fp32 on the device, alpha / rank.
        anchor: a scalar that requires grad. No weight does, so without it there is no graph;
            with it, a site whose input needs no gradient skips dx by itself.
        tile: rows of one product in strict mode, else 0.
        label_rows, label_segments: rows whose next token is a label, and their slots. What comes
            after the last attention runs on these rows only.
        label_repeats: how often one row may be a label row: a prefix ends where all its sequences
            begin.
        norms: of every site under DoRA, for passes whose factors stay the same; else each pass
            computes its own.
    """

    segments: Segments
    factors: tuple[SiteViews, ...]
    grads: tuple[SiteViews, ...] | None
    scale: Tensor
    anchor: Tensor
    tile: int = 0
    dropout: Dropout | None = None
    label_rows: Tensor | None = None
    label_segments: Segments | None = None
    label_repeats: int = 1
    norms: tuple[list[Tensor], ...] = ()

    @property
    def tables(self) -> list[Tensor]:
        """The segments as operations read them."""
        out: list[Tensor] = self.segments.tables(self.scale.device)
        return out

    def at_labels(self) -> Pass:
        """The same pass for the rows that have labels."""
        if self.label_rows is None or self.label_segments is None:
            return self
        drop = self.dropout
        if drop is not None:
            drop = replace(drop, counters=drop.counters.index_select(0, self.label_rows))
        return replace(
            self, segments=self.label_segments, dropout=drop, label_rows=None, label_segments=None
        )


@dataclass(frozen=True)
class Member:
    """One linear of a site.

    Attributes:
        column, width: its columns of the site's output.
        number: its index among the adapted modules, or -1 when it carries no adapter.
    """

    name: str
    column: int
    width: int
    number: int


class Site(nn.Module):
    """The linears of one input: a frozen weight (O_1 + ... + O_n, I) and their adapters.

    Attributes:
        members: its linears, in the order of their columns.
        dense: the weight, unless it is held in another form.
        index: of the adapters in `Pass.factors`, or None where no member has one.
        late: it lies behind the last attention, and sees label rows only.
    """

    def __init__(self, linears: dict[str, nn.Linear], numbers: dict[str, int]) -> None:
        super().__init__()
        parts = list(linears.values())
        held = [p for p in parts if isinstance(p, HeldLinear)]
        self.dense = None if held else joined([p.weight.data for p in parts])
        self._held = [p.held for p in held]
        self._room = held[0].room if held else Room()
        self.bias: nn.Parameter | None = None
        if any(p.bias is not None for p in parts):
            like = next(p.bias for p in parts if p.bias is not None)
            biases = [like.new_zeros(p.out_features) if p.bias is None else p.bias.data
                      for p in parts]  # fmt: skip
            self.bias = nn.Parameter(joined(biases), requires_grad=False)
        members, column = [], 0
        for name, part in linears.items():
            width = part.out_features
            members.append(Member(name, column, width, numbers.get(name, -1)))
            if self.dense is not None:
                part.weight.data = self.dense[column : column + width]  # no second copy
            column += width
        self.members, self.width = tuple(members), column
        self.adapted = tuple(m for m in members if m.number >= 0)
        self.columns = [m.column for m in self.adapted]
        self.widths = [m.width for m in self.adapted]
        self.index: int | None = None
        self.late = False
        self.labels: tuple[Tensor, int] | None = None  # label rows and repeats, where it is late
        self.work: Pass | None = None

    def enter(self, work: Pass | None) -> None:
        """Take part in a pass, or in none: then the frozen linear stands alone."""
        self.work, self.labels = work, None
        self.__dict__.pop("given", None)  # of a pass that was broken off
        if work is not None and self.late and work.label_rows is not None:
            self.work, self.labels = work.at_labels(), (work.label_rows, work.label_repeats)

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, I) -> (1, T, O_1 + ... + O_n)."""
        return self._rows(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.width)

    @property
    def weight(self) -> Tensor:
        """(O_1 + ... + O_n, I); where held in another form, until the next site's is asked for."""
        return renewed(self._room, self._held) if self.dense is None else self.dense

    def of(self, at: int) -> Tensor:
        """The weight of a member, in the same way."""
        if self.dense is None:
            return renewed(self._room, self._held[at : at + 1])
        first = self.members[at].column
        return self.dense[first : first + self.members[at].width]

    def open(self) -> Tensor:
        """The weight to be changed; from now on it is dense."""
        if self.dense is None:
            self.dense, self._held = self._room.whole(self._held).clone(), []
        return self.dense

    def _rows(self, x: Tensor) -> Tensor:
        work = self.work
        if work is None:
            return F.linear(x, self.weight, self.bias)
        if self.index is None:
            return frozen_linear(x, self.weight, self.bias, work.tile)
        factors = work.factors[self.index]
        if work.dropout is not None or factors.mag is not None:
            return self._by_module(x, work)
        return self._adapt(x, work, self.weight, self.bias, None)

    def _adapt(
        self, x: Tensor, work: Pass, weight: Tensor | None, bias: Tensor | None, at: int | None
    ) -> Tensor:
        """x W^T + bias and the updates of all adapted members, or with `at` of one; without a
        weight the update alone."""
        assert self.index is not None
        views = work.factors[self.index]
        grads = views if work.grads is None else work.grads[self.index]
        a, b, grad_a, grad_b = views.a, views.b, grads.a, grads.b
        columns, widths = self.columns, self.widths
        if at is not None:
            rank = a.shape[1] // len(self.adapted)
            rows, outs = slice(at * rank, (at + 1) * rank), self.outputs(at)
            a, b, grad_a, grad_b = a[:, rows], b[:, outs], grad_a[:, rows], grad_b[:, outs]
            columns, widths = [0], [self.widths[at]]
        y, _ = torch.ops.fedsim.lora_linear(
            x, weight, bias, work.anchor, a, b, grad_a, grad_b, work.scale, work.tables, columns,
            widths, work.tile,
        )  # fmt: skip
        out: Tensor = y
        return out

    @cached_property
    def norms(self) -> Tensor:
        """||W|| of every row, (O_1 + ... + O_n,) fp64."""
        return row_norms(self.weight)

    def outputs(self, at: int) -> slice:
        """The rows of an adapted member's B among those of the site."""
        first = sum(self.widths[:at])
        return slice(first, first + self.widths[at])

    def _by_module(self, x: Tensor, work: Pass) -> Tensor:
        """Each member by itself: with dropout every module has its own mask x_d, and DoRA scales
        every module's columns.

            y = W x + s B A x_d      with DoRA: y = W x + (c (W x_d + s B A x_d) - W x_d)
        """
        assert self.index is not None
        factors, drop = work.factors[self.index], work.dropout
        norms = None
        if factors.mag is not None:
            norms = work.norms[self.index] if work.norms else weight_norms(self, factors, work)
        parts, at = [], 0
        for number, member in enumerate(self.members):
            span = slice(member.column, member.column + member.width)
            weight = self.of(number)
            bias = None if self.bias is None else self.bias[span]
            if member.number < 0:
                parts.append(frozen_linear(x, weight, bias, work.tile))
                continue
            lora_in = x if drop is None else drop(x, member.number)
            if norms is None:
                y = frozen_linear(x, weight, bias, work.tile)
                y = y + self._adapt(lora_in, work, None, None, at)
            elif drop is None:
                y = magnitude(self._adapt(x, work, weight, None, at), self, at, norms, work)
                y = y if bias is None else y + bias
            else:
                z = frozen_linear(lora_in, weight, None, work.tile)
                scaled = z + self._adapt(lora_in, work, None, None, at)
                scaled = magnitude(scaled, self, at, norms, work)
                y = frozen_linear(x, weight, bias, work.tile) + (scaled - z)
            parts.append(y)
            at += 1
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class SiteMember(nn.Module):
    """Stands where a linear of a site stood: the first that is called computes for all."""

    def __init__(self, site: Site, at: int, linear: nn.Linear) -> None:
        super().__init__()
        self.__dict__["site"] = site  # not a submodule: the site's owner holds it
        if not isinstance(linear, HeldLinear):
            self.weight = linear.weight
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, I) -> (1, T, O)."""
        site: Site = self.__dict__["site"]
        if len(site.members) == 1:
            out: Tensor = site(x)
            return out
        given: tuple[Tensor, dict[int, Tensor]] | None = site.__dict__.get("given")
        if given is None or given[0] is not x or self.at not in given[1]:
            parts = site(x).split([m.width for m in site.members], -1)
            given = (x, dict(enumerate(parts)))
            site.__dict__["given"] = given
        part = given[1].pop(self.at)
        if not given[1]:
            del site.__dict__["given"]  # nothing may outlive the pass
        return part
