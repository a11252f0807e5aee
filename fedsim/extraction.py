"""Answers read from generated text. Text in, text out; nothing here raises, whatever the text.

The official rules are those of the leaderboard's scripts, quirks included (flowertune.md 2.1-2.3).
Ours: `strict` is the first line that is not blank, and nothing else; the lenient readers take what
a careful person would, and only that: an answer, never a mention of one (answers.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedsim import answers, mentions

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER = "Answer: "  # the finance prompt's last word, at which the official script splits


def cut(text: str, stop: Sequence[str]) -> str:
    """What comes before the first stop text."""
    ends = [at for at in map(text.find, stop) if at >= 0]
    return text[: min(ends, default=len(text))]


# -------------------------------------------------------------------------------- official


def official_choice(output: str, *, boolean: bool) -> str:
    """The prediction, in lower case: the first letter or digit if it is one of a to e; of a
    boolean, the whole of what is left if it is yes or no (or, by accident, a to e).

    Only the first line after the first line break with ## counts, where there is one. Where no
    prediction is found it is the output itself, so that `maybe` counts when it is all there is.
    """
    text = whole = output.lower()
    if "\n##" in text:
        text = text.split("\n##")[1].split("\n")[0].strip()
    text = re.sub(r" +", " ", re.sub(r"[^a-zA-Z0-9]", " ", text).strip())
    if boolean:
        for twice, once in (("yesyes", "yes"), ("nono", "no"), ("yesno", "yes"), ("noyes", "no")):
            if twice in text:
                text = text.replace(twice, once)
                break
    else:
        text = text[:1]
    return text if text in ("a", "b", "c", "d", "e", "yes", "no") else whole


def official_sentiment(text: str) -> str:
    """positive anywhere wins, then negative; neutral is what is left."""
    if "positive" in text or "Positive" in text:
        return "positive"
    return "negative" if "negative" in text or "Negative" in text else "neutral"


def official_part(prompt: str, output: str) -> tuple[str, bool]:
    """The text between the first and the second `Answer: ` of prompt and output together.

    Returns:
        The text, and whether a continuation can no longer change it: an input or an output that
        holds the mark itself closes it.
    """
    parts = (prompt + output).split(ANSWER, 2)
    return (parts[1], len(parts) > 2) if len(parts) > 1 else ("None", False)


# ------------------------------------------------------------------------------------ ours


def line(output: str) -> str:
    """The first line that is not blank, without the space around it."""
    return output.lstrip().partition("\n")[0].strip()


def strict(output: str) -> str:
    """The answer's line, where one final period is forgiven."""
    return line(output).removesuffix(".")


def letter(output: str, options: Sequence[str]) -> str | None:
    """The letter of an option that the text gives as its answer, or whose text it gives as it."""
    told = tuple(options)[: len(LETTERS)]

    def exact(line: str) -> int | None:
        texts = {line.removesuffix("."), line.strip("*_`$\"' ").removesuffix(".")}
        same = [i for i, option in enumerate(told) if option.removesuffix(".") in texts]
        return same[0] if len(same) == 1 and texts.isdisjoint(LETTERS) else None

    number = answers.read(output, mentions.letters(told), exact)
    return None if number is None else LETTERS[number]


def mention(output: str, words: Sequence[str]) -> str | None:
    """The one of these labels that the text gives as its answer; in any case."""
    number = answers.read(output, mentions.labels(tuple(words)))
    return None if number is None else words[number]


def leading(output: str, words: Sequence[str]) -> str | None:
    """The same of words that begin a sentence, as yes and no do, and may belong to another one."""
    number = answers.read(output, mentions.labels(tuple(words), leading=True))
    return None if number is None else words[number]
