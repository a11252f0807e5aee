"""Promise 2: what a client learns is what stock PEFT teaches it.

Proved here, on tiny random models of every architecture, with the C++ kernels and in PyTorch: the
gradients that every step meets and what ten steps have learnt, against `peft` with torch's own
AdamW and clipping, with and without shared prefixes, with and without dropout; one step with the
Triton kernels in their interpreter; each client's own mean loss; examples without labels; bf16.
About 20 seconds on one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fedsim_kernels import dispatch, native
from tests.conftest import ARCHITECTURES
from tests.lab import CLIENTS, DELTA, EXAMPLES, GRADIENT, Lab, distance, without, worst
from tests.stock import Stock, watched

# peft 0.21 reads a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ATTENTION = {"phi3": ["qkv_proj"]}  # of the others q_proj and v_proj: k_proj, between, has none


def targets_of(architecture: str, targets: str) -> list[str]:
    if targets == "attention":
        return ATTENTION.get(architecture, ["q_proj", "v_proj"])
    return [targets]


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ten_steps_equal_stock_peft(
    lab: Callable[..., Lab], architecture: str, targets: str
) -> None:
    """Every step's gradients at the same weights, then ten steps of each on its own."""
    one = lab(architecture, adapter__targets=targets_of(architecture, targets))
    layout, clients = one.base.layout, (0, 1, 2)
    arms: list[tuple[Any, bool]] = [("reference", True)]
    if native.available():
        arms = [("native", False), ("native", True), *arms]
    trained, met = [], []
    for implementation, shared in arms:
        with dispatch.use(implementation):
            rows, seen = watched(one, clients, 10, shared_prefix=shared)
        trained.append(rows)
        met = met or [(weights, [grads]) for weights, grads in seen]
    for step, (weights, grads) in enumerate(met):  # at the weights that the first arm met
        for implementation, shared in arms[1:]:
            with dispatch.use(implementation):
                how = {"step": step, "rows": weights, "shared_prefix": shared}
                grads.append(one.gradients(clients, **how)[1])
    for client in clients:
        stock = Stock(one, client)
        for step, (weights, grads) in enumerate(met):
            want = stock.backward(step, weights[client])[None]
            assert max(worst(layout, g[client, None], want) for g in grads) <= GRADIENT
        stock.write(one.start)
        for number in range(10):
            stock.backward(number)
            stock.step()
        want = stock.read()
        for rows in trained:
            assert distance(rows[client, None], want[None], one.start) <= DELTA
            for piece in layout.pieces:
                assert (layout.view(rows - one.start, piece)[client] != 0).any(), piece


@pytest.mark.parametrize(
    ("architecture", "targets"),
    [("llama", "all-linear"), ("qwen2", "attention"), ("phi3", "all-linear")],
)
def test_dropout_equals_stock_peft_with_the_same_masks(
    lab: Callable[..., Lab], implementation: str, architecture: str, targets: str
) -> None:
    """Modules are numbered in the model's order, whatever the order of their calls."""
    one = lab(
        architecture, adapter__targets=targets_of(architecture, targets), adapter__dropout=0.3
    )
    for step in (0, 1):
        _, got = one.gradients((0, 2), step=step)
        for at, client in enumerate((0, 2)):
            want = Stock(one, client).backward(step)[None]
            assert worst(one.base.layout, got[at, None], want) <= GRADIENT


def test_one_step_of_triton_equals_stock_peft(lab: Callable[..., Lab], tmp_path: Path) -> None:
    """In the interpreter, with one layer."""
    torch.manual_seed(0)
    hf = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(hf).save_pretrained(tmp_path)
    one = lab(model__name=str(tmp_path), train__batch=1)
    with dispatch.use("triton"):
        rows, ((start, grads),) = watched(one, (0, 1), 1)
    for client in (0, 1):
        stock = Stock(one, client)
        want = stock.backward(0, start[client])[None]
        assert worst(one.base.layout, grads[client, None], want) <= GRADIENT
        stock.write(one.start)
        stock.backward(0)
        stock.step()
        assert distance(rows[client, None], stock.read()[None], one.start) <= DELTA


def test_loss_is_each_clients_own_mean(lab: Callable[..., Lab], implementation: str) -> None:
    """The clients' label counts differ; so do those of the passes that a client is split over."""
    one = lab()
    stock = [Stock(one, client) for client in range(CLIENTS)]
    for each in stock:
        each.backward(0)
    for budget in (32, 1 << 14):
        loss, _ = one.gradients(range(CLIENTS), budget_tokens=budget)
        for client in range(CLIENTS):
            assert abs(loss[client] - stock[client].loss) <= GRADIENT * stock[client].loss


def test_examples_without_labels(lab: Callable[..., Lab], implementation: str) -> None:
    """Client 1 has some, client 2 nothing else: no NaN, no wrong mean, no movement."""
    one = lab()
    none = [*one.batch(1, 0)[:2], *range(2 * EXAMPLES, 3 * EXAMPLES)]
    one = replace(one, store=without(one.store, none))
    loss, grads = one.gradients(range(CLIENTS))
    assert worst(one.base.layout, grads[1, None], Stock(one, 1).backward(0)[None]) <= GRADIENT
    assert loss[2] == 0 and not grads[2].any()
    rows, ok = one.train(range(CLIENTS))
    assert ok.all() and torch.isfinite(rows).all() and torch.equal(rows[2], one.start)


@pytest.mark.parametrize("dora", [False, True])
def test_bf16_base_is_as_close_to_fp32_as_stock_bf16(
    lab: Callable[..., Lab], implementation: str, dora: bool
) -> None:
    """Gradients, and what one step learns: at most twice stock PEFT's own bf16 error."""
    exact, half = lab(adapter__dora=dora), lab(adapter__dora=dora, model__dtype="bfloat16")
    assert half.base.dtype == torch.bfloat16
    half = replace(half, start=exact.start)  # of magnitudes that rounding has not touched
    clients, steps = range(CLIENTS), (1,) * CLIENTS

    def learnt(one: Lab) -> Tensor:
        return torch.stack([one.gradients(clients)[1], one.train(clients, steps)[0]])

    want, got = learnt(exact), learnt(half)
    assert got.dtype == torch.float32
    for client in clients:
        stock = Stock(half, client, torch.bfloat16)
        theirs = [stock.backward(0)]
        stock.step()
        theirs.append(stock.read())
        allowed = (torch.stack(theirs) - want[:, client]).norm(dim=1)
        assert ((got - want)[:, client].norm(dim=1) <= 2 * allowed).all()
