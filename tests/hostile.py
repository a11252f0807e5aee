"""Texts that a model may write and rows that a file may hold: typed, drawn and malicious."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

ANSWERS = (
    "", " ", "\n", "A", " A", "\nA", "A.", "a", "a)", "(B)", " b ", "B. Paris", "C\n\nQuestion:",
    "E", "F", "1", "Ab", "A B", "AB", "**D**", "'D'", "d, because", "The answer is B", "Answer: C",
    "I think", "None of the above", "\\boxed{B}", "<|im_end|>", "<|im_start|>answer\nA", "</s>B",
    "yes", "Yes", "YES.", "yes yes", "Yesyes", "yesno", "noyes", "nono", "nonono", "yesyesyes",
    "no", "No,", "not", "nope", "maybe", "Maybe", "maybe.", "MAYBE", " maybe", "yes or no",
    "## A", "\n## B\n", "\n##", "\n## \nA", "A\n## B", "\n##c\nd", "\n##\n## D", "x\n### yes\nno",
    "### Response: A", "\r\n## A", "\n # # A", "\uff21", "\u24b6", "\u0410",
    "\xe1", "\xdf", "\u0130", "\u0131", "\u212a", "\ufeffA", "\u200bB", "\u00a0C", "答案是A", "🙂",
    "🙂A", "\x00A", "\x1b[1mB", "\ufffd", "\u03a3", "\u0391\u03a3",
    "yes\u0301", "ye s", "y e s", "N.O", "no\n## yes\n## no", "the answer is:a###", "a###",
)  # fmt: skip
SENTIMENTS = (
    "positive", "Positive", "POSITIVE", " Positive ...", "It is not positive", "negative",
    "Negative\n", "NEGATIVE", "neutral", "Neutral", "negative, not positive", "positively",
    "unpositive", "posi tive", "pos\nitive", "nonnegative", "neutral/negative/positive", "None",
    "Answer: positive", "neutral Answer: positive", "negative\nInput: x\nAnswer: positive",
    "Answer:positive", "Answer:  negative", "nswer: positive",
    "\nInstruction: positive", "Positivo",
    "p\u00f6sitive", "positive\x00", "[PAD]negative", "{negative/neutral/positive}", "🙂 positive",
)  # fmt: skip
PROGRAMS = (
    "    return 1\n", "    pass\n\n\ndef g():\n    return 2\n", "  return x;\n}\n\nfunction f(){}",
    "    return 0;\n}\nint main() {}", "    return 1\nprint(2)", "    return 1\n  print(2)\nif x:",
    "\nclass A:\n    pass", "\n#include <x>", "\n@cache", "\n```", "```python\nreturn 1\n```",
    "\nassert f(1) == 2", '\n"""', "\n<|/", "\n/* c */", "\n//", " // c\n", "\nconsole.log(1)",
    "<file_sep>", "return 1<file_sep>\ndef", "\n\ndef", "\ndefinitely", "\nifs", "\n if",
    "\r\ndef f",
    "\\n", "}", "\n }", "\n}", "\t\n", "return '\x00'", "return 'é🙂'", "\n<|", "<|endoftext|>",
)  # fmt: skip
RECORDED = (*ANSWERS, *SENTIMENTS, *PROGRAMS)

_MARKS = (
    *RECORDED, "Answer: ", "Answer", ": ", "### Response:", "###", "\n##", "##", "\n", "\r", "  ",
    "positive", "negative", "Posi", "tive", "yes", "no", "maybe", "A", "b", "C.", "option ",
    "answer is ", "not ", "n't ", "```", "\ndef ", "\nclass", "\n#", "\n}", "int main", "(?", ".*+",
    "[a-", "\\", "(a+)+$", "\\d", "{name}", "{0}", "%s", "$(x)", "\x00", "\u2028", "\x85", "\x1c",
)  # fmt: skip
_RANGES = ((0x00, 0x7F), (0x20, 0x7E), (0x80, 0x24F), (0x300, 0xD7FF), (0xE000, 0x10FFFF))


def text(rng: random.Random) -> str:
    """Marks, their fragments and code points from all of Unicode but the surrogates."""
    parts = []
    for _ in range(rng.randrange(6)):
        mark = rng.choice(_MARKS)
        low, high = rng.choice(_RANGES)
        drawn = "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(5)))
        parts.append(rng.choice((mark, mark[: rng.randint(0, len(mark))], drawn, mark.upper())))
    return "".join(parts)


def long_texts(size: int) -> Iterator[str]:
    """What would make a backtracking or quadratic reader hang."""
    units = (
        "A", " ", "\n", "a ", "no ", "not ", "is ", "answer is ", "option ", "_", "(", "`", "```\n",
        "\n##", "Answer: ", "positive/", "yesno", "\ndef f(", "\n}", "    ", "x = ", "#", "* ", "'",
        "\t\n", "🙂", "\u0301", "n't", "the answer ", "async ", "@a\n", "const f = ", "function f(",
    )  # fmt: skip
    for unit in units:
        whole = (unit * (size // len(unit) + 1))[:size]
        yield whole
        yield f"The answer{whole}!"


_DEEP: list[Any] = []
for _ in range(5000):  # deeper than the interpreter prints
    _DEEP = [_DEEP]
_JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 4, 5, 26, 99, 2**63, -(10**30), 10**400, 0.0, -0.1, 0.1, 1.5,
    2.0, float("nan"), float("inf"), -float("inf"), "", " ", "0", "2", "A", "E", "nan", "None",
    "post", "yes", "maybe", "Maybe", "it's", "?", "x" * 100_000, "{name}", "(", "[", "\x00", b"A",
    [], [[]], [None], [1, 2, 3, 4], ["a"], ["a", "b", "c", "d"], ["same"] * 4, ["a"] * 30,
    ("a", "b"),
    {}, {"key": "A"}, {"A": "a", "B": "b"}, [{"key": "A", "value": "a"}], [{"value": None}], {1, 2},
    [{}], _DEEP, {"a": {"b": [{"c": None}]}}, 1j, object(), print, range(4), "\ud800",
)  # fmt: skip

LINES = (  # none of them is a row of a sentence and a label
    "", "null", '""', "1", "[]", "{}", "\x00", "no JSON", '{"sentence": "x"}', '{"label": 1}',
    '{"sentence": null, "label": 1}', '{"sentence": "x", "label": null}', "[" * 100_000,
    '{"sentence": ' * 5000, '{"sentence": "x", "label": NaN}', '{"sentence": "x", "label": 1e999}',
    '{"sentence": "x", "label": ' + "9" * 5000 + "}", '{"sentence": "x", "label": [[[1]]]}',
    '{"sentence": "\\ud800", "label": 1}', '{"sentence": {"x": []}, "label": 1}',
    '{"sentence": "x", "label": "one"}', '{"sentence": "x", "label": 3}', '{"sentence": "x", "la',
)  # fmt: skip


def row(rng: random.Random, valid: dict[str, Any]) -> Any:
    """A row with junk in, or without, some of its columns; sometimes no row at all."""
    if rng.random() < 0.02:
        return rng.choice(_JUNK)
    out: dict[Any, Any] = dict(valid)
    for column in rng.sample(list(valid), rng.randint(1, min(3, len(valid)))):
        fate = rng.random()
        if fate < 0.15:
            del out[column]
        elif fate < 0.25:
            out[column] = text(rng)
        elif fate < 0.35 and isinstance(out[column], list):
            out[column] = rng.choice((out[column][:-1], out[column] * 9, [*out[column], None]))
        else:
            out[column] = rng.choice(_JUNK)
    return out
