"""A text in pieces: whoever makes it knows which are trained, and nobody looks for that in tokens.

A text is tokenised whole, because a model reads it whole: pieces tokenised apart would be other
tokens at their borders. Its tokens find their pieces by the characters that they were made of.

One rule, in training and in evaluation: a token that holds a character of a trained piece is
trained. So no character of an answer is left without a loss, however a tokenizer merges it with
what stands before ("e:▁ne" of "Response: neutral"); the price is that such a token's other
characters are trained as well. The first token of all is never trained: nothing predicts it.

What a tokenizer puts before a text (BOS) stands before it once, also where the text brings its own;
what it would put behind (EOS) never does: a prompt goes on. A finished text ends with the EOS that
generation stops at, once; it is trained if the last piece is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedsim.errors import ModelError

Piece = tuple[str, bool]  # a text, and whether it is trained
Offsets = list[tuple[int, int]]  # first character and end of each token


def whole(pieces: Sequence[Piece]) -> str:
    """The text."""
    return "".join(text for text, _ in pieces)


def spans(pieces: Sequence[Piece]) -> Offsets:
    """First character and end of every trained piece."""
    found, at = [], 0
    for text, trained in pieces:
        if trained and text:
            found.append((at, at + len(text)))
        at += len(text)
    return found


def before(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    added = [*found["special_tokens_mask"], 0].index(0)
    ids: list[int] = found["input_ids"][:added]
    return ids


def read(tokenizer: Any, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
    """The tokens of whole texts, begun and not ended, with their characters.

    Raises:
        ModelError: this tokenizer does not know a token's characters.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"tokenizer {getattr(tokenizer, 'name_or_path', '')!r}", got=type(tokenizer).__name__,
            expected="a fast tokenizer, which knows the characters of each token",
            remedy="Store the model's tokenizer.json beside its weights.",
        )  # fmt: skip
    bos = before(tokenizer)
    batch = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True)
    out = []
    for ids, offsets in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
        new = [] if ids[: len(bos)] == bos else bos
        out.append(([*new, *ids], [(0, 0)] * len(new) + offsets))
    return out


def label(
    tokenizer: Any, texts: Sequence[Sequence[Piece]], *, eos: int | None = None
) -> list[tuple[list[int], np.ndarray]]:
    """Tokens of each text, and which of them are trained, (tokens,) bool.

    Args:
        eos: ends each text; None: the texts go on.
    """
    out = []
    read_ = read(tokenizer, [whole(pieces) for pieces in texts])
    for pieces, (ids, offsets) in zip(texts, read_, strict=True):
        mask = _within(offsets, spans(pieces))
        if eos is not None and ids[-1:] != [eos]:
            ids, mask = [*ids, eos], np.append(mask, pieces[-1][1])
        mask[:1] = False
        out.append((ids, mask))
    return out


def _within(offsets: Offsets, found: Offsets) -> np.ndarray:
    """Which tokens hold a character of these spans."""
    begin, end = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    # A tokenizer that trims spaces reports one alone as nothing, behind its only character.
    begin = np.minimum(begin, end - 1)
    out = np.zeros(len(offsets), dtype=bool)
    for first, last in found:
        out |= (begin < last) & (end > first)
    return out
