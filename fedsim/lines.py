"""One line of text, its mentions of the choices being marked (mentions.py).

Those that stand together are one, of one choice or of several. A mention may be denied, conceded
or asked: all three by the words near it, and never beyond its own thought.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsim import vocabulary as known
from fedsim.mentions import BOLD, NAMED, QUOTED, ROOM

_TOKEN = re.compile(r"[\ue000-\uf8ff]|[^\W_]+|[^\w\s]")
GAP = frozenset("\"'()[]:=>-" + BOLD)  # between a word and the choice that it introduces
_GLUE = frozenset(",;/|&+\\、\"'()[]-" + BOLD)  # between choices that are named together
STOPS = frozenset(",.;!?")
ENDS = frozenset(".!?;")


@dataclass
class Mention:
    """Choices that are named in one breath.

    Attributes:
        first, last: their tokens.
        quoted: it says the choice in words that mean it wherever they stand.
        contrast: a denied one stands before it: `not A, B`.
    """

    choices: set[int]
    first: int
    last: int
    quoted: bool
    contrast: bool = False
    previous: Mention | None = None


def number(token: str) -> int | None:
    """The choice that a token is a mention of."""
    code = ord(token) if len(token) == 1 else 0
    return (code - NAMED) % ROOM if NAMED <= code < QUOTED + ROOM else None


def _loose(word: str) -> bool:
    return word.endswith("ly") and word not in known.CORRECTION


class Line:
    """A line's tokens and mentions."""

    def __init__(self, marked: str) -> None:
        self.tokens: list[str] = _TOKEN.findall(marked)
        self.mentions: list[Mention] = []
        self.ends = [""] * (len(self.tokens) + 1)  # what ends the sentence of each token
        for at in range(len(self.tokens) - 1, -1, -1):
            token = self.tokens[at]
            self.ends[at] = token if token in ENDS else self.ends[at + 1]
        for at, token in enumerate(self.tokens):
            choice = number(token)
            if choice is not None:
                self._add(Mention({choice}, at, at, ord(token) >= QUOTED))
        for mention in self.mentions:
            if self.following(mention.last + 1) in ("also", "equally"):
                mention.choices.add(-1)  # B is also correct: not alone

    @property
    def bare(self) -> bool:
        """Nothing but one mention."""
        return len(self.mentions) == 1 and not any(
            token.isalnum() and token not in known.OPTION
            for at, token in enumerate(self.tokens)
            if not self.mentions[0].first <= at <= self.mentions[0].last
        )

    @property
    def says(self) -> bool:
        """It holds more than punctuation and markup."""
        return any(token.isalnum() for token in self.tokens) or bool(self.mentions)

    @property
    def introduces(self) -> bool:
        """`The answer is:`, and no choice."""
        tokens = [token for token in self.tokens if token.isalnum() or token in ":?"]
        return not self.mentions and bool(tokens) and (
            tokens[-1] == ":" or tokens[-1] in known.ANSWER or tokens[-1] in known.IS
        )  # fmt: skip

    # --------------------------------------------------------------------------- together

    def _add(self, new: Mention) -> None:
        last = self.mentions[-1] if self.mentions else None
        if last and self._together(last, new):
            last.choices |= new.choices
            last.last, last.quoted = new.last, last.quoted and new.quoted
        else:
            new.previous = last
            self.mentions.append(new)

    def _together(self, one: Mention, two: Mention) -> bool:
        between = self.tokens[one.last + 1 : two.first]
        same = one.choices == two.choices
        if len(between) > 6:
            return False
        if one.quoted != two.quoted and all(t in GAP or t in ".,;" for t in between):
            return same or bool(between)  # B. London
        if self.tokens[max(0, one.first - 1)] == "as" and self.following(one.last) == "as":
            return True  # as positive as it is negative
        if between == ["."]:
            after = self.tokens[two.last + 1 : two.last + 3]
            more = len(after) == 2 and after[0] == "." and number(after[1]) is not None
            return more or len(one.choices) > 1  # A. B. C.
        if not all(t in _GLUE or t in known.JOIN or _loose(t) for t in between):
            return False
        if not any(t in known.JOIN or t in "/&+|" for t in between):
            if self.following(two.last) in known.VERB and not same:
                return False  # B, A is wrong
            two.contrast = bool(between) and self._refused_before(one)
        return not two.contrast

    # ----------------------------------------------------------------------------- denial

    def denied(self, mention: Mention) -> bool:
        return self._refused_before(mention) or self._refused_after(mention)

    def _refused_before(self, mention: Mention) -> bool:
        """`not`, with up to five words of the same thought between."""
        seen = 0
        for at in range(mention.first - 1, max(-1, mention.first - 13), -1):
            word, before = self.tokens[at], self.tokens[at - 1] if at else ""
            if (before, word) in known.SURE:
                return False
            if word in known.NOT or word in known.WRONG or self._refuses(at):
                return word not in ("than", "other") or seen <= 1
            if (word == "no" and seen <= 1) or (before, word) == ("anything", "but"):
                return True
            if word in known.BREAK or word in STOPS or number(word) is not None or seen > 5:
                return False
            seen += word not in GAP
        return False

    def _refused_after(self, mention: Mention) -> bool:
        """`is wrong`, `cannot be right`, `: incorrect`."""
        verb, seen = False, 0
        for at in range(mention.last + 1, min(len(self.tokens), mention.last + 9)):
            word, after = self.tokens[at], self.following(at)
            if word in GAP:
                continue
            if word in known.BREAK or word in known.CLAUSE or word in STOPS or seen > 5:
                return False
            if number(word) is not None or number(after) is not None:
                return False
            if word in known.WRONG or word in known.NEVER or self._refuses(at):
                return verb or seen == 0
            if verb and (word, after) in known.LESS:
                return True
            verb = verb or word in known.VERB
            seen += 1
        return False

    def _refuses(self, at: int) -> bool:
        """rules out, eliminated ..."""
        word = self.tokens[at]
        out = "out" in self.tokens[at + 1 : at + 3]
        return word.startswith(known.REFUSE) or (out and word.startswith(known.OUT))

    def conceded(self, mention: Mention) -> bool:
        """Although it seems right; if you agree."""
        before = self.tokens[max(0, mention.first - 4) : mention.first]
        conceded = known.ALTHOUGH if mention.previous else known.CONCEDED
        return (not conceded.isdisjoint(before) and STOPS.isdisjoint(before)) or (
            self.following(mention.last) == "if"
        )  # fmt: skip

    def asked(self, mention: Mention) -> bool:
        if self.bare and mention.first <= 2:
            return False
        return self.ends[mention.last] == "?"

    def following(self, at: int) -> str:
        return self.tokens[at + 1] if at + 1 < len(self.tokens) else ""
