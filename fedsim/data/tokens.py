"""The flat token store: every training example tokenised once, cached, memory-mapped.

Stores are keyed by content (texts, tokenizer, protocol, length limit), so a changed input never
meets an old cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.data import pieces
from fedsim.data.pieces import Piece
from fedsim.domains import PROMPT, RESPONSE_MARK

_FORMAT = "6"  # raise when the meaning of the stored arrays changes


def _none() -> np.ndarray:
    return np.zeros(0, dtype=bool)


@dataclass(frozen=True)
class TokenStore:
    """Examples as one flat array.

    Attributes:
        ids: (tokens,) int32, memory-mapped.
        offsets: (E + 1,) int64.
        trained: (tokens,) bool, which tokens have a loss; never an example's first.
        cut: (E,) bool, those that lost tokens at data.max_length.
        unmarked: (E,) bool, those in whose whole text the response mark was sought and not found.
    """

    ids: np.ndarray
    offsets: np.ndarray
    trained: np.ndarray
    cut: np.ndarray = field(default_factory=_none)
    unmarked: np.ndarray = field(default_factory=_none)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, example: int) -> np.ndarray:
        """Token ids of one example."""
        return self.ids[self.offsets[example] : self.offsets[example + 1]]

    def spans(self, example: int) -> list[tuple[int, int]]:
        """First token and end of every run of trained tokens of one example."""
        mask = self.trained[self.offsets[example] : self.offsets[example + 1]]
        edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    @cached_property
    def lengths(self) -> np.ndarray:
        """(E,) int64."""
        return np.diff(self.offsets)

    @cached_property
    def labels(self) -> np.ndarray:
        """(E,) int64: trained tokens of each example."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.offsets])

    @cached_property
    def first(self) -> np.ndarray:
        """(E,) int64: the first trained token of each example; its length where there is none."""
        places = np.append(np.flatnonzero(self.trained), len(self.trained))
        found = places[np.searchsorted(places, self.offsets[:-1])] - self.offsets[:-1]
        return np.asarray(np.minimum(found, self.lengths))

    @property
    def unlabelled(self) -> int:
        """Examples without labels."""
        return int((self.labels == 0).sum())


def cache_root() -> Path:
    """Where fedsim keeps what can be made again: FEDSIM_CACHE or ~/.cache/fedsim."""
    return Path(os.environ.get("FEDSIM_CACHE") or Path.home() / ".cache" / "fedsim")


def training_text(instruction: str, response: str) -> list[Piece]:
    """FlowerTune's training text; what follows the response mark is trained."""
    return [(PROMPT.format(instruction=instruction), False), (f" {response}", True)]


def mark_ids(tokenizer: Any) -> list[int]:
    """The response mark as this tokenizer writes it in a training text."""
    text = pieces.whole(training_text("An instruction.", "an answer"))
    start = text.rfind(RESPONSE_MARK)
    end = start + len(RESPONSE_MARK)
    encoded = tokenizer(text, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (a, b) in pairs if a < end and b > start and b > a]


def after_mark(ids: Sequence[int], mark: Sequence[int]) -> int | None:
    """The index after the *last* occurrence of the mark's tokens; None where there is none."""
    n = len(mark)
    for i in range(len(ids) - n, -1, -1):
        if list(ids[i : i + n]) == list(mark):
            return i + n
    return None


@dataclass(frozen=True)
class Example:
    """One training example; see `TokenStore`."""

    ids: list[int]
    trained: np.ndarray
    cut: bool
    unmarked: bool = False


def own(tokenizer: Any, texts: Sequence[Sequence[Piece]], max_length: int) -> list[Example]:
    """Under protocol `fedsim`: trained are the pieces that say so, and EOS behind the last."""
    found = pieces.label(tokenizer, texts, eos=tokenizer.eos_token_id)
    return [Example(ids[:max_length], mask[:max_length], len(ids) > max_length)
            for ids, mask in found]  # fmt: skip


def official(tokenizer: Any, texts: Sequence[Sequence[Piece]], max_length: int) -> list[Example]:
    """Under protocol `flowertune`, as the leaderboard's collator does it, whatever the pieces say.

    Texts are tokenised as the tokenizer does it by itself, and cut. The mark's tokens are sought in
    what is left; trained is what follows the last of them: a response that quotes the mark loses
    what precedes it, and a mark that is cut off or merged with its neighbours leaves no labels, or
    those after an earlier one. EOS is the padding token there and never trained, wherever it is.
    """
    flat = [pieces.whole(text) for text in texts]
    rows = tokenizer(flat, truncation=True, max_length=max_length)["input_ids"]
    full = [i for i, ids in enumerate(rows) if len(ids) == max_length]
    wide = tokenizer([flat[i] for i in full])["input_ids"] if full else []
    uncut = dict(zip(full, wide, strict=True))
    mark, out = mark_ids(tokenizer), []
    for i, ids in enumerate(rows):
        whole, start = uncut.get(i, ids), after_mark(ids, mark)
        mask = np.arange(len(ids)) >= (len(ids) if start is None else start)
        mask &= np.array(ids) != tokenizer.eos_token_id
        out.append(Example(ids, mask, len(whole) > len(ids), after_mark(whole, mark) is None))
    return out


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _write(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        partial.replace(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.is_dir():  # another process may have finished the same store first
            raise


def build(
    texts: Sequence[Sequence[Piece]],
    tokenizer: Any,
    *,
    protocol: str,
    max_length: int,
    digest: str,
) -> TokenStore:
    """The store of training texts, from the cache when it is there.

    Args:
        protocol: "fedsim" or "flowertune": `own` or `official`.
        digest: content hash of the rows and of how they became texts.

    Raises:
        ModelError: the tokenizer does not know its tokens' characters.
    """
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("truncation", "padding"):  # state of the last call, not of the tokenizer
        tokens.pop(volatile, None)
    eos = str(tokenizer.eos_token_id)  # it is not in the tokenizer's own file
    key = _key([_FORMAT, digest, json.dumps(tokens), eos, protocol, str(max_length)])
    folder = cache_root() / "tokens" / key
    names = ("ids", "offsets", "trained", "cut", "unmarked")
    if not folder.is_dir():
        make = own if protocol == "fedsim" else official
        examples = make(tokenizer, texts, max_length)
        ends = np.cumsum([len(e.ids) for e in examples], dtype=np.int64)
        _write(folder, {
            "ids": np.concatenate([np.array(e.ids, dtype=np.int32) for e in examples]),
            "offsets": np.concatenate([[0], ends]),
            "trained": np.concatenate([e.trained for e in examples]),
            "cut": np.array([e.cut for e in examples]),
            "unmarked": np.array([e.unmarked for e in examples]),
        })  # fmt: skip
    return TokenStore(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))
