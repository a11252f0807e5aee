"""What every backend takes and gives: texts to continue, and their continuations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Adapter:
    """One adapter to evaluate: in PEFT's format, or as a row of the run that trains it.

    Attributes:
        folder: in PEFT's format, or None for the bare base, or where there is only a row.
        row: (P,) fp32 in the engine's layout, or None.
        scale: alpha / rank of the row, or None where it is the run's own; a folder says its own.
        subject: what its results belong to, by content; "" within the run that trains it.
        no_op: it is known to change nothing.
    """

    name: str
    folder: Path | None = None
    row: Tensor | None = None
    scale: float | None = None
    subject: str = ""
    no_op: bool = False


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        adapter: index among the adapters of the call.
        max_new: most new tokens, at least 1.
        stop: the continuation ends before the first of these texts.
        decided: continuation so far -> True once nothing further matters; then it may end early.
        choices: answers whose log-probabilities are wanted as well, of a backend that ranks.
        padded: tokens that a shorter prompt is padded to, of a backend that pads (`padding.py`).
        one_end: only the tokenizer's own EOS ends the continuation.
        special: special tokens stay in the text, which is read behind the prompt as the official
            harness reads it: cut out of the whole by the prompt's length, less a first BOS.
    """

    prompt: str
    adapter: int
    max_new: int
    stop: tuple[str, ...] = ()
    decided: Callable[[str], bool] | None = None
    choices: tuple[str, ...] = ()
    padded: int = 0
    one_end: bool = False
    special: bool = False


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def own_sampling(folder: Path) -> Sampling:
    """How the model's own generation_config.json draws tokens; greedy where it says nothing."""
    path = folder / "generation_config.json"
    given = json.loads(path.read_text()) if path.is_file() else {}
    if not given.get("do_sample"):
        return Sampling()
    return Sampling(
        float(given.get("temperature") or 1.0), float(given.get("top_p") or 1.0),
        int(given.get("top_k", 50) or 0),  # transformers' own default is 50
    )  # fmt: skip


End = Literal["eos", "stop", "length", "decided"]


@dataclass(frozen=True)
class Output:
    """A continuation: special tokens left out of the text, which ends before a stop text.

    Attributes:
        text: by the rules of the request.
        tokens: all that were written, with the one that ended the text.
        logprob: of each of the request's choices, after the prompt and a space; () without any,
            and from a backend that does not rank.
        mended: what a request without `one_end` and `special` reads in these tokens, or None where
            it has neither.
    """

    text: str
    tokens: tuple[int, ...]
    end: End
    logprob: tuple[float, ...] = ()
    mended: str | None = None

    @property
    def plain(self) -> str:
        """The text by the rules of every other request."""
        return self.text if self.mended is None else self.mended


class Backend(Protocol):
    """Continues texts under many adapters in one call.

    Attributes:
        ranks: its outputs have the log-probabilities of the requests' choices.
        pads: it continues a padded prompt as transformers does.
    """

    name: str
    ranks: bool
    pads: bool

    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        """One output a request, in order. Raises FedSimError, never returns less."""
        ...
