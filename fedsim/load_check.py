"""The check of a base at load: in packed passes each layer gives what the stock layer gives.

Both get the same inputs, so that no error grows with depth: those of a text, as the model's own
tokenizer gives it. Stock computes each sequence by itself; ours are packed together, share a
prefix and write tokens from a cache. Let o be a stock layer's row in fp32, o~ the same rounded to
bf16 (as a bf16 base computes it, or with what each module of the layer gives rounded), and
e = ||o~ - o|| / ||o||, in fp32 at least the median of the rows'. Ours, y, passes where

    in fp32          ||y - o|| / ||o|| <= e / 512 + 4 x 2^-24    of every row
    in a bf16 base   ||y - o|| / ||o|| <= 2 e                    of a layer's, or a kind of pass's,
                                                                 medians: a MoE's routing may flip

The limit is thus stock's own rounding, measured there: fp32 rounds 2^16 times finer than bf16, and
2^7 are left for another order of sums. Of larger bases some layers are compared so, and the others
in the base's dtype with stock's. SmolLM2, Qwen2.5-Coder-0.5B and Gemma-3-270M reach at most
0.19 of it in fp32 and 0.58 in bf16; the faults that `tests/test_load_check.py` plants exceed it
by factors from 31 on.

`relative` and `excess` judge rows of any kind: to check backward kernels, give them gradients, the
reference's as the exact ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.batch import Packer, on_device
from fedsim.cache import Cache
from fedsim.errors import ModelError
from fedsim.layerwise import Call, around_in_fp32, in_fp32, relative, sites_of, stubs
from fedsim.lora import Pass
from fedsim.memory import out_of_memory
from fedsim.prefix import common_prefix
from fedsim.stock_rows import Sheet, StockRows
from fedsim_kernels.segments import Segments

if TYPE_CHECKING:
    from fedsim.model import Base

FINER, FLOOR, COARSER = 2.0**-9, 4 * 2.0**-24, 2.0
WRITTEN = 3  # tokens of a sequence that are written from a cache


@dataclass(frozen=True)
class Packed:
    """One pass of ours.

    Attributes:
        what: kind of pass, for people.
        source: (T,) row of the sheet that each packed row is.
        late: the same of its label rows, if it has any.
        ready: puts the cache, if there is one, in the state of this pass.
    """

    what: str
    ids: Tensor
    positions: Tensor
    work: Pass
    source: Tensor
    late: Tensor | None = None
    cache: Cache | None = None
    ready: Callable[[], None] = lambda: None


class Actual:
    """Packed passes of a base over the same sequences, for two clients with adapters of zeros."""

    def __init__(self, base: Base, expected: StockRows) -> None:
        self.base, self.expected, self.device = base, expected, base.device
        rows = base.magnitudes(torch.zeros(base.layout.size, device=base.device)).repeat(2, 1)
        self.work = Pass(
            Segments.build([1], [0]), base.layout.site_views(rows), None,
            torch.ones(2, device=base.device), base.anchor,
        )  # fmt: skip
        self.rows: dict[str, list[Tensor]] = {}  # of the base's dtype: errors and own rounding
        self.own = 0.0  # largest median of a layer's own rounding
        self.largest: dict[str, float] = {}  # fraction of its limit, by what was compared

    def _together(self, sheet: Sheet) -> Packed:
        """All sequences in one pass; the last two share how they begin, their last tokens and the
        shared one's last are label rows."""
        packer, source = Packer(), list[np.ndarray]()

        def add(number: int, begin: int, end: int, parent: int = -1, repeats: int = 1) -> None:
            row = packer.sequence(sheet.ids[number][begin:end], number, begin, parent)
            source.append(np.arange(begin, end) + sheet.first[number])
            for _ in range(repeats):
                few = min(3, end - begin)
                packer.labels(row + end - begin - few, np.zeros(few, dtype=np.int64), 1.0)

        packer.chunk(0)
        add(0, 0, len(sheet.ids[0]))
        if len(sheet.ids) > 1:  # else the one that is longer than a window
            packer.chunk(1)
            add(1, 0, len(sheet.ids[1]))
            both = sheet.ids[2:]
            shared, parent = common_prefix(both, min(map(len, both)) - 1), -1
            if shared:
                add(2, 0, shared, repeats=2)
                parent = packer.last
            add(2, shared, len(both[0]), parent)
            add(3, shared, len(both[1]), parent)
        batch = packer.finish(self.device)
        at = on_device(np.concatenate(source), self.device)
        work = replace(
            self.work, segments=batch.segments, label_rows=batch.label_rows,
            label_segments=batch.label_segments, label_repeats=batch.label_repeats,
        )  # fmt: skip
        late = at[batch.label_rows]
        return Packed("packed", batch.input_ids, batch.position_ids, work, at, late)

    def _written(self, sheet: Sheet) -> Iterator[Packed]:
        """Prompts of two sequences, kept in the cache in the other order, then their last tokens
        one by one; or of the one that is longer than a window."""
        both = (0, 2) if len(sheet.ids) > 1 else (0,)
        places = np.arange(len(both))[::-1].copy()
        lengths = np.array([len(sheet.ids[i]) for i in both])
        cache, packer = Cache(len(both), int(lengths.max())), Packer()
        source, kept = list[np.ndarray](), list[np.ndarray]()
        for slot, (number, n) in enumerate(zip(both, lengths - WRITTEN, strict=True)):
            packer.chunk(slot)
            row = packer.sequence(sheet.ids[number][:n], number)
            source.append(np.arange(n) + sheet.first[number])
            kept.append(np.stack([row + np.arange(n), np.full(n, places[slot]), np.arange(n)]))
        batch, where = packer.finish(self.device), on_device(np.concatenate(kept, 1), self.device)
        yield Packed(
            "kept in the cache", batch.input_ids, batch.position_ids,
            replace(self.work, segments=batch.segments),
            on_device(np.concatenate(source), self.device), cache=cache,
            ready=lambda: cache.fill(*where),
        )  # fmt: skip
        slots = range(len(both))
        work = replace(self.work, segments=Segments.build([1 for _ in slots], slots))
        for back in range(WRITTEN, 0, -1):
            at = lengths - back
            ids = np.array([sheet.ids[i][p] for i, p in zip(both, at, strict=True)])

            def ready(at: np.ndarray = at) -> None:
                cache.extend(places, at, self.device)

            yield Packed(
                "written from the cache", on_device(ids, self.device), on_device(at, self.device),
                work, on_device(at + sheet.first[list(both)], self.device), cache=cache,
                ready=ready,
            )  # fmt: skip

    @torch.no_grad()
    def compare(self, *, wide: bool) -> None:
        """Compare every layer, then the logits. Raises ModelError at the first that differs."""
        layers = self.expected.layers
        for sheet in self.expected.sheets:
            passes = [self._together(sheet), *self._written(sheet)]
            calls = [self._calls(one, sheet, wide) for one in passes]
            for number, x in sheet.inputs.items():
                layer = layers[number]
                with in_fp32(layer.modules() if wide else ()):
                    for one, seen in zip(passes, calls, strict=True):
                        one.ready()
                        for site in sites_of(layer):
                            site.enter(one.work)
                        y = seen[number](layer, (x.float() if wide else x)[one.source])
                        at = one.source if len(y) == len(one.source) else one.late
                        self._judge(
                            f"layer {number}", one.what, y, sheet.exact[number][at],
                            sheet.rounded[number][at], wide,
                        )  # fmt: skip
        self._compare_logits(wide)
        self._judge_rows()
        if wide == (self.base.dtype == torch.float32):
            self._compare_passed()

    def _calls(self, one: Packed, sheet: Sheet | None, wide: bool) -> list[Call]:
        """Calls of the layers in one pass."""
        with (
            stubs(self.expected.layers, outputs=self.expected.outputs) as calls,
            ExitStack() as block,
        ):
            if wide:
                block.enter_context(around_in_fp32(self.base.model, self.expected.layers))
            one.ready()
            self.base.hidden(one.ids, one.positions, one.work, one.cache)
        if wide and sheet is not None:
            want = sheet.embedded[one.source]
            self._judge("embeddings", one.what, calls[0].hidden, want, want, wide)
        return calls

    def _compare_logits(self, wide: bool) -> None:
        base, ids = self.base, self.expected.sheets[0].ids[2]
        last = self.expected.last.float() if wide else self.expected.last
        with stubs(self.expected.layers, last, outputs=self.expected.outputs), ExitStack() as block:
            if wide:
                block.enter_context(around_in_fp32(base.model, self.expected.layers))
            at = torch.arange(len(ids), device=self.device)
            rows = at if base.shortened else at[::2]  # else the last layer gives label rows only
            work = replace(
                self.work, segments=Segments.build([len(ids)], [0]),
                label_rows=None if base.shortened else rows,
            )  # fmt: skip
            hidden = base.hidden(on_device(ids, self.device), at, work)
            block.callback(setattr, base, "head", base.head)
            base.head = base.head[self.expected.columns].to(hidden.dtype)
            z = base.logits(hidden)
        base.rest()
        exact, rounded = self.expected.exact[rows], self.expected.rounded[rows]
        self._judge("logits", "", z, exact, rounded, wide)

    def _compare_passed(self) -> None:
        """Compare all other layers, in the base's dtype, over all sequences as one."""
        layers, ids = self.expected.layers, on_device(self.expected.whole, self.device)
        one = Packed(
            "", ids, torch.arange(len(ids), device=self.device),
            replace(self.work, segments=Segments.build([len(ids)], [0])), ids,
        )  # fmt: skip
        calls = self._calls(one, None, wide=False)
        for number, (x, want) in self.expected.passed.items():
            for site in sites_of(layers[number]):
                site.enter(one.work)
            error = relative(calls[number](layers[number], x), want).median()
            limit = self.own * FINER + FLOOR if self.base.dtype == torch.float32 else self.own
            self._limit(f"layer {number}", error / (COARSER * limit), self.base.precision)
        self.base.rest()

    def _judge(
        self, where: str, what: str, y: Tensor, exact: Tensor, rounded: Tensor, wide: bool
    ) -> None:
        """Judge the rows of one pass: in fp32 at once, else when all of their layer, and of their
        kind of pass, are there."""
        error, own = relative(y, exact), relative(rounded, exact)
        if what:
            self.own = max(self.own, float(own.median()))
        if wide:
            over = excess(error, own).max()
            self._limit(f"{where}, {what}" if what else where, over, "fp32")
        else:
            for name in {where, what or where}:
                self.rows.setdefault(name, []).append(torch.stack([error, own]).cpu())

    def _judge_rows(self) -> None:
        for where, parts in self.rows.items():
            error, own = torch.cat(parts, 1).median(1).values
            self._limit(where, error / (COARSER * own + FLOOR), self.base.precision)

    def _limit(self, where: str, over: Tensor, dtype: str) -> None:
        name, worst = f"{where}, {dtype}", float(over)
        self.largest[name] = max(worst, self.largest.get(name, 0.0))
        if not worst <= 1:
            raise ModelError(
                f"{type(self.base.model).__name__} gives other logits when packed than stock "
                f"transformers: {where}, in {dtype}, {worst:.2g} times what rounding explains",
                remedy="This architecture is not supported.",
            )


def excess(error: Tensor, own: Tensor) -> Tensor:
    """Errors in fp32 over their limits, (T,), from both relative ones: at most 1 is right."""
    return error / (own.clamp(min=float(own.median())) * FINER + FLOOR)


@contextmanager
def refusing(model: Any) -> Iterator[None]:
    """Turn a failure in packed passes, or in layers called one by one, into a ModelError. Products
    of fp32 are whole meanwhile, where the user allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as failure:
        if out_of_memory(failure):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be computed in packed passes "
            f"({type(failure).__name__}: {failure})",
            remedy="This architecture is not supported.",
        ) from failure
    finally:
        torch.set_float32_matmul_precision(before)


def verify(base: Base, expected: StockRows) -> dict[str, float]:
    """Compare a base with what stock transformers gave.

    Returns:
        The largest differences as fractions of their limits, by what was compared.

    Raises:
        ModelError: it computes something else.
    """
    actual = Actual(base, expected)
    for wide in (True, False) if base.dtype != torch.float32 else (True,):
        actual.compare(wide=wide)
    return actual.largest
