"""What a line says: the choice that it says most plainly, if that is one.

Mentions that are denied, conceded or asked fall away. The rest counts by how it is said: as the
final answer, as the answer, at the head of the line, or at all.
"""

from __future__ import annotations

from fedsim import vocabulary as known
from fedsim.lines import ENDS, GAP, STOPS, Line, Mention, number
from fedsim.mentions import BOLD, FINAL

AT_ALL, AT_HEAD, STATED, FINALLY, EXACT = range(5)
_LABEL = known.ANSWER | known.OPTION | known.ISSUE


def told(line: Line) -> tuple[int, int] | None:
    """The choice and how it is said; None: none, or several."""
    live = [m for m in line.mentions if not (line.denied(m) or line.conceded(m) or line.asked(m))]
    fixed = [at for at, token in enumerate(line.tokens) if token in known.CORRECTION]
    if fixed:  # the answer is A. Wait, no, B
        start = fixed[-1] + 1
        while line.tokens[start : start + 1] and line.tokens[start] in (",", ".", "no"):
            start += 1
        weighty = _weightiest(line, [m for m in live if m.first >= start], start)
        if weighty and weighty[1] > AT_ALL:
            return weighty
    return _weightiest(line, live, 0)


def _weightiest(line: Line, mentions: list[Mention], start: int) -> tuple[int, int] | None:
    weighed = [(_weight(line, m, start), m) for m in mentions]
    top = max((weight for weight, _ in weighed), default=-1)
    said = [m for weight, m in weighed if weight == top]
    choices = set().union(*(m.choices for m in said))
    if top < 0 or len(choices) != 1:
        return None
    (choice,) = choices
    after = [m for m in line.mentions if m.first > said[-1].last and choice in m.choices]
    if top == AT_HEAD and said[-1].quoted and any(
        weight == AT_ALL and choice not in m.choices and _same_breath(line, said[-1], m)
        for weight, m in weighed
    ):  # fmt: skip
        return None  # positive for shareholders, negative for employees
    heads = [m for weight, m in weighed if weight == AT_HEAD and not m.quoted]
    if any(line.denied(m) for m in after) or (top == STATED and any(
        choice not in m.choices and line.tokens[m.last + 1 : m.last + 2] == ["."] for m in heads
    )):  # fmt: skip
        return None  # it is taken back, or another one stands at the head as the answer
    return choice, top


def _same_breath(line: Line, one: Mention, two: Mention) -> bool:
    between = line.tokens[one.last + 1 : two.first][:12]
    return one.last < two.first and known.BREAK.isdisjoint(between) and (
        ENDS.isdisjoint(between)
    )  # fmt: skip


def _weight(line: Line, mention: Mention, start: int) -> int:
    """How it is said; -1: in passing."""
    if _final(line, mention):
        return FINALLY
    if mention.contrast or _stated(line, mention, start) or _right(line, mention):
        return STATED
    verb = line.following(mention.last) in known.VERB
    if (_heads(line, mention, start) and not verb) or _bold(line, mention):
        return AT_HEAD
    return AT_ALL if mention.quoted or _heads(line, mention, start) else -1


def _final(line: Line, mention: Mention) -> bool:
    window = line.tokens[max(0, mention.first - 8) : mention.first]
    if FINAL in window[-3:]:
        return True
    label = window[window.index("final") :] if "final" in window else []
    return not known.ANSWER.isdisjoint(label) and STOPS.isdisjoint(label)


def _stated(line: Line, mention: Mention, start: int) -> bool:
    at = mention.first - 1
    while at >= max(start, mention.first - 9) and (
        line.tokens[at] in GAP - {":", "="} or line.tokens[at] in known.OPTION
        or (known.adverb(line.tokens[at]) and line.tokens[at] not in known.SO)
    ):  # fmt: skip
        at -= 1
    word = line.tokens[at] if at >= start else ""
    if word in ("?", "."):  # `A or B? B.` and `London is the capital. B`
        return _closes(line, mention) and (word == "?" or _sentence(line, at))
    if word == "," and at > start and line.tokens[at - 1] in known.SO:
        return True
    if word in known.BUT:
        other = mention.previous
        return other is not None and other.last >= at - 3 and line.denied(other)
    return word in known.ANSWER or word in known.SO or _introduced(line, at, start)


def _introduced(line: Line, at: int, start: int) -> bool:
    """`answer is`, `sentiment:`, `I would choose`, `it must be`: what leads up to token at."""
    named = at >= start and (line.tokens[at] in known.IS or line.tokens[at] in ":=")
    for back in range(at, max(start, at - 8) - 1, -1):
        word = line.tokens[back]
        if word in ("leaves", "leaving") or (
            word in known.SAY and _first_person(line, back, start)
        ):
            return True
        if named and (
            word in _LABEL or word in known.SO or (word in known.SUBJECT and at - back <= 4)
        ):
            return True
        if word in known.BREAK or word in STOPS or number(word) is not None:
            return False
    return False


def _first_person(line: Line, at: int, start: int) -> bool:
    """`I would choose`, `choose`; not `many would choose`."""
    before = at - 1
    while before >= max(start, at - 6) and line.tokens[before] not in known.FIRST and (
        line.tokens[before] in known.WOULD or known.adverb(line.tokens[before])
    ):  # fmt: skip
        before -= 1
    word = line.tokens[before] if before >= start else ""
    return not word.isalnum() or word in known.FIRST or word in known.BREAK or word in known.SO


def _closes(line: Line, mention: Mention) -> bool:
    """It ends the sentence."""
    return all(t in GAP for t in line.tokens[mention.last + 1 : mention.last + 2]) or (
        line.following(mention.last) in STOPS
    )


def _sentence(line: Line, at: int) -> bool:
    """More than one word stands before this full stop."""
    return at >= 2 and line.tokens[at - 1].isalnum() and line.tokens[at - 2].isalnum()


def _right(line: Line, mention: Mention) -> bool:
    """`is correct`, `seems the best answer`, `remains`."""
    at = mention.last + 1
    while at < len(line.tokens) and line.tokens[at] in GAP:
        at += 1
    following = line.tokens[at : at + 6]
    if following[:1] and following[0] in ("✓", "✔", "✅"):
        return True
    if not following or following[0] not in known.VERB:
        if following[:1] and following[0] in known.RIGHT:  # B: correct.
            return len(following) == 1 or following[1] in STOPS or following[1] in GAP
        return following[:2] == ["it", "is"] or following[:1] == ["remains"]
    for word in following[1:]:
        if word in known.PARTLY:
            return False
        if word in known.RIGHT or word in known.ANSWER:
            return True
        if not (known.adverb(word) or word in ("be", "been", "also", "equally")):
            return False
    return False


def _heads(line: Line, mention: Mention, start: int) -> bool:
    return mention.first - start <= 12 and all(
        (not t.isalnum() and t not in STOPS) or t in known.OPTION or known.adverb(t)
        for t in line.tokens[start : mention.first]
    )


def _bold(line: Line, mention: Mention) -> bool:
    before = line.tokens[max(0, mention.first - 2) : mention.first]
    return BOLD in before and BOLD in line.tokens[mention.last + 1 : mention.last + 4]
