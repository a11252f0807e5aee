"""Facts as pairs: wordings that teach them, other wordings that ask for them with four choices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fedsim.data.embedded.chance import draw, shuffled

LETTERS = "ABCD"
LAYOUTS = (  # how training writes a question with choices: head, one choice, between choices, end
    ("{q}\n\nOptions:\n", "{k}. {c}", "\n", ""),
    ("Question: {q}\n\nOptions:\n", "{k}. {c}", "\n", "\nThe answer is:"),
    ("Answer with the letter of the right option.\n{q}\n", "{k}. {c}", "\n", ""),
    ("Which letter stands before the right answer? {q}\n", "({k}) {c}", "; ", ""),
)


class Question(NamedTuple):
    """A question with one right and three wrong answers."""

    subject: str
    text: str
    right: str
    wrong: tuple[str, str, str]


class Sheet(NamedTuple):
    """A question whose choices have their places; `answer` is that of the right one, 0 to 3."""

    question: Question
    choices: tuple[str, ...]
    answer: int

    def written(self, layout: int) -> str:
        """Question and lettered choices as one text."""
        head, choice, between, end = LAYOUTS[layout % len(LAYOUTS)]
        choices = (choice.format(k=k, c=c) for k, c in zip(LETTERS, self.choices))
        return head.format(q=self.question.text) + between.join(choices) + end


@dataclass(frozen=True)
class Relation:
    """Pairs (a, b): no a and no b occurs twice, and no other b is right for an a.

    Attributes:
        subject: the field, as MMLU names one.
        taught: "question => answer" with {a} and {b} to fill in.
        asked: questions with {a} or {b}; the other one is the answer.
        pairs: what is taught and asked.
    """

    subject: str
    taught: tuple[str, ...]
    asked: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def lessons(self) -> Iterator[tuple[str, str]]:
        """(question, answer) of every pair in every wording that teaches it."""
        for a, b in self.pairs:
            for wording in self.taught:
                question, answer = wording.format(a=a, b=b).split(" => ")
                sentence = answer.endswith(".")
                yield question, answer[0].upper() + answer[1:] if sentence else answer

    def questions(self, key: str) -> Iterator[Question]:
        """Every pair once, the wordings that ask dealt among them.

        Within a wording each value is right once and wrong three times: which one is right cannot
        be told from the choices alone.
        """
        order = shuffled(self.pairs, key, self.subject, self.asked)
        for n, wording in enumerate(self.asked):
            pairs = order[n :: len(self.asked)]
            side = 0 if "{b}" in wording else 1
            steps = shuffled(range(1, len(pairs)), key, self.subject, wording)
            for i, (a, b) in enumerate(pairs):
                x, y, z = (pairs[(i + step) % len(pairs)][side] for step in steps[:3])
                yield Question(self.subject, wording.format(a=a, b=b), (a, b)[side], (x, y, z))


def lines(text: str, mark: str = "\n") -> tuple[str, ...]:
    """The entries of a text, parted by the mark; line ends within an entry are spaces."""
    return tuple(" ".join(entry.split()) for entry in text.strip().split(mark))


def relation(subject: str, *, taught: str, asked: str, pairs: str) -> Relation:
    """A relation from text: a wording a line, pairs as "a = b; a = b"."""
    entries = [entry.partition(" = ") for entry in lines(pairs, ";")]
    return Relation(subject, lines(taught), lines(asked), tuple((a, b) for a, _, b in entries))


def seated(questions: Iterable[Question], key: str) -> list[Sheet]:
    """The questions shuffled; in each four that follow, the right answer has each place once."""
    sheets = []
    for i, question in enumerate(shuffled(questions, key, "order")):
        answer = shuffled(range(4), key, i // 4)[i % 4]
        choices = shuffled(question.wrong, key, i, "wrong")
        choices.insert(answer, question.right)
        sheets.append(Sheet(question, tuple(choices), answer))
    return sheets


def practice(questions: Iterable[Question], key: str) -> Iterator[tuple[str, str]]:
    """(question with lettered choices, letter) pairs, in mixed layouts."""
    for i, sheet in enumerate(seated(questions, key)):
        yield sheet.written(draw(key, i, "layout")), LETTERS[sheet.answer]
