"""Promises 1, 3 and 6: a client's result does not depend on whom it shares a pass with.

Proved here: batched clients against the same clients alone, in any order, slot count and token
budget; bitwise repeatability, and isolation from other clients' data, with the C++ kernels and in
PyTorch; packing without padding; sequences that never meet; dropout masks that no packing changes;
recomputed activations bit for bit. About 20 seconds on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import lora
from fedsim.config import Train
from fedsim.packing import cut, pack
from fedsim.plan import schedule
from fedsim_kernels import dispatch, native
from fedsim_kernels.segments import Segments
from tests.conftest import ARCHITECTURES
from tests.lab import CLIENTS, DELTA, EXAMPLES, GRADIENT, Lab, distance, examples, worst

# In PyTorch those two that have every operation between them, and every argument of one.
BOTH = [("native", name) for name in ARCHITECTURES if native.available()]
BOTH += [("reference", "llama"), ("reference", "gemma2")]
each_architecture = pytest.mark.parametrize(("which", "architecture"), BOTH)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shared_prefix", [False, True])
@each_architecture
def test_gradients_batched_equal_alone(
    lab: Callable[..., Lab], which: Any, architecture: str, shared_prefix: bool, dropout: float
) -> None:
    one = lab(architecture, adapter__dropout=dropout, train__shared_prefix=shared_prefix)
    with dispatch.use(which):
        loss, together = one.gradients(range(CLIENTS))
        split_loss, split = one.gradients(range(CLIENTS), budget_tokens=40)
        for client in range(CLIENTS):
            alone_loss, alone = one.gradients([client], slots=1)
            assert worst(one.base.layout, together[client, None], alone) <= GRADIENT
            assert worst(one.base.layout, split[client, None], alone) <= GRADIENT
            for other in (loss, split_loss):
                assert abs(other[client] - alone_loss[0]) <= GRADIENT * alone_loss[0]


@pytest.mark.parametrize(
    ("order", "train"),
    [((0, 1, 2, 3), {"slots": 1}), ((0, 1, 2, 3), {"slots": 2}), ((0, 1, 2, 3), {"slots": 3}),
     ((0, 1, 2, 3), {"budget_tokens": 32}), ((0, 1, 2, 3), {"budget_tokens": 100}),
     ((3, 1, 0, 2), {}), ((2, 0, 3, 1), {"slots": 2, "budget_tokens": 64})],
)  # fmt: skip
def test_training_does_not_depend_on_company(
    lab: Callable[..., Lab], order: tuple[int, ...], train: dict[str, Any]
) -> None:
    """Clients with their own numbers of steps, learning rates and scales."""
    one = lab()
    got, ok = one.train(order, **train)
    alone = torch.cat([one.train([client], slots=1)[0] for client in order])
    assert ok.all()
    assert distance(got, alone, one.start) <= DELTA


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_run_same_bits(lab: Callable[..., Lab], implementation: str, dropout: float) -> None:
    one = lab(adapter__dropout=dropout)
    first, _ = one.train(range(CLIENTS))
    second, _ = one.train(range(CLIENTS))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shared_prefix", [False, True])
@each_architecture
def test_data_of_another_client_changes_no_bit(
    lab: Callable[..., Lab], which: Any, architecture: str, shared_prefix: bool
) -> None:
    one = lab(architecture, train__shared_prefix=shared_prefix)
    other = replace(one, store=examples(shift=7, client=1))
    with dispatch.use(which):
        ours, _ = one.train(range(CLIENTS))
        theirs, _ = other.train(range(CLIENTS))
    assert torch.equal(ours[[0, 2, 3]], theirs[[0, 2, 3]])
    assert not torch.equal(ours[1], theirs[1])


# Promise 3: no padding, no crossing


@pytest.mark.parametrize("budget", [32, 100, 1 << 14])
@pytest.mark.parametrize("shared_prefix", [False, True])
def test_passes_hold_every_token_once(shared_prefix: bool, budget: int) -> None:
    """One step of every client, in passes of a budget: each example from the root of its tree to
    its end, and nothing else."""
    store = examples()
    picked = [np.arange(3) + c * EXAMPLES for c in range(CLIENTS)]
    steps = [cut(store, e, Train(), share=shared_prefix) for e in picked]
    rebuilt, labels, weight = {}, {}, torch.zeros(CLIENTS)
    packed = real = 0
    for shift in schedule([1] * CLIENTS, lambda c, _: steps[c].load, CLIENTS, budget):
        batch = pack(store, [(part, steps[part.client]) for part in shift.parts])
        assert len(batch) == batch.rows == batch.lengths.sum() <= budget
        packed += len(batch)
        weight.index_add_(0, batch.label_slot, batch.label_weight)
        rows = [range(s, s + n) for s, n in zip(batch.starts, batch.lengths, strict=True)]
        for b in set(range(len(rows))) - set(batch.parent.tolist()):  # a shared part is no example
            chain = [b]
            while batch.parent[chain[0]] >= 0:
                chain.insert(0, int(batch.parent[chain[0]]))
            at = torch.tensor([r for link in chain for r in rows[link]])
            assert torch.equal(batch.position_ids[at], torch.arange(len(at)))
            where = (int(batch.slot[b]), int(batch.sequence[b]))
            assert where not in rebuilt
            rebuilt[where] = batch.input_ids[at].tolist()
            mine = torch.isin(batch.label_rows, torch.tensor(rows[b]))
            assert (batch.label_slot[mine] == where[0]).all()
            labels[where] = [
                (at.tolist().index(r) + 1, t)
                for r, t in zip(batch.label_rows[mine].tolist(), batch.targets[mine].tolist())
            ]
    for c, step in enumerate(picked):
        for s, e in enumerate(step):
            tokens, start = store.of(e).tolist(), int(store.first[e])
            assert rebuilt.pop((c, s)) == tokens
            assert labels.pop((c, s)) == list(enumerate(tokens))[start:]
            real += len(tokens)
    assert not rebuilt and not labels
    torch.testing.assert_close(weight, torch.ones(CLIENTS))
    assert (packed < real) == shared_prefix and packed <= real


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_never_crosses_a_sequence(lab: Callable[..., Lab], architecture: str) -> None:
    one = lab(architecture)
    lengths = [6, 9, 4]
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.arange(1, 20)
    changed = torch.where((torch.arange(19) >= 6) & (torch.arange(19) < 15), ids + 50, ids)
    factors = one.base.layout.site_views(one.start.expand(2, -1))
    segments = Segments.build(lengths, [0, 0, 1])
    work = lora.Pass(segments, factors, None, torch.tensor([2.0, 1.0]), one.base.anchor)
    with torch.no_grad():
        before, after = (one.base.hidden(i, positions, work) for i in (ids, changed))
    same = torch.tensor([torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert same[:6].all() and same[15:].all() and not same[6:15].any()


# Promise 6: counted randomness; recomputation


def test_masks_do_not_depend_on_packing(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = lab(adapter__dropout=0.3)
    seen: dict[tuple[int, ...], Tensor] = {}
    drop = lora.Dropout.__call__

    def spy(self: lora.Dropout, x: Tensor, module: int) -> Tensor:
        mask = drop(self, torch.ones_like(x), module) != 0
        for row, where in zip(mask, self.counters.tolist(), strict=True):
            seen[(*where, module)] = row
        return drop(self, x, module)

    monkeypatch.setattr(lora.Dropout, "__call__", spy)

    def masks(clients: Sequence[int], **train: Any) -> dict[tuple[int, ...], Tensor]:
        seen.clear()
        one.train(clients, (2,) * CLIENTS, **train)
        return dict(seen)

    together = masks(range(CLIENTS))
    split = masks((3, 1, 0, 2), slots=2, budget_tokens=40)
    alone = masks([0], slots=1) | masks([1]) | masks([2], budget_tokens=32) | masks([3])
    lengths = {
        (c, s): [len(one.store.of(e)) for e in one.batch(c, s)]
        for c in range(CLIENTS) for s in (0, 1)
    }  # fmt: skip
    modules = range(len(one.base.layout.modules))
    late = [m.number for site in one.base.sites if site.late for m in site.members]
    tokens = sum(map(sum, lengths.values()))
    assert len(late) == 3 and {where[-1] for where in together} == set(modules)
    assert sum(w[-1] not in late for w in together) == tokens * (len(modules) - len(late))
    for other in (split, alone):
        assert together.keys() == other.keys()
        assert all(torch.equal(together[where], other[where]) for where in together)
    # Another position, sequence, step, client or module has another mask.
    first = next(w for w in together if w[0] == 0 and w[1] == 0 and w[4] == 0)
    for at, more in ((0, 1), (1, 1 << 16), (2, 1), (3, 1), (4, 1)):
        where = tuple(value + more * (i == at) for i, value in enumerate(first))
        assert not torch.equal(together[first], together[where])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recomputed_activations_give_the_same_bits(
    lab: Callable[..., Lab], architecture: str, dropout: float
) -> None:
    calls, got = [], []
    for recompute in (False, True):
        one = lab(architecture, adapter__dropout=dropout, train__recompute=recompute)
        calls.append(0)

        def count(*_: Any, at: int = int(recompute)) -> None:
            calls[at] += 1

        for layer in one.base.decoder.layers:
            layer.input_layernorm.register_forward_hook(count)
        got.append(one.gradients(range(CLIENTS), budget_tokens=100))
    # A shortened last layer keeps its activations: it has a forward of its own.
    layers = len(one.base.decoder.layers)
    assert calls[1] == 2 * calls[0] - one.base.fused["last_layer"] * calls[0] // layers > 0
    assert torch.equal(got[0][0], got[1][0]) and torch.equal(got[0][1], got[1][1])
