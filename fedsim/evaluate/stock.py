"""The plain reference: transformers' `generate` under stock PEFT, one adapter after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fedsim import peft_io, pretrained
from fedsim.config import Config
from fedsim.core import pick_device
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.padding import behind, pad_token, placed
from fedsim.evaluate.writing import Reader, Writing, tokenise
from fedsim.weights import Weights


class Stock:
    """A causal LM as transformers loads it; 4-bit bases have their values, not their memory.

    Args:
        batch: prompts of one call of `generate`; in a batch, the shorter ones are padded on the
            left, where it changes nothing. Prompts whose request says so are padded alone.
    """

    name = "transformers"
    ranks = False
    pads = True

    def __init__(self, weights: Weights, tokenizer: Any, config: Config, *, batch: int = 1) -> None:
        self._model = pretrained.stock(weights, config, pick_device(config.run.device)).eval()
        self._tokenizer, self._batch = tokenizer, batch
        self._reader = Reader(tokenizer, self._model.generation_config)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        """One output a request, in order; draws are torch's, from `sampling.seed`.

        Raises:
            ModelError: an adapter has no folder, or PEFT cannot load it.
            DataError: a prompt has no tokens.
        """
        ids = tokenise(self._tokenizer, requests, self._model)
        writings = [Writing(r, i, self._reader) for r, i in zip(requests, ids, strict=True)]
        short = [len(i) < r.padded for r, i in zip(requests, ids, strict=True)]
        if any(short):
            self._add_row(pad_token(self._tokenizer))
        with torch.random.fork_rng():
            torch.manual_seed(sampling.seed)
            for number, adapter in enumerate(adapters):
                mine = [i for i, request in enumerate(requests) if request.adapter == number]
                lm = self._under(adapter)
                plain = [i for i in mine if not short[i]]
                batches = [plain[n : n + self._batch] for n in range(0, len(plain), self._batch)]
                for batch in (*batches, *([i] for i in mine if short[i])):
                    self._continue(lm, [ids[i] for i in batch], [writings[i] for i in batch],
                                   sampling)  # fmt: skip
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

    def _add_row(self, token: int) -> None:
        """Give the model this token, if it has none: in both matrices the mean of all rows."""
        rows = len(self._model.get_input_embeddings().weight)
        if token >= rows:
            self._model.resize_token_embeddings(token + 1, mean_resizing=False)
            for module in (self._model.get_input_embeddings(), self._model.get_output_embeddings()):
                module.weight[rows:] = module.weight[:rows].float().mean(0)

    def _continue(
        self, lm: Any, ids: list[list[int]], writings: list[Writing], sampling: Sampling
    ) -> None:
        """Let transformers write; every token that it writes is added to its writing."""

        def ended(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            for writing, token in zip(writings, input_ids[:, -1].tolist(), strict=True):
                if writing.end is None:
                    writing.add(token)
            done = [writing.end is not None for writing in writings]
            return torch.tensor(done, device=input_ids.device)

        asked = writings[0].request
        wide, own = max(map(len, ids)), asked.padded > len(ids[0])
        pad = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        right = own and behind(self._tokenizer)
        if own:
            wide, pad = asked.padded, pad_token(self._tokenizer)
        gaps = [[pad] * (wide - len(row)) for row in ids]
        rows = [row + gap if right else gap + row for row, gap in zip(ids, gaps, strict=True)]
        real = [[1] * len(row) for row in ids]
        mask = [m + [0] * len(g) if right else [0] * len(g) + m
                for m, g in zip(real, gaps, strict=True)]  # fmt: skip
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {"do_sample": True, "temperature": sampling.temperature,
                   "top_p": sampling.top_p, "top_k": sampling.top_k}  # fmt: skip
        with placed(self._model) if right else nullcontext():
            lm.generate(
                input_ids=torch.tensor(rows, device=lm.device),
                attention_mask=torch.tensor(mask, device=lm.device),
                max_new_tokens=max(w.request.max_new for w in writings),
                eos_token_id=sorted(self._reader.ends(asked)), pad_token_id=pad,
                stopping_criteria=[ended], **how,
            )  # fmt: skip
