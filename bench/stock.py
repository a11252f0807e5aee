"""B0: stock transformers and PEFT, one client after another, batches padded to their longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fedsim.core import AdapterLayout
from fedsim.data.tokens import TokenStore

Trained = tuple[int, np.ndarray]  # real tokens; (M, 2) each client's first and last loss
Visit = tuple[float, Sequence[np.ndarray]]  # learning rate, examples of each step


class Stock:
    """A model of its own under stock PEFT, without checkpointing."""

    def __init__(self, base: Any, layout: AdapterLayout, adapter: Any) -> None:
        """Adapt `base`, a causal LM on its device, as the configuration's `adapter` says."""
        self.setting = f"{base.config._attn_implementation}, {str(base.dtype)[6:]}"
        self.layout = layout
        lora = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
            target_modules=list(layout.modules), task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model = get_peft_model(base, lora).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    def round(
        self, start: Tensor, visits: Sequence[Visit], store: TokenStore, train: Any
    ) -> Trained:
        """All visits from the row `start` (P,), as one would write it with PEFT."""
        tokens, losses = 0, []
        for lr, batches in visits:
            for piece in self.layout.pieces:
                name = f"base_model.model.{piece.module}.lora_{piece.kind}.default.weight"
                factor = self.layout.view(start[None], piece)[0]
                self.model.get_parameter(name).data.copy_(factor)
            optimiser = torch.optim.AdamW(
                self.trained, lr=lr, betas=(train.beta1, train.beta2), eps=train.eps,
                weight_decay=train.weight_decay,
            )  # fmt: skip
            seen = []
            for examples in batches:
                loss = self.model(**padded(store, examples, start.device)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, train.clip_norm)
                optimiser.step()
                optimiser.zero_grad()
                seen.append(loss.detach().double())
                tokens += int(store.lengths[examples].sum())
            losses.append(torch.stack(seen).cpu().numpy()[[0, -1]])
        return tokens, np.array(losses)


def padded(store: TokenStore, examples: np.ndarray, device: torch.device) -> dict[str, Any]:
    """A stock batch: right padding up to the longest, labels on the answers only."""
    rows = [torch.as_tensor(np.asarray(store.of(e), dtype=np.int64)) for e in examples.tolist()]
    ids = pad_sequence(rows, batch_first=True)
    column, ends = torch.arange(ids.shape[1]), torch.as_tensor(store.lengths[examples])[:, None]
    spans = zip(store.offsets[examples], store.offsets[examples + 1], strict=True)
    trained = [torch.as_tensor(np.array(store.trained[a:b])) for a, b in spans]
    labels = ids.masked_fill(~pad_sequence(trained, batch_first=True), -100)
    batch = {"input_ids": ids, "attention_mask": (column < ends).long(), "labels": labels}
    return {name: part.to(device) for name, part in batch.items()} | {"use_cache": False}
