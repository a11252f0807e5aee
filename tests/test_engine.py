"""The engine's promises, on tiny random models: what a client learns is what stock PEFT teaches it,
whoever shares its pass.

Proved here: gradients and ten steps of every architecture against `peft` with torch's own AdamW
and clipping, with and without a shared prefix, with and without dropout; batched clients against
the same clients alone, in any order, slot count and token budget; bitwise repeatability and
isolation; packing without padding; each client's own mean loss; counted dropout masks; activation
recompute bit for bit; sick clients alone; refusals of what would be computed wrongly; no gradient
below the first adapter; 4-bit and bf16 bases. About 40 seconds on one thread.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from fedsim import lora, model, seeds
from fedsim.adapters import AdapterBank, initial_row
from fedsim.config import Config
from fedsim.core import AdapterLayout, ClientUpdates, LocalRule, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.errors import ModelError, RunError
from fedsim.plan import pack_step, step_examples
from fedsim.record import Meter
from fedsim.reduce import Reduce
from fedsim.train import Trainer
from fedsim.weights import Weights
from fedsim_kernels.segments import Segments

pytestmark = [
    # peft 0.21 reads a name that transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # bitsandbytes 0.50 decorates functions with torch.jit.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "phi3")
ATTENTION = {"phi3": ("qkv_proj",)}  # every other architecture: q_proj and v_proj
GRADIENT = 1e-5  # of the largest element of a factor's gradient: the promise for fp32
DELTA = 1e-3  # of the norm of what was learnt in ten steps: Adam divides rounding noise by |g|
KEY = seeds.run_key(1)
CLIENTS, EXAMPLES = 4, 7  # batches of 3: every third step holds one example, hence no prefix
SCALE = (2.0, 1.0, 0.5, 2.0)
LR = (1e-2, 2e-2, 5e-3, 1e-2)
STEPS = (3, 2, 4, 1)


def examples(shift: int = 0, client: int = -1) -> TokenStore:
    """Short random examples; each client's share a prompt prefix. `shift` renames the tokens of
    one client, keeping every length."""
    rng = np.random.default_rng(5)
    ids, starts = [], []
    for c in range(CLIENTS):
        prefix = rng.integers(1, 384, 9 + c)
        for e in range(EXAMPLES):
            answer = 1 + (c + 2 * e) % 6
            row = np.concatenate([prefix, rng.integers(1, 384, 3 + (e * 5 + c) % 8 + answer)])
            ids.append((row + shift) % 383 + 1 if c == client else row)
            starts.append(len(row) - answer)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    return TokenStore(np.concatenate(ids), offsets, np.array(starts))


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
        population = Population(
            np.arange(CLIENTS + 1) * EXAMPLES, np.arange(CLIENTS * EXAMPLES)
        )
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
        """Losses (k,) and gradients (k, P) of one local step."""
        trainer, plan = self.trainer(**train), plan_of(clients)
        trainer.bank.load(self.start)
        if rows is not None:
            trainer.bank.rows[: len(rows)] = rows
        work = [(slot, self.batch(c, step)) for slot, c in enumerate(clients)]
        loss = trainer.gradients(plan, np.arange(len(clients)), work, step)
        return loss[: len(clients)], trainer.bank.grads[: len(clients)].clone()

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
        lanes=(np.arange(m),),
    )  # fmt: skip


def open_base(config: Config, folder: Path | str | None = None) -> model.Base:
    path = Path(folder or config.model.name)
    return model.load(Weights(path, "test", "test"), config, torch.device("cpu"),
                      config.adapter.targets)  # fmt: skip


@pytest.fixture
def lab(settings: Callable[..., Config]) -> Callable[..., Lab]:
    def make(architecture: str = "llama", store: TokenStore | None = None, **changes: Any) -> Lab:
        changes = {"data__max_length": 32, **changes}
        config = settings(architecture, **changes)
        base = open_base(config)
        start = initial_row(base.layout, KEY)
        generator = torch.Generator().manual_seed(3)
        for _, b in base.layout.factors(start[None]).values():
            b.normal_(std=0.05, generator=generator)
        return Lab(config, base, store or examples(), start)

    return make


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


class Stock:
    """The other implementation: `peft`, a padded batch, torch.optim.AdamW, clip_grad_norm_."""

    def __init__(self, lab: Lab, client: int, dtype: torch.dtype = torch.float32) -> None:
        from peft import LoraConfig, get_peft_model

        self.lab, self.client, self.layout = lab, client, lab.base.layout
        names = [p.module for p in self.layout.pieces[::2]]
        frozen = AutoModelForCausalLM.from_pretrained(
            lab.config.model.name, dtype=dtype, attn_implementation="eager"
        )
        rank = lab.config.adapter.rank
        self.model = get_peft_model(frozen, LoraConfig(
            r=rank, lora_alpha=SCALE[client] * rank, target_modules=names, lora_dropout=0.0,
            task_type="CAUSAL_LM",
        ))  # fmt: skip
        self.model.train()
        self.modules = {n: frozen.get_submodule(n) for n in names}
        self.weights = {
            n: (m.lora_A["default"].weight, m.lora_B["default"].weight)
            for n, m in self.modules.items()
        }
        self.write(lab.start)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        assert len(self.parameters) == len(self.layout.pieces)
        train = lab.config.train
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR[client], betas=(train.beta1, train.beta2), eps=train.eps,
            weight_decay=train.weight_decay,
        )  # fmt: skip

    def write(self, row: Tensor) -> None:
        for name, factors in self.layout.factors(row[None]).items():
            for weight, value in zip(self.weights[name], factors, strict=True):
                weight.data.copy_(value[0])

    def read(self, gradient: bool = False) -> Tensor:
        row = torch.zeros(1, self.layout.size)
        for name, factors in self.layout.factors(row).items():
            for weight, value in zip(self.weights[name], factors, strict=True):
                value.copy_(weight.grad if gradient else weight.detach())
        return row[0]

    def backward(self, step: int, before: Callable[[Tensor], None] = lambda _: None) -> Tensor:
        """Gradients (P,) of one local step; `before` sees the padded batch's sequence ids."""
        batch = self.lab.batch(self.client, step)
        rows = [torch.as_tensor(self.lab.store.of(e)) for e in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        labels = ids.masked_fill(real == 0, -100)
        for label, example in zip(labels, batch, strict=True):
            label[: self.lab.store.label_start[example]] = -100
        self.optimizer.zero_grad()
        before(ids)
        self.model(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
        return self.read(gradient=True)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.lab.config.train.clip_norm)
        self.optimizer.step()


# Promise 2: equal to stock PEFT


@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equal_to_stock_peft(
    lab: Callable[..., Lab], monkeypatch: pytest.MonkeyPatch, architecture: str, targets: str
) -> None:
    names = ("all-linear",)
    if targets == "attention":
        names = ATTENTION.get(architecture, ("q_proj", "v_proj"))
    one = lab(architecture, adapter__targets=list(names))
    clients, steps = (0, 1, 2), (10, 10, 10, 10)
    seen: list[Tensor] = []
    step = AdapterBank.step

    def spy(self: AdapterBank, **settings: Any) -> Tensor:
        seen.append(self.grads[: len(clients)].clone())
        return step(self, **settings)

    monkeypatch.setattr(AdapterBank, "step", spy)
    shared, _ = one.train(clients, steps, shared_prefix=True)
    apart, _ = one.train(clients, steps, shared_prefix=False)
    want = torch.zeros(10, len(clients), one.base.layout.size)
    rows = torch.zeros(len(clients), one.base.layout.size)
    for client in clients:
        stock = Stock(one, client)
        for n in range(10):
            want[n, client] = stock.backward(n)
            stock.step()
        rows[client] = stock.read()
    for got, grads in ((shared, seen[:10]), (apart, seen[10:])):
        errs=[worst(one.base.layout, g, w) for g, w in zip(grads, want, strict=True)]
        print("ERR", ["%.1e"%e for e in errs], "%.1e"%distance(got, rows, one.start))
