"""What one line says, its mentions of the choices being marked (mentions.py).

Mentions that stand together are one, of one choice or of several. Those that are denied or asked
fall away; the rest counts by how it is said: as the final answer, as the answer, at the head of
the line, or at all. The weightiest say it, if they say one thing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedsim import vocabulary as known
from fedsim.mentions import BOLD, FINAL, NAMED, QUOTED, ROOM

AT_ALL, AT_HEAD, STATED, FINALLY, EXACT = range(5)
_TOKEN = re.compile(r"[\ue000-\uf8ff]|[^\W_]+|[^\w\s]")
_GAP = frozenset("\"'()[]:=>-" + BOLD)  # between a word and the choice that it introduces
_GLUE = frozenset(",;/|&+\\、\"'()[]-" + BOLD)  # between choices that are named together
_STOPS = frozenset(",.;!?")
_ENDS = frozenset(".!?;")
_LABEL = known.ANSWER | known.OPTION | known.ISSUE


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


def _number(token: str) -> int | None:
    code = ord(token) if len(token) == 1 else 0
    return (code - NAMED) % ROOM if NAMED <= code < QUOTED + ROOM else None


def _loose(word: str) -> bool:
    return word.endswith("ly") and word not in known.CORRECTION


class Line:
    """The tokens and mentions of a line, and `told`: (choice, weight), or None."""

    def __init__(self, marked: str) -> None:
        self.tokens: list[str] = _TOKEN.findall(marked)
        self.mentions: list[Mention] = []
        self.ends = [""] * (len(self.tokens) + 1)  # what ends the sentence of each token
        for at in range(len(self.tokens) - 1, -1, -1):
            token = self.tokens[at]
            self.ends[at] = token if token in _ENDS else self.ends[at + 1]
        for at, token in enumerate(self.tokens):
            number = _number(token)
            if number is not None:
                self._add(Mention({number}, at, at, ord(token) >= QUOTED))
        self.told = self._told()

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

    def _told(self) -> tuple[int, int] | None:
        live = [
            m for m in self.mentions if not (self._denied(m) or self._conceded(m) or self._asked(m))
        ]
        fixed = [at for at, token in enumerate(self.tokens) if token in known.CORRECTION]
        if fixed:  # the answer is A. Wait, no, B
            start = fixed[-1] + 1
            while self.tokens[start : start + 1] and self.tokens[start] in (",", ".", "no"):
                start += 1
            weighty = self._weightiest([m for m in live if m.first >= start], start)
            if weighty and weighty[1] > AT_ALL:
                return weighty
        return self._weightiest(live, 0)

    def _weightiest(self, mentions: list[Mention], start: int) -> tuple[int, int] | None:
        weighed = [(self._weight(m, start), m) for m in mentions]
        top = max((weight for weight, _ in weighed), default=-1)
        said = [m for weight, m in weighed if weight == top]
        choices = set().union(*(m.choices for m in said))
        if top < 0 or len(choices) != 1:
            return None
        (choice,) = choices
        after = [m for m in self.mentions if m.first > said[-1].last and choice in m.choices]
        if top == AT_HEAD and said[-1].quoted and any(
            weight == AT_ALL and choice not in m.choices and self._same_breath(said[-1], m)
            for weight, m in weighed
        ):  # fmt: skip
            return None  # positive for shareholders, negative for employees
        heads = [m for weight, m in weighed if weight == AT_HEAD and not m.quoted]
        if any(self._denied(m) for m in after) or (top == STATED and any(
            choice not in m.choices and self.tokens[m.last + 1 : m.last + 2] == ["."] for m in heads
        )):  # fmt: skip
            return None  # it is taken back, or another one stands at the head as the answer
        return choice, top

    def _same_breath(self, one: Mention, two: Mention) -> bool:
        between = self.tokens[one.last + 1 : two.first][:12]
        return one.last < two.first and known.BREAK.isdisjoint(between) and (
            _ENDS.isdisjoint(between)
        )  # fmt: skip

    # --------------------------------------------------------------------------- together

    def _add(self, new: Mention) -> None:
        last = self.mentions[-1] if self.mentions else None
        if last and self._together(last, new):
            last.choices |= new.choices
            last.last, last.quoted = new.last, last.quoted and new.quoted
        else:
            self.mentions.append(new)

    def _together(self, one: Mention, two: Mention) -> bool:
        between = self.tokens[one.last + 1 : two.first]
        same = one.choices == two.choices
        if len(between) > 6:
            return False
        if one.quoted != two.quoted and all(t in _GAP or t in ".,;" for t in between):
            return same or bool(between)  # B. London
        if self.tokens[max(0, one.first - 1)] == "as" and self._next(one.last) == "as":
            return True  # as positive as it is negative
        if between == ["."]:
            after = self.tokens[two.last + 1 : two.last + 3]
            more = len(after) == 2 and after[0] == "." and _number(after[1]) is not None
            return more or len(one.choices) > 1  # A. B. C.
        if not all(t in _GLUE or t in known.JOIN or _loose(t) for t in between):
            return False
        if not any(t in known.JOIN or t in "/&+|" for t in between):
            if self._next(two.last) in known.VERB and not same:
                return False  # B, A is wrong
            two.contrast = bool(between) and self._refused_before(one)
        return not two.contrast

    # ----------------------------------------------------------------------------- denial

    def _denied(self, mention: Mention) -> bool:
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
            if word in known.BREAK or word in _STOPS or _number(word) is not None or seen > 5:
                return False
            seen += word not in _GAP
        return False

    def _refused_after(self, mention: Mention) -> bool:
        """`is wrong`, `cannot be right`, `: incorrect`."""
        verb, seen = False, 0
        for at in range(mention.last + 1, min(len(self.tokens), mention.last + 9)):
            word, after = self.tokens[at], self._next(at)
            if word in _GAP:
                continue
            if word in known.BREAK or word in known.CLAUSE or word in _STOPS or seen > 5:
                return False
            if _number(word) is not None or _number(after) is not None:
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

    def _conceded(self, mention: Mention) -> bool:
        """Although it seems right; if you agree."""
        before = self.tokens[max(0, mention.first - 4) : mention.first]
        conceded = {"although", "though"} if mention is not self.mentions[0] else known.CONCEDED
        return (not conceded.isdisjoint(before) and _STOPS.isdisjoint(before)) or (
            self._next(mention.last) == "if"
        )  # fmt: skip

    def _asked(self, mention: Mention) -> bool:
        if self.bare and mention.first <= 2:
            return False
        return self.ends[mention.last] == "?"

    # ----------------------------------------------------------------------------- weight

    def _weight(self, mention: Mention, start: int) -> int:
        """How it is said; -1: in passing."""
        if self._final(mention):
            return FINALLY
        if mention.contrast or self._stated(mention, start) or self._right(mention):
            return STATED
        verb = self._next(mention.last) in known.VERB
        if (self._heads(mention, start) and not verb) or self._bold(mention):
            return AT_HEAD
        return AT_ALL if mention.quoted or self._heads(mention, start) else -1

    def _final(self, mention: Mention) -> bool:
        window = self.tokens[max(0, mention.first - 8) : mention.first]
        if FINAL in window[-3:]:
            return True
        label = window[window.index("final") :] if "final" in window else []
        return not known.ANSWER.isdisjoint(label) and _STOPS.isdisjoint(label)

    def _stated(self, mention: Mention, start: int) -> bool:
        at = mention.first - 1
        while at >= max(start, mention.first - 9) and (
            self.tokens[at] in _GAP - {":", "="} or self.tokens[at] in known.OPTION
            or (known.adverb(self.tokens[at]) and self.tokens[at] not in known.SO)
        ):  # fmt: skip
            at -= 1
        word = self.tokens[at] if at >= start else ""
        if word in ("?", "."):  # `A or B? B.` and `London is the capital. B`
            return self._closes(mention) and (word == "?" or self._sentence(at))
        if word == "," and at > start and self.tokens[at - 1] in known.SO:
            return True
        if word in known.BUT:
            return any(self._denied(m) for m in self.mentions if at - 3 <= m.last < at)
        return word in known.ANSWER or word in known.SO or self._introduced(at, start)

    def _introduced(self, at: int, start: int) -> bool:
        """`answer is`, `sentiment:`, `I would choose`, `it must be`: what leads up to token at."""
        named = at >= start and (self.tokens[at] in known.IS or self.tokens[at] in ":=")
        for back in range(at, max(start, at - 8) - 1, -1):
            word = self.tokens[back]
            if word in ("leaves", "leaving") or (
                word in known.SAY and self._first_person(back, start)
            ):
                return True
            if named and (
                word in _LABEL or word in known.SO or (word in known.SUBJECT and at - back <= 4)
            ):
                return True
            if word in known.BREAK or word in _STOPS or _number(word) is not None:
                return False
        return False

    def _first_person(self, at: int, start: int) -> bool:
        """`I would choose`, `choose`; not `many would choose`."""
        before = at - 1
        while before >= start and self.tokens[before] not in known.FIRST and (
            self.tokens[before] in known.WOULD or known.adverb(self.tokens[before])
        ):  # fmt: skip
            before -= 1
        word = self.tokens[before] if before >= start else ""
        return not word.isalnum() or word in known.FIRST or word in known.BREAK or word in known.SO

    def _closes(self, mention: Mention) -> bool:
        """It ends the sentence."""
        return all(t in _GAP for t in self.tokens[mention.last + 1 : mention.last + 2]) or (
            self._next(mention.last) in _STOPS
        )

    def _sentence(self, at: int) -> bool:
        """More than a word stands before this full stop, and nothing behind the next."""
        return at >= 2 and self.tokens[at - 1].isalnum() and self.tokens[at - 2].isalnum()

    def _right(self, mention: Mention) -> bool:
        at = mention.last + 1
        while at < len(self.tokens) and self.tokens[at] in _GAP:
            at += 1
        following = self.tokens[at : at + 6]
        if following[:1] and following[0] in ("✓", "✔", "✅"):
            return True
        if not following or following[0] not in known.VERB:
            closed = following[1:2] == [] or following[1] in _STOPS or following[1] in _GAP
            right = bool(following) and following[0] in known.RIGHT and closed
            return right or following[:2] == ["it", "is"] or following[:1] == ["remains"]
        if following[1:2] and following[1] in ("also", "equally"):
            mention.choices.add(-1)  # not the only one
        for word in following[1:]:
            if word in known.PARTLY:
                return False
            if word in known.RIGHT or word in known.ANSWER:
                return True
            if not (known.adverb(word) or word in ("be", "been", "also", "equally")):
                return False
        return False

    def _heads(self, mention: Mention, start: int) -> bool:
        return mention.first - start <= 12 and all(
            (not t.isalnum() and t not in _STOPS) or t in known.OPTION or known.adverb(t)
            for t in self.tokens[start : mention.first]
        )

    def _bold(self, mention: Mention) -> bool:
        before = self.tokens[max(0, mention.first - 2) : mention.first]
        return BOLD in before and BOLD in self.tokens[mention.last + 1 : mention.last + 4]

    def _next(self, at: int) -> str:
        return self.tokens[at + 1] if at + 1 < len(self.tokens) else ""
