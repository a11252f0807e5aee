"""Our own backend: many adapters in one pass, no padding, no token computed twice.

Prompts are computed in packed passes (`prefill.py`); the log-probabilities of choices that are one
token are read off their last rows. Then every live sequence has one row a pass, rows of an adapter
adjacent, and its keys and values in a cache (`cache.py`); a padded prompt has the first of these
rows for its pad token (`padding.py`). A sequence leaves at an EOS, a stop text, when it is decided,
or at its last token; others take its place. Greedy text is that of
transformers' `generate` under stock PEFT, up to ties within rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import config
from fedsim.batch import on_device
from fedsim.cache import Cache
from fedsim.errors import RunError
from fedsim.evaluate.choices import answer, question
from fedsim.evaluate.drawing import Drawing
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.loaded import Loaded, load
from fedsim.evaluate.padding import POSITION, behind, check_windows, embedded, pad_token
from fedsim.evaluate.prefill import Prompt, fitting, pack
from fedsim.evaluate.writing import Reader, Writing, tokenise
from fedsim.model import Base, check_config
from fedsim_kernels.segments import Segments

# Tokens in the cache at once: 1.5 GB for SmolLM2-135M in fp32, 4.3 GB for an 8B Llama in bf16.
CACHE_ROWS = 32_768
_PROMPTS = 256  # of one pass: its tree is built from a table of all pairs


@dataclass
class Live:
    """A sequence in the cache; its slot there is its place in the list of the live.

    Attributes:
        choices: tokens, where each choice is one; else empty.
        pads: what the prompt is padded with, as the text that repetitions are counted in; or ().
        padded: a pad token behind the prompt draws the first token.
    """

    prompt: Prompt
    writing: Writing
    choices: np.ndarray
    pads: tuple[int, ...] = ()
    padded: bool = False
    logprob: tuple[float, ...] = ()

    @property
    def most(self) -> int:
        """Tokens that it may write."""
        return self.writing.request.max_new

    @property
    def length(self) -> int:
        """Tokens so far; the last one is not yet in the cache."""
        return len(self.prompt.ids) + len(self.writing.tokens)

    @property
    def waits(self) -> bool:
        """The next row is its pad token's."""
        return self.padded and not self.writing.tokens


class Engine:
    """The shared base as a backend.

    Args:
        adapter: of the run whose rows are evaluated, for their scale.
        budget: packed tokens of one pass of prompts.
        cache_rows: tokens in the cache at once; as many sequences are live as have room for the
            call's longest, at least one.
    """

    name = "engine"
    ranks = True
    pads = True

    def __init__(
        self, base: Base, tokenizer: Any, adapter: config.Adapter, budget: int, *,
        cache_rows: int = CACHE_ROWS,
    ) -> None:  # fmt: skip
        self._base, self._tokenizer, self._adapter = base, tokenizer, adapter
        self._budget, self._cache_rows = budget, cache_rows
        self._settings = getattr(base.model, "generation_config", None)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        """One output a request, in order.

        Raises:
            ModelError: an adapter does not fit, or the model asks for what is not computed here
                (`padding.check_windows`).
            DataError: a prompt has no tokens.
            RunError: an adapter gives logits that are not finite.
        """
        if not requests:
            return []
        drawing = Drawing(self._settings, sampling)
        prompts = [
            Prompt(i, r.adapter, np.array(ids))
            for i, (r, ids) in enumerate(
                zip(requests, tokenise(self._tokenizer, requests, self._base.model), strict=True)
            )
        ]
        longest = max(len(p.ids) + r.max_new for p, r in zip(prompts, requests, strict=True))
        check_config(self._base.model.config, longest, "prompt and answer")
        reader = Reader(self._tokenizer, self._settings)
        all_ = [Live(p, Writing(r, p.ids.tolist(), reader), self._single(p, r))
                for p, r in zip(prompts, requests, strict=True)]  # fmt: skip
        pad = self._pad(all_)
        loaded = load(self._base, adapters, self._adapter)
        call = _Call(self._base, loaded, drawing, [a.name for a in adapters], self._budget, pad)
        # Long ones first, so that those who are live together are about as long.
        order = sorted(all_, key=lambda s: (s.prompt.adapter, -len(s.prompt.ids) - s.most))
        try:
            with embedded(self._base.model, pad) if pad >= 0 else nullcontext():
                call.first_tokens(deque(s for s in order if s.most == 1 and not s.padded))
                call.write(deque(s for s in order if s.most > 1 or s.padded), longest,
                           self._cache_rows)  # fmt: skip
            self._rank(
                loaded, [s for s in order if len(s.choices) < len(s.writing.request.choices)]
            )
        finally:
            self._base.rest()
        return [replace(s.writing.output(), logprob=s.logprob) for s in all_]

    def _pad(self, all_: Sequence[Live]) -> int:
        """Mark the prompts that are shorter than they are padded to; the pad token, -1 if none."""
        short = [s for s in all_ if len(s.prompt.ids) < s.writing.request.padded]
        if not short:
            return -1
        pad, known = pad_token(self._tokenizer), len(self._base.head)
        for s in short:
            s.padded, s.pads = behind(self._tokenizer), (pad,) if pad < known else ()
        if behind(self._tokenizer):
            longest = max(s.writing.request.padded + s.most for s in short)
            check_windows(self._base.model.config, longest)
        return pad

    def _single(self, prompt: Prompt, request: Request) -> np.ndarray:
        """The choices as tokens that follow the prompt, where each is one; else nothing."""
        if not request.choices:
            return np.empty(0, dtype=np.int64)
        asked, n = question(self._tokenizer, request.prompt, request.choices), len(prompt.ids)
        single = all(len(c) == n + 1 and (c[:n] == prompt.ids).all() for c in asked.choices)
        return np.array([c[-1] for c in asked.choices] if single else [], dtype=np.int64)

    def _rank(self, loaded: Loaded, rest: Sequence[Live]) -> None:
        """Log-probabilities of choices of several tokens, in passes of their own."""
        for adapter, run in groupby(rest, key=lambda s: s.prompt.adapter):
            some = list(run)
            asked = [question(self._tokenizer, r.prompt, r.choices)
                     for r in (s.writing.request for s in some)]  # fmt: skip
            (found,) = answer(
                self._base, loaded.rows[adapter][None], loaded.scale[adapter][None], asked,
                self._budget,
            )  # fmt: skip
            for sequence, one in zip(some, found, strict=True):
                sequence.logprob = tuple(one.logprob.tolist())


class _Call:
    """One call of `generate`: what its passes share."""

    def __init__(
        self, base: Base, loaded: Loaded, drawing: Drawing, names: Sequence[str], budget: int,
        pad: int,
    ) -> None:  # fmt: skip
        self._base, self._loaded, self._drawing = base, loaded, drawing
        self._names, self._budget, self._pad = names, budget, pad
        self._rows: tuple[tuple[int, ...], Segments] = ((), Segments.build([], []))

    def first_tokens(self, waiting: deque[Live]) -> None:
        """Those that have one token to write: no cache."""
        while waiting:
            self._prefill(self._next(waiting, _PROMPTS), None, 0)

    def write(self, waiting: deque[Live], longest: int, cache_rows: int) -> None:
        """All others, as many at once as the cache has room for."""
        slots = min(len(waiting), max(1, cache_rows // longest))
        cache = Cache(slots, longest)
        live: list[Live] = []
        while waiting or live:
            # A pass of few prompts shares little and costs as much as many steps, so it waits until
            # a quarter of the slots is free, or enough for all who wait.
            free = slots - len(live)
            if waiting and (4 * free >= slots or free >= len(waiting)):
                group = self._next(waiting, min(free, _PROMPTS))
                self._prefill(group, cache, len(live))
                live += group
            else:
                self._step(live, cache)
            _leave(live, cache)

    def _next(self, waiting: deque[Live], most: int) -> list[Live]:
        n = len(fitting((s.prompt for s in waiting), self._budget, most))
        return [waiting.popleft() for _ in range(n)]

    def _prefill(self, group: Sequence[Live], cache: Cache | None, first: int) -> None:
        """Compute prompts and write the first token of each that no pad token draws; keep them
        from slot `first` on."""
        base = self._base
        filled = pack([s.prompt for s in group], self._loaded.ranks, base.device)
        batch = filled.batch
        if cache is not None:
            rows, prompts, positions = filled.kept
            cache.fill(rows, prompts + first, positions)
        work = self._loaded.work(base, batch.segments, batch.label_rows, batch.label_segments)
        hidden = base.hidden(batch.input_ids, batch.position_ids, work, cache)
        ready = [at for at, i in enumerate(filled.order) if not group[i].padded]
        if not ready:
            return
        if len(ready) < len(group):
            hidden = hidden[on_device(np.array(ready), base.device)]
        rows, z = [group[filled.order[at]] for at in ready], base.logits(hidden)
        self._read_choices(rows, z)
        self._add(rows, z)

    def _step(self, live: Sequence[Live], cache: Cache) -> None:
        """Write one more token of every sequence."""
        base = self._base
        slots = np.argsort([s.prompt.adapter for s in live], kind="stable")
        rows = [live[i] for i in slots]
        waits = np.array([s.waits for s in rows])
        # A pad token's key lies where the first token's will, which is written over it.
        places = np.array([s.length for s in rows]) - ~waits
        cache.extend(slots, places, base.device, unseen=waits if waits.any() else None)
        tokens = [self._pad if s.waits else s.writing.tokens[-1] for s in rows]
        ids, at = on_device(np.stack([tokens, np.where(waits, POSITION, places)]), base.device)
        work = self._loaded.work(base, self._segments([s.prompt.adapter for s in rows]))
        self._add(rows, base.logits(base.hidden(ids, at, work, cache)))

    def _segments(self, adapters: Sequence[int]) -> Segments:
        """One row a sequence; they do not meet in attention, so an adapter's are one segment."""
        if self._rows[0] != (key := tuple(adapters)):
            spans = [(slot, len(list(rows))) for slot, rows in groupby(adapters)]
            slots, lengths = zip(*spans, strict=True)
            self._rows = key, Segments.build(lengths, slots, ranks=self._loaded.ranks)
        return self._rows[1]

    def _read_choices(self, rows: Sequence[Live], z: Tensor) -> None:
        """Log-probabilities of the choices that are one token: no row of their own is needed."""
        counts = np.array([len(s.choices) for s in rows])
        if not counts.any():
            return
        row = on_device(np.repeat(np.arange(len(rows)), counts), z.device)
        token = on_device(np.concatenate([s.choices for s in rows]), z.device)
        found = (z[row, token] - torch.logsumexp(z, -1)[row]).double().cpu().numpy()
        for sequence, values in zip(rows, np.split(found, counts.cumsum()[:-1]), strict=True):
            sequence.logprob = tuple(values.tolist())

    def _add(self, rows: Sequence[Live], z: Tensor) -> None:
        """Choose each one's next token; the logits z (n, V) are overwritten."""
        chosen = self._drawing(
            z, [s.prompt.request for s in rows],
            [(s.prompt.ids, s.pads, s.writing.tokens) for s in rows],
        )  # fmt: skip
        for sequence, token in zip(rows, chosen, strict=True):
            if token < 0:
                raise RunError(
                    f"adapter {self._names[sequence.prompt.adapter]!r} gives logits that are not "
                    "finite", expected="numbers", remedy="Leave it out of the evaluation.",
                )  # fmt: skip
            sequence.writing.add(token)


def _leave(live: list[Live], cache: Cache) -> None:
    """Take out what has ended; the last one fills the hole."""
    for slot in reversed(range(len(live))):
        if live[slot].writing.end is not None:
            last = live.pop()
            if slot < len(live):
                live[slot] = last
                cache.move(len(live), slot, last.length)
