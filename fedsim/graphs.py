"""CUDA graphs for small bases: a pass whose shape comes again is recorded, then launched at once.

A pass of a 135 M base is some 3,900 launches, 23 ms of the host, and 0.64 us a token of the device
(both counted, not measured): up to 18,000 rows the device waits. A recorded pass can only differ in
what lies in its buffers, so everything else must be a function of its shape:

* rows and labels are filled up to a bucket, as strict mode fills chunks: with rows and labels that
  belong to nobody. Tables are filled up with entries that no kernel does anything for.
* what is recorded gets its segments as tables in buffers and knows no other number of the host.

All passes are filled up, recorded or not, so which of them are replayed changes no bit, nor does a
resumed run that records others. Checked by emulation only: this has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fedsim.batch import PackedBatch, on_device
from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.lora import Pass
from fedsim.memory import out_of_memory
from fedsim.model import Base
from fedsim_kernels.cuda.tiles import PIECE, ROWS, tile_tables
from fedsim_kernels.dispatch import chosen
from fedsim_kernels.segments import Segments

MOST = 8  # graphs
GRAIN = 256  # rows and labels: the largest tile, and a chunk of the head
# Parameters x rows from where on the products hide the launches: 18,000 rows of 135 M.
WORK = 2.5e12
Run = Callable[[PackedBatch, Pass], Tensor]
Capture = Callable[[Callable[[], None]], Callable[[], None]]


def bucket(n: int) -> int:
    """n, filled up by an eighth at most: to a sixteenth of the next power of two, or to `GRAIN`."""
    grain = max(GRAIN, 1 << max(0, (n - 1).bit_length() - 4))
    return -(-n // grain) * grain


def power(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, 1 << (n - 1).bit_length())


# Numbers of an entry of each table, and one that does nothing: `Segments.tables` has their order.
_WIDTHS = (4, 4, 4, 5, 1, 4, 4, 1, 1)
_NOTHING = ((), (0, 0, -1, 0), (-1, 0, 0, 0), (0, 0, 0, -1, -1), (0,), (0, 0, 0, -1),
            (-1, 0, 0, 0), (0,), (0,))  # fmt: skip


def filled(segments: Segments) -> tuple[Tensor, tuple[int, ...]]:
    """All tables of a pass of `bucket` rows end to end, filled up, int32 on the host; entries of
    each. They follow from the rows and from powers of two; every table starts at 16 bytes."""
    tables = [segments.span_table, segments.sequence_table, *tile_tables(segments)]
    rows, spans = segments.rows, power(len(tables[0]), 8)
    sequences = power(len(tables[1]), max(8, rows // 32))
    seen = power(len(tables[8]), max(8, rows // 16))
    # Cutting n ranges of t rows in all into pieces of s makes t / s + n pieces at most; between
    # and around the spans are up to spans + 1 ranges of padding.
    pieces = rows // PIECE + spans
    most = (
        spans, sequences, rows // ROWS + 2 * spans + 1, pieces, pieces, spans,
        rows // ROWS + sequences + spans + 1, sequences + 1, seen,
    )  # fmt: skip
    sizes = tuple(n + -n % 4 for n in most)
    # C++ walks spans slot by slot, so a span of no rows goes to the last slot.
    last = segments.spans[-1][0]
    nothing = ((last, 0, 0, segments.rank(last)), *_NOTHING[1:])
    parts = []
    for table, size, entry in zip(tables, sizes, nothing, strict=True):
        fill = torch.tensor(entry, dtype=torch.int32).repeat(size - len(table))
        parts += [table.flatten(), fill]
    return torch.cat(parts), sizes


@dataclass(frozen=True)
class Views(Segments):  # type: ignore[misc]
    """Segments that are nothing but tables in a buffer."""

    views: tuple[Tensor, ...]

    @classmethod
    def of(cls, rows: int, flat: Tensor, sizes: tuple[int, ...]) -> Views:
        parts = flat.split([n * width for n, width in zip(sizes, _WIDTHS, strict=True)])
        views = (p.view(-1, w) if w > 1 else p for p, w in zip(parts, _WIDTHS, strict=True))
        return cls((), (), (), (), (), (), rows, tuple(views))

    def tables(self, device: torch.device) -> list[Tensor]:
        return list(self.views)


class Key(NamedTuple):
    """The shape of a pass: with what a trainer never changes, all that its launches depend on."""

    rows: int
    labels: int
    repeats: int
    row_tables: tuple[int, ...]
    label_tables: tuple[int, ...]


class Filled:
    """A pass filled up to its bucket. Its buffers hold all that differs within a bucket."""

    def __init__(self, batch: PackedBatch, work: Pass) -> None:
        # One row of padding at least: padding labels are its.
        rows, labels = bucket(len(batch) + 1), bucket(len(batch.label_rows))
        more, extra = (0, rows - len(batch)), (0, labels - len(batch.label_rows))
        self.batch = batch = replace(
            batch,
            input_ids=F.pad(batch.input_ids, more),
            position_ids=F.pad(batch.position_ids, more),
            label_rows=F.pad(batch.label_rows, extra, value=rows - 1),
            targets=F.pad(batch.targets, extra),
            label_slot=F.pad(batch.label_slot, extra, value=-1),
            label_weight=F.pad(batch.label_weight, extra),
        )
        of_rows, row_sizes = filled(batch.segments)
        of_labels, label_sizes = filled(batch.label_segments)
        self.key = Key(rows, labels, power(batch.label_repeats), row_sizes, label_sizes)
        host, device = torch.cat([of_rows, of_labels]).numpy(), work.scale.device
        tables = on_device(host, device, torch.int32)
        views = tables.split([len(of_rows), len(of_labels)])
        self.buffers = [
            batch.input_ids, batch.position_ids, batch.label_rows, batch.targets,
            batch.label_slot, batch.label_weight, work.scale, tables,
        ]  # fmt: skip
        drop = work.dropout
        if drop is not None:
            drop = replace(drop, counters=F.pad(drop.counters, (0, 0, *more), value=-1))
            self.buffers.append(drop.counters)
        self.work = replace(
            work,
            segments=Views.of(rows, views[0], row_sizes),
            dropout=drop,
            label_rows=batch.label_rows,
            label_segments=Views.of(labels, views[1], label_sizes),
            label_repeats=self.key.repeats,
        )
        self.loss = torch.zeros(len(work.scale), dtype=torch.float64, device=device)
        self.replay: Callable[[], None] | None = None

    def run(self, run: Run) -> None:
        """The pass, its losses in `loss`. Its anchor is made here: the gradient that autograd
        never has for it would wait for the stream where it was first used."""
        anchor = torch.zeros((), device=self.loss.device, requires_grad=True)
        self.loss.copy_(run(self.batch, replace(self.work, anchor=anchor)))


class Graphs:
    """Runs passes; one whose shape is among the last `MOST` ones is recorded and then replayed.

    Args:
        run: forward and backward of a pass; adds to `grads`, returns losses (K,) fp64.
        grads: (K, P) fp32, always the same.
        capture: runs a function once, which need not count, and returns what launches the same
            kernels on the same addresses.
        rows: passes of more are run as they are.
    """

    def __init__(self, run: Run, grads: Tensor, capture: Capture, rows: int) -> None:
        self._run, self._grads, self._capture, self._rows = run, grads, capture, rows
        self.kept: dict[Key, Filled] = {}  # the one used last comes last

    def __call__(self, batch: PackedBatch, work: Pass) -> Tensor:
        """As `run`. Raises RunError where a pass cannot be recorded, or replays to other bits."""
        if len(batch) > self._rows:
            return self._run(batch, work)
        given = Filled(batch, work)
        kept = self.kept.pop(given.key, given)
        self.kept[given.key] = kept
        if len(self.kept) > MOST:
            del self.kept[next(iter(self.kept))]
        if kept is given:  # the first of its shape: its tensors may become the buffers
            return self._run(given.batch, given.work)
        for buffer, data in zip(kept.buffers, given.buffers, strict=True):
            buffer.copy_(data)
        if kept.replay is None:
            kept.replay = self._record(kept, sorted(set(batch.slot.tolist())))
        else:
            kept.replay()
        return kept.loss.clone()

    def _record(self, kept: Filled, slots: list[int]) -> Callable[[], None]:
        """Record and replay a pass, and compare what it adds to the gradients of its slots."""
        before = self._grads[slots]
        remedy = 'Set train.graphs = "never".'
        try:
            replay = self._capture(lambda: kept.run(self._run))
        except RuntimeError as failure:
            if out_of_memory(failure):
                raise
            raise RunError(f"a pass cannot be recorded ({failure})",
                           expected="one that never waits", remedy=remedy) from failure  # fmt: skip
        want = kept.loss.clone(), self._grads[slots]
        self._grads[slots] = before
        replay()
        got = kept.loss, self._grads[slots]
        # As integers: the NaN of a sick client equals itself.
        pairs = [[x.view(torch.int32) for x in pair] for pair in zip(got, want, strict=True)]
        if not all(torch.equal(*pair) for pair in pairs):
            raise RunError("a recorded pass gives other numbers than the pass itself",
                           expected="the same bits", remedy=remedy)  # fmt: skip
        return replay


class CudaCapture:
    """`capture` with CUDA graphs. They share one pool of memory: nothing in it outlives a replay,
    and replays follow each other on one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        # torch refuses a pool once its last graph is gone, so this one stays.
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._first, stream=self._stream):
            torch.zeros(1, device=device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        now = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            run()  # the warm-up: what is made once must not be made while recording
        now.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._first.pool(), stream=self._stream):
            run()
        return graph.replay


def suits(config: Config, base: Base) -> bool:
    """Whether passes over this base can be recorded: nothing in one may be read by the host.

    DoRA goes from span to span, recomputation saves the state of random numbers, `dynamic` and
    `longrope` positions look for the longest sequence, and weights held in fewer bits may become
    dense, elsewhere, when a rule corrects them.
    """
    rope = getattr(base.model.config, "rope_parameters", None) or {}
    kinds = {v.get("rope_type") for v in (rope, *rope.values()) if isinstance(v, dict)}
    return (
        config.train.graphs == "auto"
        and base.device.type == "cuda"
        and chosen(base.device) == "triton"
        and not config.adapter.dora
        and not any(getattr(m, "gradient_checkpointing", False) for m in base.model.modules())
        and not kinds & {"dynamic", "longrope"}
        and all(site.dense is not None for site in base.sites)
    )


def runner(run: Run, grads: Tensor, config: Config, base: Base) -> Run:
    """`run`, or with graphs where they suit. Arguments as of `Graphs`."""
    if not suits(config, base):
        return run
    parameters = sum(p.numel() for p in base.model.parameters())
    return Graphs(run, grads, CudaCapture(base.device), int(WORK / parameters))
