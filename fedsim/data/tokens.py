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

from fedsim.config import Config
from fedsim.data.sources import Rows
from fedsim.domains import PROMPT, RESPONSE_MARK, Domain
from fedsim.errors import DataError

_FORMAT = "1"  # raise when the meaning of the stored arrays changes


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


def encode(
    tokenizer: Any, texts: Sequence[str], starts: Sequence[int], max_length: int, eos: bool
) -> list[tuple[list[int], int]]:
    """Tokenise whole texts; say where the answer that starts at character `start` begins.

    The answer's tokens are those that end after the start: tokenising prompt and answer apart
    would write the boundary differently from how the model reads it. Truncation keeps the first
    `max_length` tokens.

    Returns:
        (ids, label_start) of each text; label_start == len(ids) when no label is left.
    """
    batch = tokenizer(list(texts), return_offsets_mapping=True)
    out = []
    for ids, spans, start in zip(batch["input_ids"], batch["offset_mapping"], starts, strict=True):
        first = next((i for i, (a, b) in enumerate(spans) if b > start and b > a), len(ids))
        if eos:
            ids = [*ids, tokenizer.eos_token_id]
        out.append((ids[:max_length], min(first, max_length)))
    return out


def training_text(instruction: str, response: str) -> tuple[str, int]:
    """FlowerTune's training text, and the character where its labels begin.

    The labels begin after the *last* response mark of the text, wherever it stands: a response
    that quotes the mark loses what precedes it, as under the leaderboard's own collator.
    """
    text = PROMPT.format(instruction=instruction) + f" {response}"
    return text, text.rfind(RESPONSE_MARK) + len(RESPONSE_MARK)


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
        texts, starts = zip(*(training_text(*pair) for pair in pairs), strict=True)
        encoded = encode(tokenizer, texts, starts, max_length, eos=protocol == "fedsim")
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


def training_store(rows: Rows, domain: Domain, tokenizer: Any, config: Config) -> TokenStore:
    """The store of a run's training rows."""
    pairs = [domain.pair(row) for row in rows.rows[: config.data.limit]]
    return build(
        pairs, tokenizer, protocol=config.run.protocol, max_length=config.data.max_length,
        digest=f"{rows.digest}/{domain.name}/{len(pairs)}",
    )  # fmt: skip
