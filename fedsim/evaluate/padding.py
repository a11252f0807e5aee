"""What transformers' `generate` does with a padded prompt, as the finance script gives it some.

The script pads a batch on the tokenizer's own side, with its pad token, or with a new one, `[PAD]`,
where it has none or one that is also its EOS. On the left this changes nothing. On the right the
first new token is read off the row of the last pad token: a query at position 1 that sees the
prompt's keys and not its own, as padding is masked. From there on positions are those of an
unpadded prompt (n, n + 1, ...), and nobody sees the padding. So a padded prompt is an unpadded one
whose first token is drawn by one pad token that leaves no key.

That is transformers 4, which the leaderboard ran; positions come from the mask at every step. In
transformers 5 they go on from the last pad token's own, which is 0 there.

A new pad token's embedding is the mean of the others (transformers since 4.46, which adds noise of
3e-5 of their spread); its logit, their mean logit, is never the largest and is not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from fedsim.errors import ModelError

POSITION = 1  # of padding


def pad_token(tokenizer: Any) -> int:
    """The token that the finance script pads with."""
    if tokenizer.pad_token and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return int(tokenizer.pad_token_id)
    return int(tokenizer.get_vocab().get("[PAD]", len(tokenizer)))


def behind(tokenizer: Any) -> bool:
    """Padding stands behind the prompt, and so changes what is written."""
    return bool(tokenizer.padding_side == "right")


@contextmanager
def embedded(model: Any, token: int) -> Iterator[None]:
    """Lets a model without a row for this token embed it: by the mean of all rows."""
    module = model.get_input_embeddings()
    rows = len(module.weight)
    if token < rows:
        yield
        return
    forward, none = module.forward, torch.zeros(1, dtype=torch.int64, device=module.weight.device)
    mean = {"weight": module.weight.float().mean(0).to(module.weight.dtype).expand(rows, -1)}
    row = functional_call(module, mean, (none,))[0]  # by the module, which may scale it

    def extended(ids: Tensor) -> Tensor:
        found: Tensor = forward(ids.clamp(max=rows - 1))
        return torch.where((ids == token)[..., None], row, found)

    module.forward = extended
    try:
        yield
    finally:
        del module.forward


@contextmanager
def placed(model: Any) -> Iterator[None]:
    """Gives a stock model the positions that transformers 4 computes from the mask."""

    def place(_: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = given["attention_mask"]
        at = torch.where(mask == 0, POSITION, mask.cumsum(-1) - 1)
        return args, given | {"position_ids": at[:, -given["input_ids"].shape[1] :]}

    hook = model.register_forward_pre_hook(place, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def check_windows(hf: Any, longest: int) -> None:
    """Refuse padding within a window of attention: it counts padding, which is not kept here.
    Raises ModelError."""
    window = getattr(hf.get_text_config(), "sliding_window", None) or longest
    if window < longest:
        raise ModelError(
            "padded prompts with the model's sliding_window", got=window,
            expected=f"at least {longest}, the padded prompt and its answer",
            remedy="Evaluate this model with --backend transformers.",
        )  # fmt: skip
