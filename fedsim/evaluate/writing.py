"""A continuation while it is written: its tokens, its text, and what ends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedsim.data import pieces
from fedsim.errors import DataError
from fedsim.evaluate.generation import End, Output, Request


def ends(tokenizer: Any, settings: Any) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's EOS, and those of the model's generation_config."""
    more = getattr(settings, "eos_token_id", None)
    ids = more if isinstance(more, list | tuple) else [more]
    return frozenset(int(i) for i in (tokenizer.eos_token_id, *ids) if i is not None)


def tokenise(tokenizer: Any, requests: Sequence[Request], model: Any = None) -> list[list[int]]:
    """Prompts as they begin a text: BOS once, where the tokenizer adds one, and no EOS behind.

    Args:
        model: that reads them, if it is at hand.

    Raises:
        DataError: one has no tokens, or one that the model's embedding lacks.
    """
    size = model.get_input_embeddings().num_embeddings if model is not None else 1 << 31
    ids = [row for row, _ in pieces.read(tokenizer, [r.prompt for r in requests])]
    for request, row in zip(requests, ids, strict=True):
        if not row:
            raise DataError(
                "prompt", got=request.prompt, expected="at least one token to continue",
            )  # fmt: skip
        if max(row) >= size:
            token = tokenizer.convert_ids_to_tokens(max(row))
            raise DataError(
                f"prompt {request.prompt[:80]!r}: token {token!r} has number {max(row)}",
                expected=f"one below {size:,}, the rows of the model's embedding",
                remedy="Use the tokenizer that the model came with.",
            )
    return ids


class Reader:
    """How tokens become text, and which of them end it."""

    def __init__(self, tokenizer: Any, settings: Any) -> None:
        """`settings`: the model's generation_config, or None."""
        self.tokenizer = tokenizer
        self.model_ends = ends(tokenizer, settings)

    def ends(self, request: Request) -> frozenset[int]:
        """The tokens that end this request's continuation."""
        return frozenset([self.tokenizer.eos_token_id]) if request.one_end else self.model_ends

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """Text with or without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=not special)
        return text

    def behind(self, prompt: Sequence[int], tokens: Sequence[int], length: int) -> str:
        """What the official harness takes for the continuation: prompt and tokens in one, special
        ones kept, less a first BOS and as many characters as the prompt was given in."""
        ids = [*prompt, *tokens]
        whole: str = self.tokenizer.decode(
            ids[ids[0] == self.tokenizer.bos_token_id :], skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
        return whole[length:]


def before(text: str, stop: Sequence[str]) -> str | None:
    """The text before the first of some texts, or None where there is none of them."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return text[: min(found)] if found else None


class Writing:
    """One request, token by token.

    Args:
        prompt: its tokens.

    Attributes:
        tokens: new ones so far, the one that ended it included.
        end: what ended it, or None.
    """

    def __init__(self, request: Request, prompt: Sequence[int], reader: Reader) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.end: End | None = None
        self._prompt, self._reader, self._ends = prompt, reader, reader.ends(request)

    def add(self, token: int) -> None:
        """Append a token and see whether it is the last."""
        request = self.request
        self.tokens.append(token)
        if token in self._ends:
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
        text = self._reader.decode(self.tokens, self.request.special)
        if before(text, stop) is not None:
            self.end = "stop"
        # U+FFFD at the end may be a character that is not yet whole.
        elif decided is not None and not text.endswith("\ufffd") and decided(text):
            self.end = "decided"
        return self.end is not None

    def output(self) -> Output:
        """What was written."""
        assert self.end is not None
        request, tokens, reader = self.request, self.tokens, self._reader
        text, mended = reader.decode(tokens), None
        if request.one_end or request.special:
            at = next((i for i, token in enumerate(tokens) if token in reader.model_ends), None)
            mended = self._cut(text if at is None else reader.decode(tokens[: at + 1]))
        if request.special:
            text = reader.behind(self._prompt, tokens, len(request.prompt))
        return Output(self._cut(text), tuple(tokens), self.end, mended=mended)

    def _cut(self, text: str) -> str:
        found = before(text, self.request.stop)
        return text if found is None else found
