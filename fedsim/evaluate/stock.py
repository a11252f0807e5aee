"""The plain reference: transformers' `generate` under stock PEFT, one adapter after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fedsim import peft_io, pretrained
from fedsim.config import Config
from fedsim.core import pick_device
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.writing import Writing, ends, tokenise
from fedsim.weights import Weights


class Stock:
    """A causal LM as transformers loads it; 4-bit bases have their values, not their memory.

    Args:
        batch: prompts of one call of `generate`; in a batch, the shorter ones are padded.
        padding: "tokenizer": on that tokenizer's own side, as the official finance script has it.
            On the right, short prompts are continued behind their padding.
    """

    name = "transformers"
    ranks = False

    def __init__(
        self, weights: Weights, tokenizer: Any, config: Config, *, batch: int = 1,
        padding: Literal["left", "tokenizer"] = "left",
    ) -> None:  # fmt: skip
        self._model = pretrained.stock(weights, config, pick_device(config.run.device)).eval()
        self._tokenizer, self._batch, self._padding = tokenizer, batch, padding
        self._eos = ends(tokenizer, self._model.generation_config)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        """One output a request, in order; draws are torch's, from `sampling.seed`.

        Raises:
            ModelError: an adapter has no folder, or PEFT cannot load it.
            DataError: a prompt has no tokens.
        """
        writings = [Writing(r, self._decode, self._eos) for r in requests]
        ids = tokenise(self._tokenizer, requests)
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            for number, adapter in enumerate(adapters):
                mine = [i for i, request in enumerate(requests) if request.adapter == number]
                lm = self._under(adapter)
                for first in range(0, len(mine), self._batch):
                    batch = mine[first : first + self._batch]
                    self._continue(
                        lm, [ids[i] for i in batch], [writings[i] for i in batch],
                        max(requests[i].max_new for i in batch), sampling,
                    )  # fmt: skip
                if lm is not self._model:
                    self._model = lm.unload()
        return [w.output() for w in writings]

    def _under(self, adapter: Adapter) -> Any:
        if adapter.folder is not None:
            return peft_io.attach(self._model, adapter.folder)
        if adapter.row is not None:
            raise ModelError(
                f"adapter {adapter.name!r} as the transformers backend needs it", got="a row",
                expected="a folder in PEFT's format", remedy="Export it first.",
            )  # fmt: skip
        return self._model

    def _continue(
        self, lm: Any, ids: list[list[int]], writings: list[Writing], most: int,
        sampling: Sampling,
    ) -> None:  # fmt: skip
        """Let transformers write; every token that it writes is added to its writing."""

        def ended(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            for writing, token in zip(writings, input_ids[:, -1].tolist(), strict=True):
                if writing.end is None:
                    writing.add(token)
            done = [writing.end is not None for writing in writings]
            return torch.tensor(done, device=input_ids.device)

        wide = max(map(len, ids))
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        right = self._padding == "tokenizer" and self._tokenizer.padding_side == "right"
        gaps = [[pad] * (wide - len(row)) for row in ids]
        rows = [row + gap if right else gap + row for row, gap in zip(ids, gaps, strict=True)]
        real = [[1] * len(row) for row in ids]
        mask = [m + [0] * len(g) if right else [0] * len(g) + m
                for m, g in zip(real, gaps, strict=True)]  # fmt: skip
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {"do_sample": True, "temperature": sampling.temperature,
                   "top_p": sampling.top_p, "top_k": sampling.top_k}  # fmt: skip
        lm.generate(
            input_ids=torch.tensor(rows, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device), max_new_tokens=most,
            eos_token_id=sorted(self._eos), pad_token_id=pad, stopping_criteria=[ended], **how,
        )  # fmt: skip

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
