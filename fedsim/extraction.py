"""Answers read from generated text. Text in, text out; nothing here raises, whatever the text.

The official rules are those of the leaderboard's scripts, quirks included (flowertune.md 2.1-2.3).
Ours read the answer's line, the first that is not blank: what a model writes below its answer is
no part of it. `strict` is that line and nothing else; the lenient readers take what a careful
person would, and only that: an answer, never a mention of one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWER = "Answer: "  # the finance prompt's last word, at which the official script splits
_NEAR = 40  # characters before a mention that may negate it
_NEGATION = re.compile(
    r"(?:\b(?:not|never|no|neither|nor|without|except)|n['\u2019 ]t)(?:\s+\w+)?\s*$", re.IGNORECASE
)
_NAMED = r"\b(?:answer|option|choice)\b(?:\s+(?:is|was))?(?:\s+(?:option|choice))?[\s:*\"'(]*"


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


def ended(output: str) -> bool:
    """No continuation changes `line` any more."""
    return "\n" in output.lstrip()


def strict(output: str) -> str:
    """The answer's line, where one final period is forgiven."""
    return line(output).removesuffix(".")


def letter(output: str, options: Sequence[str]) -> str | None:
    """The letter of an option, by the first rule that finds one.

    1. The line begins with the letter, alone: `B`, `(B)`, `B. Paris`, `b)`, `B because`.
    2. The line names it: `the answer is B`, `Option B`.
    3. The line quotes one option's text, and no other's that is not within it.

    A letter that goes on as a word is none: `A patient`, `B cells`, `D-dimer`, `C3`.
    """
    upper = LETTERS[: len(options)]
    alone = (
        rf"(?:([{upper}])(?![\w'\u2019-])(?!\s+(?!(?:is|because|since)\b)[a-z])"
        rf"|([{upper.lower()}])(?=\)|[.:]?[^\w']*$))"
    )
    said = line(output)
    found = re.match(rf"[\W_]*{alone}", said) or re.search(rf"(?i:{_NAMED}){alone}", said)
    if found:
        return (found[1] or found[2]).upper()
    return _quoted(said, options)


def _quoted(said: str, options: Sequence[str]) -> str | None:
    text = said.removesuffix(".")
    same = [i for i, option in enumerate(options) if text and text == option.removesuffix(".")]
    if not same:
        words = [_words(option) for option in options]
        here = f" {_words(said)} "
        there = [i for i, w in enumerate(words) if w and (f" {w} " == here or _told(w, here))]
        same = [i for i in there if not any(
            i != j and words[i] != words[j] and f" {words[i]} " in f" {words[j]} " for j in there
        )]  # fmt: skip
    return LETTERS[same[0]] if len(same) == 1 else None


def _told(words: str, here: str) -> bool:
    """Within a sentence, an option is quoted only if it is a word and not negated: 2 is in 2.5."""
    at = here.find(f" {words} ")
    return at >= 0 and bool(re.search(r"[^\W\d_]{3}", words)) and not _negated(here, at)


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


def _negated(text: str, at: int) -> bool:
    return bool(_NEGATION.search(text[max(0, at - _NEAR) : at]))


def mention(output: str, words: Sequence[str]) -> str | None:
    """The line's first of these words that is not negated (`not positive`, `neither ...`) and no
    part of a list (`negative/neutral/positive`); in any case."""
    said = line(output)
    for found in re.finditer(rf"(?<![\w/-])(?:{'|'.join(words)})(?![\w/-])", said, re.IGNORECASE):
        if not _negated(said, found.start()):
            return found[0].lower()
    return None


def leading(output: str, words: Sequence[str]) -> str | None:
    """The one of these words that the line begins with, or names as its answer; in any case."""
    word = rf"({'|'.join(words)})(?![\w'\u2019-])"
    said = line(output)
    found = re.match(rf"[\W_]*{word}", said, re.IGNORECASE) or re.search(
        rf"{_NAMED}{word}", said, re.IGNORECASE
    )
    return found[1].lower() if found else None
