"""The flat token store: every training example tokenised once, cached, memory-mapped.

An example is token ids plus the index where its labels begin; labels run to its end. Stores are
keyed by content (texts, tokenizer, protocol, length limit), so a changed input never meets an
old cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.domains import PROMPT, RESPONSE_MARK
from fedsim.errors import DataError

_FORMAT = "5"  # raise when the meaning of the stored arrays changes


@dataclass(frozen=True)
class TokenStore:
    """Examples as one flat array.

    Attributes:
        ids: (tokens,) int32, memory-mapped.
        offsets: (E + 1,) int64.
        label_start: (E,) int32; equal to the length when the example has no labels.
        unlabelled: examples without labels.
    """

    ids: np.ndarray
    offsets: np.ndarray
    label_start: np.ndarray

    def __len__(self) -> int:
        return len(self.label_start)

    def of(self, example: int) -> np.ndarray:
        """Token ids of one example."""
        return self.ids[self.offsets[example] : self.offsets[example + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def unlabelled(self) -> int:
        return int((self.label_start >= self.lengths).sum())


def cache_root() -> Path:
    """Where fedsim keeps what can be made again: FEDSIM_CACHE or ~/.cache/fedsim."""
    return Path(os.environ.get("FEDSIM_CACHE") or Path.home() / ".cache" / "fedsim")


def encode(tokenizer: Any, texts: Sequence[str], start: int) -> list[tuple[list[int], int]]:
    """Tokenise whole texts, and say where the answers that begin at character `start` begin.

    The answer's tokens are those that end after its first character: tokenising prompt and answer
    apart would write the boundary differently from how the model reads it.

    Returns:
        (ids, index of the answer's first token) of each text.
    """
    batch = tokenizer(list(texts), return_offsets_mapping=True)
    out = []
    for ids, spans in zip(batch["input_ids"], batch["offset_mapping"], strict=True):
        after = (i for i, (a, b) in enumerate(spans) if b > start and b > a)
        out.append((ids, next(after, len(ids))))
    return out


def training_text(instruction: str, response: str) -> str:
    """FlowerTune's training text."""
    return PROMPT.format(instruction=instruction) + f" {response}"


def mark_ids(tokenizer: Any) -> list[int]:
    """The response mark as this tokenizer writes it in a training text."""
    text = training_text("An instruction.", "an answer")
    start = text.rfind(RESPONSE_MARK)
    end = start + len(RESPONSE_MARK)
    encoded = tokenizer(text, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [token for token, (a, b) in pairs if a < end and b > start and b > a]


def label_start(ids: Sequence[int], mark: Sequence[int]) -> int:
    """The index after the *last* occurrence of the mark's tokens; len(ids) when there is none.

    As under the leaderboard's collator: a response that quotes the mark loses what precedes it,
    and a mark lost to truncation leaves no labels, or those after an earlier one.
    """
    n = len(mark)
    for i in range(len(ids) - n, -1, -1):
        if list(ids[i : i + n]) == list(mark):
            return i + n
    return len(ids)


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
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    *,
    protocol: str,
    max_length: int,
    digest: str,
) -> TokenStore:
    """The store of (instruction, response) pairs, from the cache when it is there.

    Args:
        protocol: "flowertune" adds no EOS (its collator masks it); "fedsim" trains it.
        digest: content hash of the rows and of how they became pairs.

    Raises:
        DataError: not one example has a label left.
    """
    tokens = json.loads(tokenizer.backend_tokenizer.to_str())
    for volatile in ("truncation", "padding"):  # state of the last call, not of the tokenizer
        tokens.pop(volatile, None)
    key = _key([_FORMAT, digest, json.dumps(tokens), protocol, str(max_length)])
    folder = cache_root() / "tokens" / key
    names = ("ids", "offsets", "label_start")
    if not folder.is_dir():
        mark, end = mark_ids(tokenizer), [tokenizer.eos_token_id] * (protocol == "fedsim")
        texts = [training_text(*pair) for pair in pairs]
        rows = [(ids + end)[:max_length] for ids in tokenizer(texts)["input_ids"]]
        encoded = [(ids, label_start(ids, mark)) for ids in rows]
        lengths = np.array([len(ids) for ids, _ in encoded], dtype=np.int64)
        arrays = {
            "ids": np.concatenate([np.array(ids, dtype=np.int32) for ids, _ in encoded]),
            "offsets": np.concatenate([[0], np.cumsum(lengths)]),
            "label_start": np.array([start for _, start in encoded], dtype=np.int32),
        }
        _write(folder, arrays)
    loaded = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in names]
    store = TokenStore(*loaded)
    if store.unlabelled == len(store):
        raise DataError(
            f"no training example has a label left after truncation to {max_length} tokens",
            expected="prompts shorter than data.max_length",
            remedy="Raise data.max_length.",
        )
    return store
