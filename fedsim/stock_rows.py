"""Rows that stock transformers' layers give for a text, each sequence by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedsim.batch import on_device
from fedsim.layerwise import (
    Call,
    around_in_fp32,
    few_of,
    in_fp32,
    input_of,
    layers_of,
    rounding,
    rows_of,
    stubs,
)
from fedsim.prefix import common_prefix

TEXTS = (
    "The central bank left its key interest rate unchanged on Thursday, and shares of lenders fell "
    "by 2.5 % within the hour.",
    "A nurse checks the patient's pulse twice a day.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "def area(radius, height):\n    return 2 * radius + height\n",
)
LENGTHS, LEAST = (24, 11, 16, 15), 6  # tokens of each, at most and at least
COLUMNS = 4096  # of the vocabulary, whose logits are compared
LAYERS, WEIGHTS = 12, 120_000_000  # that are compared, at most, beside one of each kind
SCORES = 2 << 30  # bytes of fp32 scores of a sequence that is longer than a window


def sequences(tokenizer: Any | None, vocabulary: int) -> tuple[np.ndarray, ...]:
    """Tokens of the texts, as the tokenizer gives them; counted ones, whose last two sequences
    begin alike, without a tokenizer or where it gives almost none."""
    if tokenizer is not None:
        whole = [np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in TEXTS]
        if min(map(len, whole)) >= LEAST:
            return tuple(ids[:n] for ids, n in zip(whole, LENGTHS, strict=True))
    return tuple((np.arange(n) * 7 + 3 * min(i, 2)) % vocabulary for i, n in enumerate(LENGTHS))


@dataclass
class Sheet:
    """Sequences, end to end in T rows, with the rows of stock transformers' layers.

    Attributes:
        inputs, exact, rounded: (T, D) of each layer that is checked.
        embedded: (T, D) fp32, what the first layer is given.
    """

    ids: tuple[np.ndarray, ...]
    inputs: dict[int, Tensor] = field(default_factory=dict)
    exact: dict[int, Tensor] = field(default_factory=dict)
    rounded: dict[int, Tensor] = field(default_factory=dict)
    embedded: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def first(self) -> np.ndarray:
        """First row of each sequence, and the end."""
        ends: np.ndarray = np.cumsum([0, *map(len, self.ids)])
        return ends


class StockRows:
    """Rows of stock transformers, noted while the model is still its own.

    Attributes:
        whole: all sequences as one.
        passed: what each layer that is not compared in fp32 was given and gave of it, (T, D).
        last, exact, rounded: last hidden states (T, D) of the third sequence, and its logits
            (T, columns).
    """

    @torch.no_grad()
    def __init__(self, model: Any, ids: tuple[np.ndarray, ...]) -> None:
        self.model, self.layers = model, layers_of(model)
        self.outputs = 0  # of a layer, where it gives a tuple
        self.head = model.get_output_embeddings()
        self.device, self.dtype = self.head.weight.device, self.head.weight.dtype
        v = len(self.head.weight)
        self.columns = torch.arange(0, v, -(-v // COLUMNS), device=self.device)
        short, numbers = Sheet(ids), few_of(self.layers, LAYERS, WEIGHTS)
        seen, gave = list[Tensor](), list[Tensor]()
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, *given: seen.append(input_of(*given)), with_kwargs=True
            )
            for layer in self.layers
        ]
        hooks += [
            layer.register_forward_hook(lambda _, arguments, out: gave.append(rows_of(out)))
            for layer in self.layers
        ]
        hooks.append(self.layers[0].register_forward_hook(self._note_outputs))
        self._run(np.concatenate(ids))
        for hook in hooks:
            hook.remove()
        shared = common_prefix(ids[2:], min(map(len, ids[2:])) - 1)
        one, other = (slice(a, a + shared) for a in short.first[2:4])
        for i in numbers:  # packed, the last two sequences share how they begin
            short.inputs[i] = seen[i].clone()
            short.inputs[i][other] = seen[i][one]
        self.whole = np.concatenate(ids)
        self.passed = {i: (x, y) for i, (x, y) in enumerate(zip(seen, gave)) if i not in numbers}
        self.sheets = [short, *self._longer(short)]
        for sheet in self.sheets:
            self._measure(sheet)
        self._measure_logits(short)

    def _note_outputs(self, layer: nn.Module, arguments: Any, out: Any) -> None:
        self.outputs = len(out) if isinstance(out, tuple) else 0

    def _run(self, ids: np.ndarray, *, head: bool = False) -> Any:
        model = self.model if head else getattr(self.model, self.model.base_model_prefix)
        return model(on_device(ids, self.device)[None], use_cache=False)

    def _longer(self, short: Sheet) -> Iterator[Sheet]:
        """A sequence longer than the window, where that is affordable, for a layer of each type."""
        text = self.model.config.get_text_config()
        window = getattr(text, "sliding_window", None) or 0
        n = window + 4
        scores = 12 * text.num_attention_heads * n * n  # scores, their softmax, and a mask
        if window and max(map(len, short.ids)) < n and scores <= SCORES:
            types = getattr(text, "layer_types", None) or [""] * len(self.layers)
            at = torch.arange(n, device=self.device) % (short.first[-1] - 1) + 1
            of = {types[i]: i for i in reversed(list(short.inputs))}
            yield Sheet((np.resize(np.concatenate(short.ids), n),),
                        {i: short.inputs[i][at] for i in of.values()})  # fmt: skip

    def _calls(self, ids: np.ndarray, *, wide: bool) -> list[Call]:
        """Calls of the layers for one sequence."""
        with stubs(self.layers, outputs=self.outputs) as calls, ExitStack() as block:
            if wide:
                block.enter_context(around_in_fp32(self.model, self.layers))
            self._run(ids)
        return calls

    def _measure(self, sheet: Sheet) -> None:
        """Exact and rounded rows of each layer, every sequence by itself."""
        narrow = self.dtype != torch.float32
        wide = [self._calls(ids, wide=True) for ids in sheet.ids]
        own = [self._calls(ids, wide=False) for ids in sheet.ids] if narrow else wide
        sheet.embedded = torch.cat([calls[0].hidden for calls in wide])
        lengths = [*map(len, sheet.ids)]
        for number, x in sheet.inputs.items():
            layer = self.layers[number]

            def rows(x: Tensor, calls: list[list[Call]], at: int = number) -> Tensor:
                every = zip(calls, x.split(lengths), strict=True)
                return torch.cat([one[at](self.layers[at], part) for one, part in every])

            if narrow:
                sheet.rounded[number] = rows(x, own).float()
            with in_fp32(layer.modules()):
                sheet.exact[number] = rows(x.float(), wide)
                if not narrow:
                    with rounding(layer):
                        sheet.rounded[number] = rows(x, wide)

    def _measure_logits(self, short: Sheet) -> None:
        part = slice(short.first[2], short.first[3])
        self.last = short.exact[len(self.layers) - 1][part].to(self.dtype)
        self.exact = self._logits(short.ids[2], self.last.float())
        narrow = self.dtype != torch.float32
        self.rounded = self._logits(
            short.ids[2], self.last if narrow else self.last.bfloat16().float()
        )

    def _logits(self, ids: np.ndarray, last: Tensor) -> Tensor:
        """Logits of some columns, from the last layer's rows, in their dtype."""
        bias = self.head.bias is not None
        few = nn.Linear(last.shape[1], len(self.columns), bias=bias, device=self.device)
        few = few.to(last.dtype).requires_grad_(False)
        few.weight.copy_(self.head.weight[self.columns])
        if bias:
            few.bias.copy_(self.head.bias[self.columns])
        name = next(n for n, m in self.model.named_modules() if m is self.head)
        parent, _, leaf = name.rpartition(".")
        owner = self.model.get_submodule(parent)
        with stubs(self.layers, last, outputs=self.outputs), ExitStack() as block:
            if last.dtype == torch.float32 != self.dtype:
                block.enter_context(around_in_fp32(self.model, self.layers))
            block.callback(setattr, owner, leaf, self.head)
            setattr(owner, leaf, few)
            found: Tensor = self._run(ids, head=True).logits[0].float()
        return found
