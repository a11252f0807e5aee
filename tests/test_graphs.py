"""Recorded passes give the bits of the passes they stand for.

Without a GPU, recording is emulated: what is recorded runs again on the buffers that it was
recorded with, and must then meet the same operations, shapes, numbers and addresses, which is all
that a CUDA graph has. Proved here: training through recorded passes is bitwise that without, in
C++, in PyTorch and in Triton's interpreter; in strict mode also that of passes that were not filled
up; padding of NaN reaches nobody; passes of one key make the same launches; tables are filled up
with nothing; graphs are bounded; a recording that gives other numbers is refused. About 80 s.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim import graphs
from fedsim.batch import PackedBatch, Packer
from fedsim.config import Config
from fedsim.core import LocalRule
from fedsim.errors import RunError
from fedsim.fused import put_rows
from fedsim.graphs import CudaCapture, Filled, Graphs, Key, bucket, filled, runner, suits
from fedsim.lora import Pass
from fedsim.record import Meter
from fedsim.train import Trainer
from fedsim_kernels import dispatch
from fedsim_kernels.cuda.tiles import Tiles, tile_tables
from fedsim_kernels.cuda.variant import Variant
from fedsim_kernels.segments import Segments
from tests.conftest import require
from tests.lab import CLIENTS, Lab, plan_of

STEPS = (7, 5, 8, 4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of the lab are of some 60 rows: buckets of 32 are a handful."""
    monkeypatch.setattr(graphs, "GRAIN", 32)


class Trace(TorchDispatchMode):
    """Operations of a pass: their numbers, shapes and, of what was there before, addresses."""

    def __init__(self, *, addresses: bool = True) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self._addresses = addresses
        self._made: set[int] = set()

    def note(self, x: Any) -> Any:
        """What a graph knows of an argument."""
        if not isinstance(x, Tensor):
            return x
        known = self._addresses and x.untyped_storage().data_ptr() not in self._made
        return tuple(x.shape), x.stride(), x.dtype, x.data_ptr() if known else None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = (args, kwargs or {})
        self.seen.append((str(func), *tree_flatten(tree_map(self.note, given))[0]))
        out = func(*args, **(kwargs or {}))
        self._made |= _storages(out) - _storages(given)
        return out


def _storages(values: Any) -> set[int]:
    tensors = (x for x in tree_flatten(values)[0] if isinstance(x, Tensor))
    return {x.untyped_storage().data_ptr() for x in tensors}


class Emulation:
    """`capture` on a CPU."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        with Trace() as first:
            run()

        def replay() -> None:
            self.replayed += 1
            with Trace() as again:
                run()
            assert again.seen == first.seen

        return replay


def recording(trainer: Trainer, capture: Any, rows: int = 1 << 20) -> Graphs:
    """Let a trainer record its passes."""
    trainer.run = Graphs(trainer.backward, trainer.bank.grads, capture, rows)
    return trainer.run


def trained(one: Lab, capture: Any = None, **train: Any) -> tuple[Tensor, np.ndarray]:
    """Rows (k, P), and first and last losses (k, 2), of all clients."""
    trainer = one.trainer(**train)
    if capture is not None:
        recording(trainer, capture)
    done = list(trainer.train(plan_of(range(CLIENTS), STEPS), LocalRule(one.start), Meter()))
    assert all(d.ok.all() for d in done)
    losses = [np.concatenate([d.loss_first, d.loss_last]) for d in done]
    return torch.cat([d.row for d in done]), np.stack(losses)


def same(got: tuple[Tensor, np.ndarray], want: tuple[Tensor, np.ndarray]) -> bool:
    return torch.equal(got[0], want[0]) and np.array_equal(got[1], want[1])


# The same bits


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("llama", {}), ("llama", {"adapter__dropout": 0.3}), ("gemma2", {}),
     ("qwen2", {"train__shared_prefix": False})],
)  # fmt: skip
def test_replayed_passes_are_the_passes(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, implementation: str,
    architecture: str, changes: dict[str, Any],
) -> None:  # fmt: skip
    """Against the same passes, filled up and never recorded; whole steps and parts of steps."""
    one, capture, train = lab(architecture, **changes), Emulation(), {"budget_tokens": 64}
    got = trained(one, capture, **train)
    monkeypatch.setattr(graphs, "MOST", 0)
    assert same(got, trained(one, lambda run: pytest.fail("recorded"), **train))
    assert capture.recorded >= 1 and capture.replayed > capture.recorded + 3


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strict_mode_does_not_see_what_fills_a_pass_up(
    lab: Callable[..., Lab], implementation: str, dropout: float
) -> None:
    """Against passes of their own size, several chunks each."""
    one = lab(
        adapter__dropout=dropout, train__mode="strict", train__tile=16, train__chunk_tokens=32
    )
    capture, train = Emulation(), {"slots": 2}
    assert same(trained(one, capture, **train), trained(one, **train))
    assert capture.recorded >= 2 and capture.replayed > capture.recorded + 2


def test_the_interpreter_replays_the_same_bits(
    lab: Callable[..., Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's tables are filled up, too. One layer, two steps of two clients of unequal ranks."""
    one = lab(
        model__name=str(one_layer(tmp_path)), train__batch=1,
        adapter__targets=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    plan = replace(plan_of((0, 2), (2,) * CLIENTS), rank=np.array([4, 3]))
    monkeypatch.setattr(graphs, "GRAIN", 64)  # both steps
    got = []
    for most in (8, 0):
        monkeypatch.setattr(graphs, "MOST", most)
        trainer, capture = one.trainer(), Emulation()
        recording(trainer, capture)
        with dispatch.use("triton"):
            done = list(trainer.train(plan, LocalRule(one.start), Meter()))
        got.append(torch.cat([d.row for d in done]))
        assert capture.recorded == capture.replayed == (most > 0)
    assert torch.equal(*got) and not torch.equal(got[0], one.start.expand(2, -1))


def one_layer(folder: Path) -> Path:
    require("triton", importlib.util.find_spec("triton") is not None, "Triton is not installed")
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(hf).save_pretrained(folder)
    return folder


def test_padding_of_nan_reaches_nobody(lab: Callable[..., Lab], implementation: str) -> None:
    """A padding row is token 0, which no example has; here its embedding is NaN."""
    one = lab("qwen2", adapter__targets=["q_proj", "down_proj"])
    want = trained(one, Emulation())
    embedding = one.base.decoder.embed_tokens.weight.data
    assert embedding.data_ptr() != one.base.head.data_ptr() and not (one.store.ids == 0).any()
    embedding[0] = float("nan")
    assert same(trained(one, Emulation()), want)


# One key, the same launches


def _given(one: Lab, **train: Any) -> list[tuple[Trainer, PackedBatch, Pass]]:
    """The passes that training would make; none of them is run."""
    trainer = one.trainer(**train)
    kept: list[tuple[Trainer, PackedBatch, Pass]] = []

    def keep(batch: PackedBatch, work: Pass) -> Tensor:
        kept.append((trainer, batch, work))
        return torch.zeros(trainer.bank.slots, dtype=torch.float64)

    trainer.run = keep
    list(trainer.train(plan_of(range(CLIENTS), (24,) * CLIENTS), LocalRule(one.start), Meter()))
    return kept


def _launches(trainer: Trainer, batch: PackedBatch, work: Pass) -> list[Any]:
    """Operations and kernels of a pass, with everything that the host tells them."""
    trace = Trace(addresses=False)

    def launch(variant: Variant, grid: Any, *arguments: Any) -> None:
        trace.seen.append((variant.key, grid, *map(trace.note, arguments)))

    with pytest.MonkeyPatch.context() as patch, dispatch.use("triton"), trace:
        patch.setattr(Variant, "launch", launch)
        trainer.backward(batch, work)
    return trace.seen


@pytest.mark.parametrize(
    ("changes", "train"),
    [({}, {"slots": 3}), ({"adapter__dropout": 0.3}, {"slots": 3}), ({}, {"budget_tokens": 90}),
     ({"train__mode": "strict", "train__tile": 16, "train__chunk_tokens": 32}, {"slots": 2})],
)  # fmt: skip
def test_passes_of_one_key_make_the_same_launches(
    lab: Callable[..., Lab], tmp_path: Path, changes: dict[str, Any], train: dict[str, Any]
) -> None:
    """Kernels, grids, shapes, strides and numbers; filled up, but not as they come."""
    one = lab(model__name=str(one_layer(tmp_path)), **changes)
    found: dict[Key, list[tuple[list[Any], list[Any]]]] = {}
    for trainer, batch, work in _given(one, **train):
        pass_ = Filled(batch, work)
        traces = _launches(trainer, batch, work), _launches(trainer, pass_.batch, pass_.work)
        assert sum(isinstance(entry[0], tuple) for entry in traces[1]) > 30  # kernels
        assert pass_.key.rows > len(batch)  # a row for labels of nobody
        assert pass_.work.label_repeats == pass_.key.repeats >= batch.label_repeats
        found.setdefault(pass_.key, []).append(traces)
    pairs = [pair for many in found.values() for pair in pairwise(many)]
    assert len(pairs) >= 10
    assert all(first[1] == second[1] for first, second in pairs)
    assert sum(first[0] != second[0] for first, second in pairs) >= 10


@pytest.mark.parametrize("repeats", [1, 2, 3, 5])
def test_repeats_may_be_more_than_there_are(repeats: int) -> None:
    """The only number of a key that launches depend on and a CPU does not see."""
    g = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([4, 0, 4, 4, 1, 9, 9])  # 9: padding, with as many labels as there are
    g[5:] = float("nan")
    want = put_rows(g[:5], rows[:5], 9, 3)
    got = put_rows(g, rows, 10, graphs.power(max(3, repeats)))
    assert torch.equal(got[:9], want)


def _random_segments(rng: np.random.Generator) -> Segments:
    """Chunks of up to four slots, with prefixes, ranks, and padding behind some chunks."""
    lengths, slots, parents, starts, chunks = [], [], [], [], []
    row = chunk = 0
    for slot in rng.permutation(4)[: rng.integers(1, 5)].tolist():
        for _ in range(rng.integers(1, 4)):
            first = len(lengths)
            for _ in range(rng.integers(1, 9)):
                parents.append(int(rng.integers(first, len(lengths))) if rng.random() < 0.5
                               and len(lengths) > first else -1)  # fmt: skip
                lengths.append(int(rng.integers(1, 200)))
                slots.append(slot), starts.append(row), chunks.append(chunk)
                row += lengths[-1]
            row += int(rng.integers(0, 100)) * int(rng.integers(0, 2))
            chunk += 1
    rows = bucket(row + 1)
    return Segments.build(lengths, slots, parents, starts=starts, chunks=chunks,
                          ranks=(4, 2, 3, 1), rows=rows)  # fmt: skip


def test_tables_are_filled_up_with_nothing() -> None:
    """Whatever the pass, its tables fit; what follows them is of nobody and has no rows."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        segments = _random_segments(rng)
        flat, sizes = filled(segments)
        views = graphs.Views.of(segments.rows, flat, sizes).tables(CPU)
        whole = [segments.span_table, segments.sequence_table, *tile_tables(segments)]
        assert len(views) == len(whole) == 2 + len(Tiles._fields)
        for view, table in zip(views, whole, strict=True):
            assert view.dtype == torch.int32 and view.is_contiguous()
            assert view.storage_offset() % 4 == 0  # 16 bytes
            assert torch.equal(view[: len(table)], table)
        more = [view[len(table) :] for view, table in zip(views, whole, strict=True)]
        spans, sequences, tiles = more[0], more[1], Tiles(*more[2:])
        assert (spans[:, 1] == spans[:, 2]).all() and (spans[:, 0] == whole[0][-1, 0]).all()
        assert not sequences[:, 1].any() and (sequences[:, 2] == -1).all()
        for entries in (tiles.rows, tiles.sequences):
            assert (entries[:, 0] == -1).all() and not entries[:, 1:3].any()
        assert (tiles.pieces[:, 3] == -1).all() and (tiles.sums[:, 3] == -1).all()


def test_a_bucket_is_an_eighth_larger_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the buckets of a run
    sizes = [bucket(n) for n in range(1, 40_000)]
    assert all(n <= size for n, size in enumerate(sizes, 1))
    assert all(size <= n * 9 / 8 for n, size in enumerate(sizes, 1) if n > 8 * 256)
    assert all(size % 256 == 0 for size in sizes)  # whole tiles of every size
    assert len({size for size in sizes if size <= 16384}) <= 40
    assert (bucket(1), bucket(256), bucket(257), bucket(14_000)) == (256, 256, 512, 14_336)


# What is kept, and what is refused


def _batch(rows: int) -> tuple[PackedBatch, Pass]:
    """A pass of one sequence, its last row a label."""
    packer = Packer()
    packer.chunk(0)
    packer.sequence(np.full(rows, 7), 0)
    packer.labels(rows - 1, np.array([3]), 1.0)
    batch = packer.finish(CPU)
    work = Pass(batch.segments, (), None, torch.ones(2), torch.zeros((), requires_grad=True),
                label_rows=batch.label_rows, label_segments=batch.label_segments)  # fmt: skip
    return batch, work


def _count(grads: Tensor) -> Callable[[PackedBatch, Pass], Tensor]:
    """A pass that adds the sum of its ids to slot 0."""

    def run(batch: PackedBatch, work: Pass) -> Tensor:
        grads[0] += batch.input_ids.sum()
        return torch.stack([batch.input_ids.sum(), batch.label_weight.sum()]).double()

    return run


def test_graphs_are_bounded_and_the_latest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    grads, capture = torch.zeros(2, 3), Emulation()
    runs, total = Graphs(_count(grads), grads, capture, 1000), 0
    for rows, kept, recorded in (
        (10, [32], 0), (40, [32, 64], 0), (11, [64, 32], 1), (9, [64, 32], 1), (70, [32, 96], 1),
        (41, [96, 64], 1), (10, [64, 32], 1), (12, [64, 32], 2), (42, [32, 64], 3),
    ):  # fmt: skip
        loss = runs(*_batch(rows))
        total += 7 * rows
        assert [key.rows for key in runs.kept] == kept and capture.recorded == recorded
        assert loss.tolist() == [7 * rows, 1] and grads[0].tolist() == [total] * 3
    assert not grads[1].any()


def test_a_loss_outlives_the_next_replay() -> None:
    grads = torch.zeros(2, 3)
    runs = Graphs(_count(grads), grads, Emulation(), 1000)
    losses = [runs(*_batch(rows)) for rows in (10, 11, 12, 13)]
    assert [float(loss[0]) for loss in losses] == [70, 77, 84, 91]


def test_a_recorded_pass_has_an_anchor_of_its_own() -> None:
    """Each time: autograd ties one to the stream where it was used first."""
    anchors: list[Tensor] = []
    batch, work = _batch(10)

    def run(batch: PackedBatch, work: Pass) -> Tensor:
        anchors.append(work.anchor)
        return torch.ones(2)

    runs = Graphs(run, torch.zeros(2, 3), Emulation(), 1000)
    for _ in range(3):
        runs(batch, work)
    assert anchors[0] is work.anchor and all(a.requires_grad for a in anchors)
    assert len(anchors) == len({id(a) for a in anchors}) == 4  # as it is, recorded, and two replays


def test_large_passes_run_as_they_are() -> None:
    grads, batch, work = torch.zeros(2, 3), *_batch(12)
    seen: list[Any] = []
    runs = Graphs(lambda *given: seen.append(given) or torch.ones(2), grads, Emulation(), 11)
    for _ in range(3):
        runs(batch, work)
    assert all(b is batch and w is work for b, w in seen) and len(seen) == 3 and not runs.kept


@pytest.mark.parametrize("slot", [0, None])
def test_a_recording_of_other_numbers_is_refused(slot: int | None) -> None:
    """One that misses a gradient, and one that misses the losses of the pass."""
    grads = torch.zeros(2, 3)

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        run()
        return (lambda: None) if slot is None else (lambda: grads[slot].add_(1))

    runs = Graphs(_count(grads), grads, capture, 1000)
    runs(*_batch(10))
    with pytest.raises(RunError, match=r'other numbers .* expected the same bits.*"never"'):
        runs(*_batch(11))


def test_a_sick_client_is_no_reason_to_refuse() -> None:
    grads = torch.full((2, 3), float("nan"))
    runs = Graphs(lambda *_: grads[:, 0].double(), grads, Emulation(), 1000)
    assert all(runs(*_batch(10)).isnan().all() for _ in range(3))


def test_what_cannot_be_recorded_says_so() -> None:
    def capture(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    grads = torch.zeros(2, 3)
    runs = Graphs(_count(grads), grads, capture, 1000)
    runs(*_batch(10))
    with pytest.raises(RunError, match=r'recorded \(operation not permitted .*graphs = "never"'):
        runs(*_batch(10))


def test_who_records(lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch) -> None:
    """Small bases on CUDA where it is asked for, and nothing that the host would have to read."""
    one = lab(train__graphs="auto")

    def changed(section: str, **values: Any) -> Config:
        changed = getattr(one.config, section).model_copy(update=values)
        return one.config.model_copy(update={section: changed})

    run, grads = one.trainer().backward, torch.zeros(2, 3)
    assert not suits(one.config, one.base) and runner(run, grads, one.config, one.base) is run
    config = SimpleNamespace(rope_parameters={"rope_type": "default"})
    site = SimpleNamespace(dense=torch.ones(1))
    base = SimpleNamespace(device=torch.device("cuda"), sites=[site], model=SimpleNamespace(
        config=config, modules=lambda: iter(layers), parameters=one.base.model.parameters
    ))  # fmt: skip
    layers = [SimpleNamespace(gradient_checkpointing=False), SimpleNamespace()]
    with dispatch.use("triton"):
        assert suits(one.config, base)
        monkeypatch.setattr(graphs, "CudaCapture", lambda device: Emulation())
        assert isinstance(runner(run, grads, one.config, base), Graphs)
        assert not suits(changed("train", graphs="never"), base)
        assert not suits(changed("adapter", dora=True), base)
        layers[0].gradient_checkpointing = True
        assert not suits(one.config, base)
        layers[0].gradient_checkpointing = False
        site.dense = None  # held in its bits
        assert not suits(one.config, base)
        site.dense = torch.ones(1)
        for rope in ({"rope_type": "dynamic"}, {"full_attention": {"rope_type": "longrope"}}):
            config.rope_parameters = rope
            assert not suits(one.config, base)
    config.rope_parameters = None
    with dispatch.use("reference"):
        assert not suits(one.config, base)


def test_the_order_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that torch asks for: a warm-up on the stream that records, which waits for the
    present one and is waited for, then the recording, in the pool of a graph that stays."""
    calls: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "now" if name == "now" else "side"

        def wait_stream(self, other: Any) -> None:
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def pool(self) -> str:
            return "pool"

        def replay(self) -> None:
            calls.append("replay")

    @contextmanager
    def graph(made: Any, pool: Any = None, stream: Any = None) -> Iterator[None]:
        calls.append(f"record on {stream.name} in {pool}")
        yield

    @contextmanager
    def on(stream: Any) -> Iterator[None]:
        calls.append(f"on {stream.name}")
        yield

    for name, fake in {
        "Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": on,
        "current_stream": lambda device: Stream("now"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = CudaCapture(CPU)(lambda: calls.append("run"))
    replay()
    assert calls == [
        "record on side in None", "side waits for now", "on side", "run", "now waits for side",
        "record on side in pool", "run", "replay",
    ]  # fmt: skip
