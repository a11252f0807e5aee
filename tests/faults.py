"""Faults that a packed base could have, each planted where it would arise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedsim import attention, fused
from fedsim.batch import Packer
from fedsim.cache import Cache
from fedsim.lora import Site

Plant = Callable[[pytest.MonkeyPatch], None]


def attending(change: Callable[..., Any]) -> Plant:
    """The arguments of packed attention and of the cache's, changed."""
    packed, cached = attention.packed_attention, Cache.attend

    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(attention, "packed_attention", lambda *a, **k: packed(*a, **(k | change(k))))
        patch.setattr(Cache, "attend", lambda *a, **k: cached(*a, **(k | change(k))))

    return plant


def _a_row_of_another(patch: pytest.MonkeyPatch) -> None:
    """The pass's last row also sees the first one, of another client."""
    packed = attention.packed_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, tables: Any, **how: Any) -> Tensor:
        out = packed(q, k, v, tables, **how).clone()
        groups = q.shape[1] // k.shape[1]
        start, length, parent, _ = tables[1].tolist()[-1]
        if not start or parent >= 0:  # one sequence, or one whose prefix lies elsewhere
            return out
        at = [0, *range(start, start + length)]
        keys, values = (x[at].float().repeat_interleave(groups, 1) for x in (k, v))
        s = torch.einsum("hd,jhd->hj", q[at[-1]].float(), keys) * how["scale"]
        if how["softcap"]:
            s = torch.tanh(s / how["softcap"]) * how["softcap"]
        out[at[-1]] = torch.einsum("hj,jhd->hd", torch.softmax(s, -1), values).to(out.dtype)
        return out

    patch.setattr(attention, "packed_attention", attend)


def _another_key_head(patch: pytest.MonkeyPatch) -> None:
    """The first query head of the second group reads the first group's keys, and the other way."""
    packed = attention.packed_attention

    def attend(q: Tensor, k: Tensor, *rest: Any, **how: Any) -> Tensor:
        order = list(range(q.shape[1]))
        group = len(order) // k.shape[1]
        order[0], order[group] = order[group], order[0]
        return packed(q[:, order], k, *rest, **how)[:, order]

    patch.setattr(attention, "packed_attention", attend)


def _positions_go_on(patch: pytest.MonkeyPatch) -> None:
    sequence = Packer.sequence

    def on(self: Packer, ids: np.ndarray, number: int, position: int = 0, parent: int = -1) -> int:
        return sequence(self, ids, number, self.tokens, parent)

    patch.setattr(Packer, "sequence", on)


def _offset_lost(patch: pytest.MonkeyPatch) -> None:
    build = fused._fused_norm

    def without(norm: Any) -> Any:
        found = build(norm)
        if found is not None and not torch.equal(found.weight, norm.weight):
            found.weight.data -= 1
        return found

    patch.setattr(fused, "_fused_norm", without)


def _residual_lost(patch: pytest.MonkeyPatch) -> None:
    whole = fused._pre_norm

    def without(layer: Any, hidden: Tensor, labels: Any = None, **rest: Any) -> Tensor:
        if labels is None:
            return whole(layer, hidden, **rest)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **rest)
        rows = fused.take_rows((hidden + attended).squeeze(0), *labels)[None]
        out: Tensor = layer.mlp(layer.post_attention_layernorm(rows))
        return out

    patch.setattr(fused, "_pre_norm", without)


def _bias_dropped(patch: pytest.MonkeyPatch) -> None:
    build = Site.__init__

    def without(self: Site, linears: Any, *rest: Any) -> None:
        build(self, linears, *rest)
        if any(name.endswith("o_proj") for name in linears):
            self.bias = None

    patch.setattr(Site, "__init__", without)


def _cached_one_off(patch: pytest.MonkeyPatch) -> None:
    extend = Cache.extend
    patch.setattr(
        Cache, "extend", lambda self, slots, at, device: extend(self, slots, at - 1, device)
    )


def _cached_window(patch: pytest.MonkeyPatch) -> None:
    cached = Cache.attend
    patch.setattr(
        Cache, "attend", lambda *a, window, **k: cached(*a, window=window and window + 1, **k)
    )


# What is planted, and the tiny architecture that shows it
FAULTS: dict[str, tuple[Plant, str]] = {
    "a window that is one longer": (
        attending(lambda k: {"window": k["window"] + 1} if k["window"] else {}), "mistral"),
    "a window of the cache that is one longer": (_cached_window, "mistral"),
    "no soft-cap": (attending(lambda k: {"softcap": None}), "gemma2"),
    "a scale 1 % off": (attending(lambda k: {"scale": 1.01 * k["scale"]}), "llama"),
    "positions that do not restart": (_positions_go_on, "qwen2"),
    "a row of another sequence": (_a_row_of_another, "llama"),
    "an offset of norms lost": (_offset_lost, "gemma2"),
    "the last residual lost": (_residual_lost, "llama"),
    "another key head": (_another_key_head, "qwen3"),
    "no bias behind attention": (_bias_dropped, "biased"),
    "a place in the cache that is one off": (_cached_one_off, "phi3"),
}  # fmt: skip
