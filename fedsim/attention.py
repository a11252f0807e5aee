"""Packed attention as transformers calls attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedsim.cache import Cache
from fedsim.errors import ModelError
from fedsim_kernels.packed_attention import packed_attention
from fedsim_kernels.segments import Segments

# Arguments that transformers hands to every attention function and that change nothing here:
# positions are already in q and k, the cache is our own, dropout is refused at load.
_HARMLESS = {"position_ids", "use_cache", "cache_position", "output_attentions", "is_causal",
             "num_items_in_batch", "position_embeddings"}  # fmt: skip


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    cache: Cache | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface -> packed attention; what it does not know raises.

    A cache keeps the pass's keys and values; where the pass has one new row of each sequence, it
    also attends.
    """
    unknown = {k: v for k, v in rest.items() if k not in _HARMLESS and v is not None}
    if segments is None or attention_mask is not None or unknown or dropout:
        raise ModelError(
            f"{type(module).__name__} called packed attention with "
            + (f"the unknown arguments {sorted(unknown)}" if unknown else
               f"dropout {dropout}" if dropout else
               "no segments" if segments is None else "a mask"),
            expected="packed segments and arguments that fedsim computes",
            remedy="This architecture is not supported.",
        )  # fmt: skip
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if cache is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        cache.keep(layer, k, v)
        if cache.steps:
            return cache.attend(layer, q, scale=scale, window=sliding_window, softcap=softcap)[
                None
            ], None
    # A copy, so that the product of all three, of which v is a part, can go: q and k are already
    # rotated copies, and it would live until the backward (8 % of SmolLM2's activations).
    v = v.contiguous()
    out = packed_attention(
        q, k, v, segments.tables(query.device), scale=scale, window=sliding_window, softcap=softcap
    )
    return out[None], None
