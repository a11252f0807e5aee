"""The answer that a text gives to a question with choices; None where it gives none, or several.

It is that of the first line that gives one: what a model writes below its answer is no part of it.
Above it there may be thoughts, an introduction, an echo of the question or of its choices. A line
that is neither the first nor introduced counts only if it names the answer, or is nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from fedsim.emphasis import EXACT, STATED, told
from fedsim.lines import Line
from fedsim.mentions import Mark, plain

MOST = 2_000  # characters that are read
_THOUGHTS = re.compile(r"\s*<(think\w*|thought\w*|reason\w*|scratchpad)>", re.IGNORECASE)
_OVER = re.compile(r"<\|?(?:im_end|endoftext|eot_id|eos|end_of_turn|end)\|?>|</s>")
_TURN = re.compile(
    r"[\s*]*(#{2,}\s*)?(?:instructions?|input|question|q|user|human|problem|task|context|passage"
    r"|sentence|tweet|news|statement)\s*\d*[\s*]*:|<\|(?:im_start|user|start)", re.IGNORECASE
)  # fmt: skip
_ASIDE = re.compile(r"\W*(?:explanation|reason\w*|rationale|note|analysis|because)\b", re.I)
_ITEM = re.compile(r"[\s*_(]*(?:([A-Za-z]|\d{1,2})[.):]|([-*•+])\s)")
_A = re.compile(r"^[\s*]*A\s*:")  # Q: Which? A: B
Exact = Callable[[str], int | None]  # a line that is a choice's very text -> its number


def read(output: str, mark: Mark, exact: Exact = lambda line: None) -> int | None:
    """The number of the choice that the text gives."""
    lines = [line for line in _spoken(output).split("\n") if line.strip()]
    echoed = False
    free, listed = True, ""  # the line is the first or introduced; the item of a list above it
    for number, text in enumerate(lines):
        turn = _TURN.match(text)
        if number and echoed:
            text = _A.sub("Answer:", text, count=1)
        if turn and (number or turn[1]):
            return None
        echoed = echoed or bool(turn)
        line, same = Line(mark(plain(text)[:MOST])), exact(text.strip())
        said = (same, EXACT) if same is not None else told(line)
        item, below = _item(text), _item(lines[number + 1]) if number + 1 < len(lines) else ""
        if item and (_after(listed) == item or (item in ("a", "1", "-") and _after(item) == below)):
            listed, free = item, False
        else:
            listed = ""
        if said and (said[1] >= STATED or (not listed and (
            line.bare or (free and not turn and not _ASIDE.match(text))
        ))):  # fmt: skip
            return said[0]
        if line.says:
            free = line.introduces
    return None


def settled(output: str, read: Callable[[str], object]) -> bool:
    """No continuation changes what is read: a whole line gives an answer, and does so whatever item
    of a list the next line may be."""
    ended = output[: output.rfind("\n") + 1]
    answer = read(ended)
    return answer is not None and all(read(ended + item) == answer for item in ("B.", "2.", "- -"))


def _spoken(output: str) -> str:
    """What is no thought, and before what ends a turn."""
    at = 0
    while thought := _THOUGHTS.match(output, at):
        end = output.find(f"</{thought[1]}>", thought.end())
        if end < 0:
            return ""
        at = output.index(">", end) + 1
    return _OVER.split(output[at:].lstrip()[:MOST], maxsplit=1)[0]


def _item(text: str) -> str:
    """The mark of a list's item: a letter, a number or a dash."""
    found = _ITEM.match(text)
    return (found[1] or "-").lower() if found else ""


def _after(item: str) -> str:
    if item.isdecimal():
        return str(int(item) + 1)
    return chr(ord(item) + 1) if item.isalpha() else item
