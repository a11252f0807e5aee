"""A continuation while it is written: its tokens, its text, and what ends it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from fedsim.data import pieces
from fedsim.errors import DataError
from fedsim.evaluate.generation import End, Output, Request


def ends(tokenizer: Any, settings: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's EOS, and those of the model's generation_config."""
    more = getattr(settings, "eos_token_id", None)
    ids = more if isinstance(more, list | tuple) else [more]
    return frozenset(int(i) for i in (tokenizer.eos_token_id, *ids) if i is not None)


def tokenise(tokenizer: Any, requests: Sequence[Request]) -> list[list[int]]:
    """Prompts as they begin a text: BOS once, where the tokenizer adds one, and no EOS behind.

    Raises DataError for one without tokens.
    """
    ids = [row for row, _ in pieces.read(tokenizer, [r.prompt for r in requests])]
    for request, row in zip(requests, ids, strict=True):
        if not row:
            raise DataError(
                "prompt", got=request.prompt, expected="at least one token to continue",
            )  # fmt: skip
    return ids


def before(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of some texts, or None where there is none of them."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)] if found else None


class Writing:
    """One request, token by token.

    Attributes:
        tokens: new ones so far, the one that ended it included.
        end: what ended it, or None.
    """

    def __init__(
        self, request: Request, decode: Callable[[list[int]], str], eos: Collection[int]
    ) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.end: End | None = None
        self._decode, self._eos = decode, eos

    def add(self, token: int) -> None:
        """Append a token and see whether it is the last."""
        request = self.request
        self.tokens.append(token)
        if token in self._eos:
            self.end = "eos"
        elif self._settled():
            return
        elif len(self.tokens) >= request.max_new:
            self.end = "length"

    def _settled(self) -> bool:
        stop, decided = self.request.stop, self.request.decided
        if not stop and decided is None:
            return False
        # The whole list, again and again: pieces of a character or of a word decode together.
        text = self._decode(self.tokens)
        if before(text, stop) is not None:
            self.end = "stop"
        # U+FFFD at the end may be a character that is not yet whole.
        elif decided is not None and not text.endswith("\ufffd") and decided(text):
            self.end = "decided"
        return self.end is not None

    def output(self) -> Output:
        """What was written."""
        assert self.end is not None
        text = self._decode(self.tokens)
        cut = before(text, self.request.stop)
        return Output(text if cut is None else cut, tuple(self.tokens), self.end)
