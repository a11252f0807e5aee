"""Tasks with a fixed set of answers, in the two forms that each has.

Official: the chat-like prompt of the leaderboard's script, greedy, as many tokens as the first
right answer of its batch of 16 has when it is tokenised without special tokens. Only these new
tokens are decoded, special ones left out (flowertune.md 2.1, 2.3).
Ours: the prompt of training, an answer of one line, and the likelihoods of the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr  # short, and not deep: a broken row may hold anything
from typing import Any

from fedsim import answers, extraction
from fedsim.domains import PROMPT, Form, Generation, Item, Row

ASK = "Answer this multiple-choice question with the letter of the right option."


@dataclass(frozen=True)
class Quiz:
    """A question with lettered options.

    Raises:
        ValueError: there are more options than letters, or none of number `gold`.
        TypeError: a text is none.
    """

    question: str
    options: tuple[str, ...]
    gold: int

    def __post_init__(self) -> None:
        texts(self.question, *self.options)
        number(len(self.options), len(extraction.LETTERS) + 1)
        number(self.gold, len(self.options))

    @property
    def letter(self) -> str:
        return extraction.LETTERS[self.gold]

    def letters(self) -> tuple[str, ...]:
        return tuple(extraction.LETTERS[: len(self.options)])

    def lines(self) -> str:
        """A. first option, a line each."""
        pairs = zip(extraction.LETTERS, self.options)
        return "\n".join(f"{letter}. {option}" for letter, option in pairs)


def number(value: Any, n: int) -> int:
    """A stored label as a whole number from 0 to n - 1. Raises ValueError and TypeError."""
    i = int(value)
    if i != float(value) or not 0 <= i < n:
        raise ValueError(f"got {repr(value)}; expected a whole number from 0 to {n - 1}")
    return i


def real(value: Any) -> float:
    """A stored number. Raises ValueError and TypeError."""
    try:
        x = float(value)
    except ValueError:  # its message would quote the whole value
        x = math.nan
    if math.isnan(x):
        raise ValueError(f"got {repr(value)}; expected a number")
    return x


def texts(*values: Any) -> tuple[str, ...]:
    """The same values. Raises TypeError if one is no text, ValueError if it is no Unicode."""
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"got {repr(value)}; expected a text")
        value.encode()  # half a surrogate pair cannot be tokenised, nor written to a file
    return values


def listed(value: Any) -> tuple[str, ...]:
    """A stored list of texts. Raises TypeError if it is none; a text is no list of letters."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"got {repr(value)}; expected a list of texts")
    return texts(*value)


def lettered(
    instruction: str,
    read: Callable[[Row], Quiz],
    official_read: Callable[[Row], Quiz] | None = None,
) -> Mapping[str, Form]:
    """Both forms of a multiple-choice task.

    Args:
        instruction: the official one.
        read: row -> question; `official_read` where the official script reads another text.
    """

    def theirs(row: Row) -> Item:
        quiz = (official_read or read)(row)
        asked = quiz.question if quiz.question.endswith(("?", ".")) else f"{quiz.question}?"
        body = f"Question: {asked}\n\nOptions:\n{quiz.lines()}"
        return Item(chat(instruction, body), quiz.letter, quiz.letters())

    def own(row: Row) -> Item:
        quiz = read(row)
        text = f"{ASK}\n{quiz.question}\n{quiz.lines()}"
        prompt = PROMPT.format(instruction=text)
        return Item(prompt, quiz.letter, quiz.letters(), {"options": quiz.options})

    def lenient(item: Item, output: str) -> str | None:
        return extraction.letter(output, item.facts["options"])

    # 32 tokens: room for an option that is quoted instead of its letter.
    return {"flowertune": official(theirs, boolean=False), "fedsim": ours(own, lenient, 32)}


def chat(instruction: str, body: str) -> str:
    """The official prompt of general NLP and medical tasks; no chat template of the model's."""
    return (
        f"<|im_start|>question\n{instruction}\n{body}\nThe answer is:\n<|im_end|>\n"
        "<|im_start|>answer\n"
    )


def official(item: Callable[[Row], Item], *, boolean: bool) -> Form:
    """The leaderboard's form of a task of letters, or of yes, no and maybe."""

    def grade(item: Item, output: str) -> dict[str, bool]:
        prediction = extraction.official_choice(output, boolean=boolean)
        return {"official": prediction == item.gold.lower()}

    return Form(
        item, grade, ("official",), Generation(max_new=0, batch=16), shared_outputs=True
    )  # fmt: skip


def ours(
    item: Callable[[Row], Item], read: Callable[[Item, str], str | None], max_new: int
) -> Form:
    """Strict: the answer's line is the right choice, letter by letter. Lenient: the text gives it.

    Args:
        read: the lenient reader: (question, output) -> the choice that it gives, or None.
    """

    def grade(item: Item, output: str) -> dict[str, bool]:
        return {
            "strict": extraction.strict(output) == item.gold,
            "lenient": read(item, output) == item.gold,
        }

    return Form(
        item, grade, ("strict", "lenient"), Generation(max_new=max_new),
        decided=lambda item, output: answers.settled(output, lambda text: read(item, text)),
        likelihood=True,
    )  # fmt: skip
