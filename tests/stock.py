"""The other implementation: `peft`, a padded batch, torch.optim.AdamW and clip_grad_norm_."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedsim.adapters import AdapterBank
from tests.lab import CLIENTS, KEY, LR, SCALE, Lab, labels
from tests.masks import keep_mask

_KINDS = {"A": "lora_A", "B": "lora_B", "mag": "lora_magnitude_vector"}


class _Counted(nn.Module):
    """Dropout with the masks that fedsim counts, for rows of a padded batch."""

    def __init__(self, p: float, number: int, client: int) -> None:
        super().__init__()
        self.p, self.number, self.client, self.step = p, number, client, 0

    def forward(self, x: Tensor) -> Tensor:
        rows, length, features = x.shape
        keep = keep_mask(
            KEY, self.p, features, client=torch.full((rows * length,), self.client), round=1,
            step=torch.full((rows * length,), self.step),
            sequence=torch.arange(rows).repeat_interleave(length),
            position=torch.arange(length).repeat(rows), module=self.number,
        )  # fmt: skip
        return torch.where(keep.view(x.shape), x / (1 - self.p), 0)


def _loss_in_fp64(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten()
    )


class Stock:
    """One client of a lab."""

    def __init__(
        self, lab: Lab, client: int, dtype: torch.dtype = torch.float32, *, exact_loss: bool = False
    ) -> None:
        """With `exact_loss` the loss is computed in fp64: transformers' own in fp32 is off by 1e-5
        in the gradient of logits over a real vocabulary."""
        from peft import LoraConfig, get_peft_model

        self.lab, self.client, self.layout = lab, client, lab.base.layout
        adapter, train = lab.config.adapter, lab.config.train
        frozen = AutoModelForCausalLM.from_pretrained(
            lab.config.model.name, dtype=dtype, attn_implementation="eager"
        )
        self.model = get_peft_model(frozen, LoraConfig(
            r=adapter.rank, lora_alpha=SCALE[client] * adapter.rank, task_type="CAUSAL_LM",
            target_modules=list(self.layout.modules), lora_dropout=adapter.dropout,
            use_dora=adapter.dora,
        ))  # fmt: skip
        self.model.train()
        if exact_loss:
            frozen.loss_function = _loss_in_fp64
        modules = {n: m for n, m in frozen.named_modules() if n in set(self.layout.modules)}
        if adapter.dropout:
            for number, module in enumerate(modules.values()):  # numbered in the model's order
                module.lora_dropout["default"] = _Counted(adapter.dropout, number, client)
        self.weights = {
            piece: getattr(modules[piece.module], _KINDS[piece.kind])["default"].weight
            for piece in self.layout.pieces
        }
        self.write(lab.start)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        assert {id(p) for p in self.parameters} == {id(w) for w in self.weights.values()}
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=LR[client], betas=(train.beta1, train.beta2), eps=train.eps,
            weight_decay=train.weight_decay,
        )  # fmt: skip

    def write(self, row: Tensor) -> None:
        for piece, weight in self.weights.items():
            weight.data.copy_(self.layout.view(row[None], piece)[0].view(weight.shape))

    def read(self, gradient: bool = False) -> Tensor:
        row = torch.zeros(1, self.layout.size, dtype=self.parameters[0].dtype)
        for piece, weight in self.weights.items():
            value = weight.grad if gradient else weight.detach()
            self.layout.view(row, piece).copy_(value.view(piece.shape))
        return row[0]

    def backward(self, step: int, row: Tensor | None = None) -> Tensor:
        """Gradients (P,) of one local step, at weights (P,) if given; its loss in `self.loss`."""
        if row is not None:
            self.write(row)
        for module in self.model.modules():
            if isinstance(module, _Counted):
                module.step = step
        batch = self.lab.batch(self.client, step)
        rows = [torch.as_tensor(self.lab.store.of(e)) for e in batch]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], batch_first=True)
        mine = [labels(self.lab.store, e) for e in batch]
        wanted = nn.utils.rnn.pad_sequence(mine, batch_first=True, padding_value=-100)
        self.optimizer.zero_grad()
        loss = self.model(input_ids=ids, attention_mask=real, labels=wanted).loss
        loss.backward()
        self.loss = loss.detach()
        return self.read(gradient=True)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, self.lab.config.train.clip_norm)
        self.optimizer.step()


def watched(
    lab: Lab, clients: Sequence[int], steps: int, **train: Any
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Train clients in one lane: what they learnt (k, P), and the weights and gradients, each
    (k, P), that every optimiser step met."""
    seen: list[tuple[Tensor, Tensor]] = []
    step, k = AdapterBank.step, len(clients)

    def spy(self: AdapterBank, **given: Any) -> Tensor:
        seen.append((self.rows[:k].clone(), self.grads[:k].clone()))
        return step(self, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterBank, "step", spy)
        rows, ok = lab.train(clients, (steps,) * CLIENTS, **train)
    assert ok.all() and len(seen) == steps
    return rows, seen
