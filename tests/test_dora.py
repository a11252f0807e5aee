"""DoRA: directions by LoRA, lengths by themselves, for many clients in one pass.

Proved here: gradients of A, B and magnitudes at every step, and what ten steps learn, equal stock
PEFT's, for clients of different scales in one pass, with and without dropout, with biases and with
linears that have no adapter between those that have one; the norms of the adapted weights against
float64; magnitudes start at ||W||, where the model is the base; they are whole at every rank, and
counted in the traffic; strict mode's bits and a sick client's neighbours. About 18 seconds on one
thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import checkpoint, peft_io, simulate
from fedsim.adapters import AdapterBank, initial_row
from fedsim.config import Config
from fedsim.core import AdapterLayout
from fedsim.dora import weight_norms
from fedsim.lora import Pass
from fedsim_kernels.segments import Segments
from tests.lab import CLIENTS, DELTA, GRADIENT, KEY, Lab, distance, examples, open_base, worst
from tests.stock import Stock, watched

# peft 0.21 reads a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
LAYOUT = AdapterLayout.build({"a": (7, 5), "b": (7, 3)}, 4, sites=[["a", "b"]], dora=True)


@pytest.mark.parametrize(
    ("architecture", "targets", "dropout"),
    [("llama", ["all-linear"], 0.0), ("llama", ["all-linear"], 0.3),
     ("phi3", ["all-linear"], 0.0), ("phi3", ["all-linear"], 0.3),
     ("qwen2", ["q_proj", "v_proj"], 0.0), ("qwen2", ["q_proj", "v_proj"], 0.3)],
)  # fmt: skip
def test_ten_steps_equal_stock_peft(
    lab: Callable[..., Lab], implementation: str, architecture: str, targets: list[str],
    dropout: float,
) -> None:  # fmt: skip
    """Every step's gradients at the same weights, then ten steps of each on its own.

    Adam's eps lies above the rounding of the gradients: with 1e-8, one element of Phi-3 whose first
    gradient is 1.6e-8 moves by the learning rate up or down, and what stock PEFT learns with eager
    attention is 1.9e-3 away from what it learns with sdpa.
    """
    one = lab(
        architecture, adapter__dora=True, adapter__targets=targets, adapter__dropout=dropout,
        train__eps=1e-6,
    )  # fmt: skip
    layout, clients = one.base.layout, (0, 1, 2)
    assert {piece.kind for piece in layout.pieces} == {"A", "B", "mag"}
    rows, met = watched(one, clients, 10)
    for client in clients:
        stock = Stock(one, client)
        for step, (weights, grads) in enumerate(met):
            want = stock.backward(step, weights[client])[None]
            assert worst(layout, grads[client, None], want) <= GRADIENT
        stock.write(one.start)
        for step in range(10):
            stock.backward(step)
            stock.step()
        assert distance(rows[client, None], stock.read()[None], one.start) <= DELTA
        for piece in layout.pieces:
            assert (layout.view(rows - one.start, piece)[client] != 0).any(), piece


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_batched_equal_alone(lab: Callable[..., Lab], dropout: float) -> None:
    """In other company, and in several passes."""
    one = lab(adapter__dora=True, adapter__dropout=dropout)
    _, together = one.gradients(range(CLIENTS))
    _, split = one.gradients(range(CLIENTS), budget_tokens=40)
    for client in range(CLIENTS):
        _, alone = one.gradients([client], slots=1)
        for other in (together, split):
            assert worst(one.base.layout, other[client, None], alone) <= GRADIENT


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_strict_is_bit_for_bit_the_same_in_any_packing(
    lab: Callable[..., Lab], dropout: float
) -> None:
    strict = {"mode": "strict", "chunk_tokens": 48, "tile": 16}
    one = lab(adapter__dora=True, adapter__dropout=dropout)
    want, _ = one.train(range(CLIENTS), **strict)
    for how in ({"slots": 1}, {"slots": 3, "budget_tokens": 64}):
        got, _ = one.train((2, 0, 3, 1), **strict, **how)
        assert torch.equal(got, want[[2, 0, 3, 1]])


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
def test_a_sick_client_stays_alone(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, poison: float
) -> None:
    one, steps = lab(adapter__dora=True), (2,) * CLIENTS
    healthy, ok = one.train(range(CLIENTS), steps)
    changed, _ = replace(one, store=examples(shift=7, client=1)).train(range(CLIENTS), steps)
    load = AdapterBank.load
    monkeypatch.setattr(
        AdapterBank, "load",
        lambda self, slot, row: load(self, slot, row * poison if slot == 1 else row),
    )  # fmt: skip
    rows, now = one.train(range(CLIENTS), steps)
    assert ok.all() and now.tolist() == [True, False, True, True]
    for other in (rows, changed):
        assert torch.equal(other[[0, 2, 3]], healthy[[0, 2, 3]])
        assert not torch.equal(other[1], healthy[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_are_those_of_the_adapted_weights(lab: Callable[..., Lab], dtype: str) -> None:
    """Of every slot in the pass, from large and small adapters of several ranks; NaN in a slot
    that rests is not met."""
    one = lab(adapter__dora=True, model__dtype=dtype)
    layout, k = one.base.layout, 4
    rows = one.start * torch.tensor([1.0, 30.0, 1e-3, float("nan")])[:, None]
    for pair in layout.factors(rows[2:3]).values():
        pair[0][:, 2:], pair[1][..., 2:] = 0, 0
    scale, views = torch.tensor([2.0, 0.5, 3.0, 1.0]), layout.site_views(rows)
    work = Pass(Segments.build([3, 4, 2], [2, 0, 1]), views, None, scale, one.base.anchor)
    factors = layout.factors(rows.double())
    for site in one.base.sites:
        assert site.index is not None
        found = weight_norms(site, views[site.index], work)
        for member, got in zip(site.adapted, found, strict=True):
            w = site.weight[member.column : member.column + member.width].double()
            a, b = factors[member.name]
            want = (w + scale.double()[:, None, None] * b @ a).norm(dim=2)
            assert got.shape == (k, member.width) and got.dtype == torch.float32
            torch.testing.assert_close(got[:3].double(), want[:3], rtol=1e-6, atol=0)
            assert (got[3] == 1).all()


def test_it_starts_as_the_base(settings: Callable[..., Config]) -> None:
    """B = 0 and magnitudes ||W||: logits of the base, and of DoRA with another length not."""
    config = settings(adapter__dora=True)
    base = open_base(config)
    row = base.magnitudes(initial_row(base.layout, KEY))
    ids, positions, segments = torch.arange(9), torch.arange(9), Segments.build([9], [0])

    def logits(row: Tensor) -> Tensor:
        views = base.layout.site_views(row[None])
        work = Pass(segments, views, None, torch.ones(1), base.anchor)
        with torch.no_grad():
            return base.logits(base.hidden(ids, positions, work))

    for site in base.sites:
        for m in site.members:
            piece = base.layout.piece(m.name, "mag")
            norms = site.weight[m.column : m.column + m.width].norm(dim=1)
            torch.testing.assert_close(base.layout.view(row[None], piece)[0, 0], norms)
    stock = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    with torch.no_grad():
        plain = stock(ids[None], use_cache=False).logits[0]
    assert (logits(row) - plain).abs().max() <= 1e-5 * plain.abs().max()
    assert (logits(row * 1.1) - plain).abs().max() > 1e-2 * plain.abs().max()


def test_a_lower_rank_keeps_whole_magnitudes() -> None:
    bank = AdapterBank(LAYOUT, 1, torch.device("cpu"))
    row = torch.arange(1.0, LAYOUT.size + 1)
    cut = bank.cut(row, 2)
    for piece in LAYOUT.pieces:
        got, whole = (LAYOUT.view(r[None], piece)[0] for r in (cut, row))
        if piece.kind == "mag":
            assert torch.equal(got, whole)
        elif piece.kind == "A":
            assert torch.equal(got[:2], whole[:2]) and not got[2:].any()
        else:
            assert torch.equal(got[:, :2], whole[:, :2]) and not got[:, 2:].any()


def test_magnitudes_are_sent_at_every_rank() -> None:
    """By hand: 4 (7 + 5) + 4 (7 + 3) + 5 + 3 = 96; of rank 1, 12 + 10 + 8 = 30."""
    assert LAYOUT.numel() == 96 and LAYOUT.numel(1) == 30


def test_a_run_starts_from_the_norms(settings: Callable[..., Config]) -> None:
    """Steps of 1e-9 change nothing to speak of: the server still has ||W||, at every rank, and
    exports it."""
    rate: dict[str, Any] = {"train__lr_max": 1e-9, "train__lr_min": 1e-9}
    config = settings(
        server__rounds=1, adapter__dora=True, adapter__ranks=[2, 4], train__steps=1, **rate
    )
    folder: Path = simulate.run(config)
    saved = checkpoint.load_checkpoint(folder / "checkpoint")
    assert saved is not None
    base = open_base(config)
    want = base.magnitudes(initial_row(base.layout, KEY))
    assert torch.equal(
        peft_io.load(folder / "adapters" / "round_00001", base.layout), saved.server.row
    )
    for piece in base.layout.pieces:
        got, norms = (base.layout.view(r[None], piece) for r in (saved.server.row, want))
        if piece.kind == "mag":
            torch.testing.assert_close(got, norms, rtol=1e-6, atol=0)
