"""Mentions of choices in a line of text: a letter, an option's text, a label.

Each becomes one character of Unicode's private use area, so that who reads the line need not know
what the choices look like. A word that only looks like one stays as it is: `A patient`,
`vitamin B`, `B cells`, `positive earnings`, `no evidence`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

from fedsim import vocabulary as known

Mark = Callable[[str], str]  # a plain line -> the same in lower case, with its mentions marked

ROOM = 0x800  # choices that can be told apart
NAMED, QUOTED = 0xE000, 0xE800  # choice 0 by its letter; by words that say it wherever they stand
FINAL, BOLD = "\uf8fe", "\uf8fd"  # a final answer follows; bold begins or ends
_SPACED = "\u0e00-\u0e7f\u2e80-\u2fff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # no spaces there
_SCRIPTS = known.ANSWER.union(
    known.OPTION, known.ISSUE, known.IS, known.SAY, known.NOT, known.SO, known.BUT, known.WRONG,
    known.RIGHT, known.JOIN, known.AFTER_LETTER, *known.SAME.values(),
)  # fmt: skip
_PARTS = re.compile(
    "|".join(sorted((w for w in _SCRIPTS if re.match(f"[{_SPACED}]", w)), key=len, reverse=True))
)
_LATEX = re.compile(r"\\(?:text\w*|math\w+|mbox|rm|bf)\b\s*|\\(?=[()\[\]])|\\[,;!]|[$`{}]")
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_TAG = re.compile(r"<(/?)([^<>]{0,30})>|\[(/?)(answer|ans)\]", re.IGNORECASE)
_IDIOMS = (
    (re.compile(r"\b(?:no|(?:without|beyond)(?: an?y?)?) doubt,?", re.IGNORECASE), "surely"),
    (re.compile(r"\bnot (?:wrong|incorrect|false|untrue)\b", re.IGNORECASE), "right"),
    (re.compile(r"\blet's\b", re.IGNORECASE), "let us"),
    (re.compile(r"\bans\.", re.IGNORECASE), "ans:"),
)
_SIGNS = str.maketrans(
    "’‘´„“”«»「」『』【】〔〕〈〉《》。",  # noqa: RUF001
    '\'\'\'"""""""""()()()().',
)
_SHORT = re.compile(r"n't\b|\bcannot\b|\b(it|that|here|answer)'s\b|'(d|ll|re|m)\b", re.IGNORECASE)
_LONG = {"d": " would", "ll": " will", "re": " are", "m": " am"}


def plain(line: str) -> str:
    """Without markup, accents and contractions; words of scripts without spaces stand alone."""
    text = known.fold(re.sub("[\ue000-\uf8ff]", "", line).translate(_SIGNS))
    text = _TAG.sub(_tag, _BOX.sub(FINAL, text))
    text = re.sub(r"^\s*####(?!#)", FINAL, re.sub(r"(?<!\w)'(\w+)'(?!\w)", r'"\1"', text))
    text = re.sub(r"\*\*|(?<!\w)__|__(?!\w)", BOLD, _LATEX.sub("", text))
    text = re.sub(r"\*|~~|(?<!\w)_|_(?!\w)", "", text)
    for idiom, meaning in _IDIOMS:
        text = idiom.sub(meaning, text)
    text = re.sub(f"[{_SPACED}]+", lambda run: f" {_PARTS.sub(_apart, run[0])} ", text)
    return _SHORT.sub(_spelt, text)


def _tag(found: re.Match[str]) -> str:
    name = (found[2] or found[4] or "").lower()
    if "answer" in name or name == "ans":
        return ". " if found[1] or found[3] else FINAL
    return " "


def _apart(part: re.Match[str]) -> str:
    return f" {part[0]} "


def _spelt(found: re.Match[str]) -> str:
    if found[1]:
        return f"{found[1]} is"
    return _LONG[found[2].lower()] if found[2] else f"{'can' if found[0][0] in 'cC' else ''} not"


# ------------------------------------------------------------------------------------- marks

_SPECIES = [[species] for species in known.SPECIES]
_LAST = re.compile(r"([^\W_]+)\s+$")
_NEXT = re.compile(r"\s+([^\W_]{2,}|i\b)", re.IGNORECASE)
_LETTER_BEFORE = (
    known.BEFORE_LETTER
    | known.ANSWER
    | known.OPTION
    | known.IS
    | known.ISSUE
    | known.SAY
    | known.NOT
    | known.BREAK
)


def _last(found: re.Match[str]) -> str:
    """The word directly before."""
    start = max(0, found.start() - 24)
    last = _LAST.search(found.string[start : found.start()])
    return last[1].lower() if last else ""


def _next(found: re.Match[str]) -> str:
    following = _NEXT.match(found.string, found.end())
    return following[1].lower() if following else ""


def _fits(word: str, beside: Collection[str]) -> bool:
    return not word or word in beside or word.endswith("ly")


@lru_cache(1024)
def labels(choices: tuple[str, ...], leading: bool = False) -> Mark:
    """Marks the words that are the choices themselves.

    Args:
        leading: they begin a sentence or stand for it (yes, no); elsewhere they belong to a word.
    """
    spelt = {known.fold(choice).strip().lower(): i for i, choice in enumerate(choices[:ROOM])}
    for word in spelt.keys() & known.SAME:
        spelt = dict.fromkeys(known.SAME[word], spelt[word]) | spelt
    either = "|".join(map(re.escape, sorted(filter(None, spelt), key=len, reverse=True)))
    found = re.compile(
        rf"(?<![\w])(?<!\w[.-])({either or '(?!)'})\1*(?!\w)(?!['.-]\w|\.\s*\d)", re.I
    )

    def mark(mention: re.Match[str]) -> str:
        word, following = mention[1].lower(), _next(mention)
        number = spelt.get(word)
        if number is None:  # an i without its dot
            return mention[0]
        if leading:
            last = _last(mention)
            fits = (last in spelt or _fits(last, known.BEFORE_LEADING)) and last not in known.HEDGE
            fits = fits and (word != "no" or following in spelt or _fits(following, known.AFTER_NO))
            return chr(NAMED + number) if fits else mention[0]
        fits = following in spelt or _fits(following, known.AFTER_LABEL)
        return chr(QUOTED + number) if fits else mention[0]

    return lambda line: found.sub(mark, line).lower()


def spellings(options: Sequence[str]) -> list[str]:
    """Patterns of options' texts, whatever stands between their words; "" of one that has none or
    shares it with another."""
    parts = (re.findall(r"[^\W_]+", plain(option)) for option in options)
    spelt = [r"[\W_]{1,9}".join(map(re.escape, words)) for words in parts]
    return [text if spelt.count(text) == 1 else "" for text in spelt]


@lru_cache(1024)
def letters(options: tuple[str, ...]) -> Mark:
    """Marks the letters of options, and their texts where these are words and no mere numbers."""
    last = chr(ord("A") + max(len(options), 1) - 1)
    spelt = spellings(options)
    told = [i for i, text in enumerate(spelt) if re.search(r"[^\W\d_]{3}", text)]
    told.sort(key=lambda i: -len(spelt[i]))
    either = "|".join(rf"({spelt[i]})" for i in told)
    quoted = re.compile(rf"(?<!\w)(?:{either or '(?!)'})(?!\w)", re.IGNORECASE)
    upper = re.compile(
        rf"(?<![\w'])(?<!\w[.-])([A-{last}])(?!['\w])(?!-\w)(?![+#]|\.[A-Za-z]\b|\.[A-Za-z]{{1,3}}\.|\s*[%°])"
    )
    ordinal = re.compile(
        rf"\b({'|'.join(o for o, i in known.ORDINAL.items() if i < len(options))})"
        r"\s+(?:answer\s+)?(?:option|choice|alternative)\b", re.IGNORECASE,
    )  # fmt: skip
    cue = rf"\b(?:{'|'.join(known.ANSWER | known.OPTION | known.IS)})\b|[:=]"
    small = re.compile(
        rf"(^[\W_]*|[{FINAL}(]|(?i:{cue})[\s\"'(]*)([a-{last.lower()}])"
        rf"(?=\)|[.:,;]?[\s\".{BOLD}]*$|[.:]\s)"
    )  # fmt: skip
    short = [
        (i, re.compile(rf"({chr(NAMED + i)}[\s.):,(-]*|(?:{cue})[\s\"'(]*){spelt[i]}"
                       rf"(?=[\s\"').!,;]*(?:$|{chr(NAMED + i + 1)}))", re.IGNORECASE))
        for i in range(len(options)) if spelt[i] and i not in told
    ]  # fmt: skip

    def mark(mention: re.Match[str]) -> str:
        number, text, end = ord(mention[0]) - ord("A"), mention.string, mention.end()
        quote = re.match(rf"\s([{chr(QUOTED)}-\uefff])", text[end : end + 2])
        if mention[0] == "A" and quote and quote[1] != chr(QUOTED):
            return "A"  # the article
        if text[end : end + 2] == ". " and text[end + 2 : end + 16].split()[:1] in _SPECIES:
            return mention[0]
        enclosed = mention.start() and text[mention.start() - 1] in f'("{FINAL}'
        last = _last(mention)
        before = len(last) == 1 or _fits(last, _LETTER_BEFORE)
        fits = before and _fits(_next(mention), known.AFTER_LETTER)
        return chr(NAMED + number) if fits or enclosed else mention[0]

    def line(text: str) -> str:
        text = ordinal.sub(lambda s: chr(NAMED + known.ORDINAL[s[1].lower()] % len(options)), text)
        text = quoted.sub(lambda found: chr(QUOTED + told[(found.lastindex or 1) - 1]), text)
        text = upper.sub(mark, text)
        text = small.sub(lambda s: s[1] + chr(NAMED + ord(s[2].lower()) - ord("a")), text)
        for number, pattern in short:
            text = pattern.sub(rf"\g<1>{chr(QUOTED + number)}", text)
        return text.lower()

    return line
