"""Answers are read as a careful person reads them, and no continuation changes one that is read.

Proves: `lenient` gives what two lists of phrasings say, one of them by another hand that did not
know the rules (phrasings.json); nothing raises; once a
form says that an output is decided no text behind it changes a grade, and most answers are decided
at the end of their line; 100,000 characters of whatever the rules look for take under 50 ms.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import answers, domains, extraction, forms
from tests import hostile, phrasings
from tests.phrasings import Case

SENTIMENTS = ("negative", "neutral", "positive")
DECISIONS = ("yes", "no", "maybe")
Read = Callable[[str], str | None]


def letters(options: tuple[str, ...]) -> Read:
    return lambda text: extraction.letter(text, options)


def sentiment(text: str) -> str | None:
    return extraction.mention(text, SENTIMENTS)


def decision(text: str) -> str | None:
    return extraction.leading(text, DECISIONS)


LISTS: list[tuple[str, Read, list[Case]]] = [
    ("city", letters(phrasings.CITIES), phrasings.CITY),
    *((options[0], letters(options), cases) for options, cases in phrasings.OTHER_OPTIONS),
    ("sentiment", sentiment, phrasings.SENTIMENT),
    ("decision", decision, phrasings.DECISION),
]


SECOND = json.loads((Path(__file__).parent / "phrasings.json").read_text(encoding="utf-8"))


def second(case: dict[str, Any]) -> tuple[Read, str, str | None]:
    if case["kind"] == "letter":
        return letters(tuple(case["options"])), case["text"], case["want"]
    return {"sentiment": sentiment, "decision": decision}[case["kind"]], case["text"], case["want"]


EVERY = [
    pytest.param(read, text, want, id=f"{name}: {text[:50]!r}")
    for name, read, cases in LISTS for text, want in cases
] + [
    pytest.param(*second(case), id=f"second: {case['kind']} {case['text'][:50]!r}")
    for case in SECOND
]  # fmt: skip


@pytest.mark.parametrize(("read", "text", "want"), EVERY)
def test_a_careful_person_reads(read: Read, text: str, want: str | None) -> None:
    assert read(text) == want


def test_the_lists_are_as_long_as_they_should_be() -> None:
    """Among them cases in which a mention must not count."""
    wants = [want for _, _, cases in LISTS for _, want in cases]
    assert len(wants) >= 220 and wants.count(None) >= 60


# --------------------------------------------------------------------------------- properties

TEXTS = [text for _, _, cases in LISTS for text, _ in cases] + [case["text"] for case in SECOND]
PIECES = [
    *TEXTS, *hostile.ANSWERS, *hostile.SENTIMENTS, "\n", "\n\n", " ", ".", ",", "?", ":", "- ",
    "\nA. ", "\nB. ", "\n2. ", "\n- ", "\n1) ", "</think>", "<think>", "<answer>", "**", "\\boxed{",
    " not ", " is wrong", " or ", " and ", "No wait, ", "\n### Instruction:",
    "\nAnswer: ", "'", "\u0301",
    "<|im_end|>", "\u2028", "\r", "```", "\ud7ff", "pos\u0131t\u0131ve", "\u017f",
    "\ue000", "\uefff",
]  # fmt: skip
TEXT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=5).map("".join)
QUIZ = forms.lettered("Answer.", lambda row: forms.Quiz("Which?", phrasings.CITIES, row["gold"]))
FORMS = {
    "letter": [(QUIZ["fedsim"], {"gold": gold}) for gold in range(4)],
    "sentiment": [
        (domains.load("finance").tasks["fpb"].forms["fedsim"], {"sentence": "x", "label": label})
        for label in range(3)
    ],
    "decision": [
        (domains.load("medical").tasks["pubmedqa"].forms["fedsim"],
         {"QUESTION": "Does it?", "CONTEXTS": [], "final_decision": gold}) for gold in DECISIONS
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
@given(output=TEXT, more=TEXT)
@settings(max_examples=300, deadline=None)
def test_what_is_decided_stays(kind: str, output: str, more: str) -> None:
    for form, row in FORMS[kind]:
        item = form.item(row)
        for ended in (output, f"{output}\n"):
            assert form.decided
            if form.decided(item, ended):
                assert form.grade(item, ended + more) == form.grade(item, ended)
                assert form.decided(item, ended + more)


@pytest.mark.parametrize("kind", FORMS)
def test_no_phrasing_behind_a_decided_one_counts(kind: str) -> None:
    form, row = FORMS[kind][0]
    item = form.item(row)
    assert form.decided
    for text in TEXTS:
        if form.decided(item, f"{text}\n"):
            grades = form.grade(item, f"{text}\n")
            for more in (*TEXTS[::29], "B. x\nC. y", "- x", "2. x"):
                assert form.grade(item, f"{text}\n{more}") == grades


def test_most_answers_are_decided_at_the_end_of_their_line() -> None:
    read = letters(phrasings.CITIES)
    ended = [answers.settled(f"{text}\n", read) for text, want in phrasings.CITY if want]
    assert sum(ended) >= 0.95 * len(ended)
    assert not answers.settled("A. Paris\n", read)  # the head of a list?
    assert answers.settled("A. Paris\nIt is in France.\n", read)
    assert not answers.settled("B", read) and not answers.settled("Let me think.\n", read)


@given(output=TEXT, options=st.lists(st.text(max_size=8), min_size=1, max_size=30))
@settings(max_examples=300, deadline=None)
def test_nothing_raises(output: str, options: list[str]) -> None:
    assert extraction.letter(output, options) in (None, *extraction.LETTERS[: len(options)])
    assert extraction.mention(output, options) in (None, *options)
    assert extraction.leading(output, options) in (None, *options)


UNITS = (
    "A ", "B, ", "not ", "positive ", "yes, ", "A is ", "**", "\\boxed{", "<answer>", "<", "- A\n",
    "A. x\n", "so A\n", "答案是", "A and ", "final answer ", "London ", "Iron   ", "ﷺ", "not A or ",
    "<think></think>", "wait A ", "yes. ", "`'", "[answer]", "'s it", "\r", "$", "positive/",
)  # fmt: skip


def seconds(read: Read, text: str) -> float:
    start = time.process_time()
    read(text)
    return time.process_time() - start


@pytest.mark.parametrize("read", [read for _, read, _ in LISTS], ids=[n for n, *_ in LISTS])
def test_hostile_texts_take_no_time(read: Read) -> None:
    read("x")  # patterns are compiled once
    texts = [*hostile.long_texts(100_000), "<think>" + "x " * 50_000]
    texts += [(unit * (100_000 // len(unit) + 1))[:100_000] for unit in UNITS]
    for text in texts:
        assert any(seconds(read, text) < 0.05 for _ in range(4)), text[:40]


def test_time_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only because few characters are read."""
    read = letters(phrasings.CITIES)
    for unit in ("A is ", "not A or ", "A, ", "the ", "so very A ", "London is ", "- A\n"):
        spent = []
        for size in (5_000, 40_000):
            monkeypatch.setattr("fedsim.answers.MOST", size)
            spent.append(min(seconds(read, unit * (size // len(unit))) for _ in range(4)))
        assert spent[1] < 24 * spent[0], unit  # 8, were nothing fixed
