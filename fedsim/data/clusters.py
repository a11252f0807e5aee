"""Topics of texts that nobody labelled: spherical k-means over TF-IDF, in NumPy alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsim.errors import ConfigError

_WORD = re.compile(r"[^\W\d_]{3,}")
_ROUNDS = 50  # of k-means, which has come to rest by then or nearly so
_AT_ONCE = 1 << 16  # sparse entries whose products with all centres are in memory together


@dataclass(frozen=True)
class Vectors:
    """Texts as unit vectors, sparse: text e has entries offsets[e] to offsets[e + 1].

    Attributes:
        word: (nnz,) int64 indices into `vocabulary`.
        weight: (nnz,) float64, (1 + log tf) log(E / df), each text's of norm 1 (or all 0).
        offsets: (E + 1,) int64.
    """

    word: np.ndarray
    weight: np.ndarray
    offsets: np.ndarray
    vocabulary: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def dense(self, text: int) -> np.ndarray:
        """One text: (V,)."""
        out = np.zeros(len(self.vocabulary))
        where = slice(self.offsets[text], self.offsets[text + 1])
        out[self.word[where]] = self.weight[where]
        return out

    def cosines(self, centres: np.ndarray) -> np.ndarray:
        """Of every text with every centre: (V, k) -> (E, k), summed in the order of the entries."""
        out = np.zeros((len(self), centres.shape[1]))
        text = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        for first in range(0, len(self.word), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            products = centres[self.word[part]] * self.weight[part, None]
            starts = np.flatnonzero(np.diff(text[part], prepend=-1))
            out[text[part][starts]] += np.add.reduceat(products, starts)
        return out

    def centres(self, codes: np.ndarray, k: int) -> np.ndarray:
        """Mean directions of the clusters: (E,) -> (V, k); zero for an empty one."""
        cell = self.word * k + np.repeat(codes, np.diff(self.offsets))
        total = np.bincount(cell, self.weight, len(self.vocabulary) * k).reshape(-1, k)
        norm = np.linalg.norm(total, axis=0)
        return total / np.where(norm > 0, norm, 1)


def vectors(texts: Sequence[str]) -> Vectors:
    """Words of three letters or more that two texts have, and not more than half of them."""
    counts = [Counter(_WORD.findall(text.lower())) for text in texts]
    found = Counter(word for count in counts for word in count)
    kept = [word for word, df in found.items() if 2 <= df <= max(2, len(texts) / 2)]
    place = {word: i for i, word in enumerate(kept)}
    idf = np.log(len(texts) / np.array([found[word] for word in kept], dtype=np.float64))
    rows = [{place[w]: n for w, n in count.items() if w in place} for count in counts]
    offsets = np.cumsum([0, *map(len, rows)])
    word = np.fromiter((w for row in rows for w in row), np.int64, offsets[-1])
    times = np.fromiter((n for row in rows for n in row.values()), np.float64, offsets[-1])
    weight = (1 + np.log(times)) * idf[word]
    text = np.repeat(np.arange(len(texts)), np.diff(offsets))
    norm = np.sqrt(np.bincount(text, weight**2, len(texts)))[text]
    weight /= np.where(norm > 0, norm, 1)  # of two texts, the words that both have weigh nothing
    return Vectors(word, weight, offsets, tuple(kept))


def _first_centres(texts: Vectors, k: int, rng: np.random.Generator) -> np.ndarray:
    """k texts, each drawn in proportion to its distance from those before (k-means++)."""
    chosen: list[int] = []
    near = np.zeros(len(texts))  # cosine with the nearest chosen text
    for _ in range(k):
        ends = np.cumsum(np.maximum(1 - near, 0))
        at = int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))
        chosen.append(min(at, len(texts) - 1))  # all alike: no distance is left to draw by
        near = np.maximum(near, texts.cosines(texts.dense(chosen[-1])[:, None])[:, 0])
    return np.stack([texts.dense(text) for text in chosen], axis=1)


def cluster(texts: Sequence[str], k: int, seed: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Spherical k-means, a pure function of its arguments. Dhillon & Modha 2001.

    Returns:
        (E,) int64 cluster of each text, and each cluster's number with its three strongest words.
        Every cluster has a text.

    Raises:
        ConfigError: fewer different texts than clusters.
    """
    if k > len(set(texts)):
        raise ConfigError(
            "clients.clusters", got=k, expected=f"at most {len(set(texts))}, the different texts"
        )
    entries = vectors(texts)
    centres = _first_centres(entries, k, np.random.default_rng(seed))
    codes = np.full(len(texts), -1)
    for _ in range(_ROUNDS):
        cosines = entries.cosines(centres)
        before, codes = codes, cosines.argmax(axis=1)
        if np.array_equal(before, codes):
            break
        centres = entries.centres(codes, k)
    codes = _inhabited(codes, cosines.max(axis=1), k)
    names = []
    for i, centre in enumerate(entries.centres(codes, k).T):
        strongest = np.argsort(-centre, kind="stable")[:3]
        names.append(" ".join([str(i), *(entries.vocabulary[w] for w in strongest)]))
    return codes, tuple(names)


def _inhabited(codes: np.ndarray, cosine: np.ndarray, k: int) -> np.ndarray:
    """Each empty cluster gets the text that lies farthest from its centre, of those not alone."""
    codes = codes.copy()
    for empty in np.flatnonzero(np.bincount(codes, minlength=k) == 0):
        company = np.bincount(codes, minlength=k)[codes] > 1
        codes[np.argmin(np.where(company, cosine, np.inf))] = empty
    return codes
