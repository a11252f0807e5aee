"""Fast tokenizers whose tokens can be counted by eye."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def _of(split: Any, side: str) -> Any:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    raw.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="<eos>", padding_side=side
    )


def words(side: str = "right") -> Any:
    """One token a word, padded on this side."""
    return _of(pre_tokenizers.WhitespaceSplit(), side)


def letters() -> Any:
    """One token a character."""
    return _of(pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated"), "right")
