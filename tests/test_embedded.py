"""The embedded finance sentiment set: counts, balance, disjoint patterns, numbers, pinned rows."""

import functools
import hashlib
import json
import re
from collections import Counter

import pytest

from fedsim.data.embedded import finance

SHA256 = {
    "train": "6da2a9c7568135d09fde67431ed143fcba362bceca50522dedde3e567be72262",
    "test": "22a006f6a5e91fb9e2ccb4f41210fe1ca72a0f7b3ad84bf90419ce7dd60e9130",
}
STOP = (
    "a an the of in on at to for from and or is are was were be been has have had it its that "
    "this with by as will not than which after eur mn"
)
UP = "rose|grew|increased|climbed|went up|widened|swelled|spreading|worsened|raising|improved"
DOWN = (
    "fell|declined|decreased|dropped|went down|narrowed|receded|drying up|eased|lowering|weakened"
    "|squeezed"
)


@functools.cache
def rows(split: str) -> list[tuple[str, str]]:
    """Return (sentence, label) pairs of a split."""
    if split == "train":
        return [(row["input"], row["output"]) for row in finance.train()]
    names = ("negative", "neutral", "positive")
    return [(row["sentence"], names[row["label"]]) for row in finance.test()]


def words(pattern: str) -> set[str]:
    """Return the words of a pattern without slots and stop words."""
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", pattern).lower())) - set(STOP.split())


def patterns(table: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the patterns of all classes."""
    return [pattern for group in table.values() for pattern in group]


def slot_regex(match: re.Match[str]) -> str:
    """Return the named group that a slot matches."""
    return f"(?P<{match[1]}>{'|'.join(finance.FILLERS.get(match[1], ['.+?']))})"


def test_columns_counts_and_uniqueness():
    assert {tuple(row) for row in finance.train()} == {("input", "output", "instruction")}
    assert {row["instruction"] for row in finance.train()} == {
        "What is the sentiment of this news? "
        "Please choose an answer from {negative/neutral/positive}."
    }
    assert {tuple(row) for row in finance.test()} == {("sentence", "label")}
    train, test = rows("train"), rows("test")
    assert Counter(label for _, label in train) == dict.fromkeys(finance.TRAIN_PATTERNS, 560)
    assert Counter(row["label"] for row in finance.test()) == {0: 160, 1: 160, 2: 160}
    sentences = [text for text, _ in train + test]
    assert len(sentences) == len(set(sentences)) == 2160
    assert not [text for text in sentences if re.search(r"[{}|]|  |\n", text)]


def test_held_out_patterns_and_companies_are_disjoint_from_training():
    train, test = patterns(finance.TRAIN_PATTERNS), patterns(finance.TEST_PATTERNS)
    assert len(set(train)) == len(train) == 3 * 40
    assert len(set(test)) == len(test) == 3 * 32
    assert not set(train) & set(test)
    for held_out in map(words, test):
        assert held_out
        assert max(len(held_out & w) / len(held_out | w) for w in map(words, train)) <= 0.6
    stems = {split: {name[:5] for name in names} for split, names in finance.COMPANIES.items()}
    assert not stems["train"] & stems["test"]
    assert all(len(stems[split]) == len(finance.COMPANIES[split]) for split in stems)


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_are_pinned(split):
    data = json.dumps(finance.train() if split == "train" else finance.test(), sort_keys=True)
    assert hashlib.sha256(data.encode()).hexdigest() == SHA256[split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_follow_the_stated_direction(split):
    table = finance.TRAIN_PATTERNS if split == "train" else finance.TEST_PATTERNS
    checked = 0
    for pattern in patterns(table):
        pair = re.search(r"\{([pc]?)(lo|hi)\}.*\{\1(lo|hi)\}", pattern)
        if not pair:
            continue
        regex = re.sub(r"\\\{(\w+)\\\}", slot_regex, re.escape(pattern))
        hits = [hit for text, _ in rows(split) if (hit := re.fullmatch(regex, text))]
        assert len(hits) == finance.COPIES[split], pattern
        for hit in hits:
            low, high = float(hit[pair[1] + "lo"]), float(hit[pair[1] + "hi"])
            assert low < high
            if pattern in table["neutral"]:
                continue
            up, down = re.search(rf"\b({UP})\b", hit[0]), re.search(rf"\b({DOWN})\b", hit[0])
            assert bool(up) != bool(down), hit[0]
            later = pair[3] if re.search(r"from EUR \S+ mn to|today", pattern) else pair[2]
            assert (later == "hi") == bool(up), hit[0]
            checked += 1
    assert checked >= (200 if split == "train" else 30)


@pytest.mark.parametrize("split", ["train", "test"])
def test_surface_features_say_little_about_the_class(split):
    groups = [[t for t, got in rows(split) if got == want] for want in finance.TRAIN_PATTERNS]
    lengths = [sum(map(len, group)) / len(group) for group in groups]
    assert max(lengths) < 1.05 * min(lengths)
    for mark in (r"\d", "EUR", "%", r"\$", r"\.$", ",", '"'):
        shares = [sum(bool(re.search(mark, t)) for t in g) / len(g) for g in groups]
        assert min(shares) > 0
        assert max(shares) - min(shares) < 0.16, mark
