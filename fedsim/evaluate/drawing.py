"""The next token: the most probable one, or a draw that nobody else's text can change.

    z' = z m          at tokens that the text holds: m = penalty where z < 0, else 1 / penalty
    p = softmax(z' / temperature) over the top_k largest; kept while those before sum to < top_p
    token = the first whose cumulated p reaches u sum(p)

in the order of the vocabulary, with u of (seed, request, position) alone. Penalty, then
temperature, top_k and top_p, in transformers' order; tokens that tie with the last kept one are
kept as well.

Papers: Keskar et al., CTRL, arXiv:1909.05858 (penalty); Holtzman et al., arXiv:1904.09751 (top_p).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim import seeds
from fedsim.batch import on_device
from fedsim.errors import ModelError
from fedsim.evaluate.generation import Sampling

# What a model's generation_config may ask for and only transformers computes, with the value that
# asks for nothing.
_FOREIGN: dict[str, Any] = {
    "no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0, "bad_words_ids": None,
    "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": 1,
    "exponential_decay_length_penalty": None, "num_beams": 1, "watermarking_config": None,
}  # fmt: skip
_FOREIGN_SAMPLING = {"min_p": 0, "top_h": 1, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}


class Drawing:
    """Chooses tokens as the call's sampling and the model's own generation_config ask."""

    def __init__(self, settings: Any, sampling: Sampling) -> None:
        """Raises ModelError when the model's settings ask for what only transformers computes."""
        known = _FOREIGN | (_FOREIGN_SAMPLING if sampling.temperature else {})
        for name, neutral in known.items():
            if (value := getattr(settings, name, None)) is not None and value != neutral:
                raise ModelError(
                    f"the model's generation_config: {name}", got=value, expected=str(neutral),
                    remedy="Evaluate this model with --backend transformers.",
                )  # fmt: skip
        self._penalty = float(getattr(settings, "repetition_penalty", None) or 1.0)
        self._sampling, self._key = sampling, seeds.run_key(sampling.seed)

    def __call__(
        self, z: Tensor, requests: Sequence[int], texts: Sequence[Sequence[Any]]
    ) -> list[int]:
        """One token a row, -1 where a logit is not a number.

        Args:
            z: (n, V) fp32 logits; overwritten.
            requests: (n,) what a draw is keyed by, besides seed and position.
            texts: (n,) prompt and continuation of each, token by token.
        """
        if self._penalty != 1:
            self._penalise(z, texts)
        finite, best = z.max(-1)
        if self._sampling.temperature:
            where = np.array([sum(map(len, text)) for text in texts])
            u = seeds.token_uniform(self._key, np.array(requests), where)
            best = self._draw(z, on_device(u.numpy(), z.device, u.dtype))
        # One transfer: the only time that a step waits for the device.
        chosen: list[int] = torch.where(finite.isfinite(), best, -1).tolist()
        return chosen

    def _penalise(self, z: Tensor, texts: Sequence[Sequence[Any]]) -> None:
        counts = [sum(map(len, text)) for text in texts]
        rows = np.repeat(np.arange(len(texts)), counts)
        ids = np.fromiter(chain.from_iterable(chain.from_iterable(texts)), np.int64, sum(counts))
        at = tuple(on_device(np.stack([rows, ids]), z.device))
        z[at] = torch.where(z[at] < 0, z[at] * self._penalty, z[at] / self._penalty)

    def _draw(self, z: Tensor, u: Tensor) -> Tensor:
        top_k, top_p = self._sampling.top_k, self._sampling.top_p
        z = z / self._sampling.temperature
        if 0 < top_k < z.shape[1]:
            z = z.masked_fill(z < z.topk(top_k).values[:, -1:], -torch.inf)
        p = torch.softmax(z, -1)
        if top_p < 1:
            p = torch.where(p >= smallest_kept(p, top_p), p, 0)
        total = p.cumsum(-1, dtype=torch.float64)
        # u > 0 and u < 1, so a token of probability 0 is never reached.
        return torch.searchsorted(total, u[:, None] * total[:, -1:])[:, 0]


def smallest_kept(p: Tensor, top_p: float) -> Tensor:
    """(n, V) probabilities -> (n, 1) the smallest one that top_p keeps.

    On a CPU the largest 256 are tried first: sorting 32 rows of 49,152 takes longer than half a
    step of SmolLM2-135M. A device would have to be waited for, so there all are sorted.
    """
    width = p.shape[1] if p.is_cuda else min(256, p.shape[1])
    while True:
        top = p.topk(width).values
        before = top.cumsum(-1) - top
        if width == p.shape[1] or bool((before[:, -1] >= top_p).all()):
            last = (before < top_p).sum(-1, keepdim=True) - 1
            return top.gather(1, last.clamp(min=0))
        width = min(8 * width, p.shape[1])
