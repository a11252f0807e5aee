"""Small Python functions, written for this project, for use without a network.

A function chooses items, makes something of each and gathers the results. What a test expects comes
from the meaning of these three parts, not from the code. The combinations of parts that the test
holds do not occur in training; each part does.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from fedsim.data.embedded.chance import draw, shuffled
from fedsim.data.embedded.function import Family, Function, Part

TRAINED, HELD_OUT = 100, 8  # functions of each family, as far as there are so many


def _shapes(makes: tuple[Part, ...], gathers: tuple[Part, ...]) -> tuple[tuple[Part, Part], ...]:
    return tuple((make, gather) for make in makes for gather in gathers)


_LIST = Part("list", "the list of {}", "[{}]", list, "found")
_SORTED = Part("sorted", "the sorted list of {}", "sorted({})", sorted, "sorted(found)")
_DISTINCT = Part(
    "distinct", "how many different values there are among {}", "len({{{}}})",
    lambda xs: len(set(xs)), "len(set(found))",
)  # fmt: skip
_NUMBERS = (
    *(_LIST, _SORTED, _DISTINCT, Part("sum", "the sum of {}", "sum({})", sum, "sum(found)")),
    Part("largest", "the largest of {}, or 0 if there are none", "max(({}), default=0)",
         lambda xs: max(xs, default=0), "max(found, default=0)"),
    Part("smallest", "the smallest of {}, or 0 if there are none", "min(({}), default=0)",
         lambda xs: min(xs, default=0), "min(found, default=0)"),
)  # fmt: skip
_TEXTS = (
    *(_LIST, _SORTED, _DISTINCT),
    Part("spaced", "a string of {}, separated by spaces", "' '.join({})", " ".join,
         "' '.join(found)"),
    Part("hyphenated", "a string of {}, separated by hyphens", "'-'.join({})", "-".join,
         "'-'.join(found)"),
    Part("first", "the first of {}, or '' if there are none", "next(({}), '')",
         lambda xs: xs[0] if xs else "", "found[0] if found else ''"),
)  # fmt: skip
_GLUED = (
    *(_LIST, _DISTINCT, Part("count", "the number of {}", "len([{}])", len, "len(found)")),
    Part("joined", "a string of {}", "''.join({})", "".join, "''.join(found)"),
)
_TABLE = Part("dict", "a dictionary of {}", "{{{}}}", dict)


def _arithmetic(x: str) -> tuple[Part, ...]:
    """What can be made of a number."""
    return (
        Part("", "{}", x, lambda n: n),
        Part("squared", "the squares of {}", f"{x} * {x}", lambda n: n**2),
        Part("doubled", "the doubles of {}", f"2 * {x}", lambda n: n + n),
        Part("cubed", "the cubes of {}", f"{x} ** 3", lambda n: n * n * n),
        Part("negated", "the negatives of {}", f"-{x}", lambda n: 0 - n),
        Part("absolute", "the absolute values of {}", f"abs({x})", lambda n: max(n, -n)),
    )


def _rewriting(x: str) -> tuple[Part, ...]:
    """What can be made of a text that is not empty."""
    return (
        Part("", "{}", x, lambda s: s),
        Part("upper", "{}, each in capital letters", f"{x}.upper()", str.upper),
        Part("reversed", "{}, each spelled backwards", f"{x}[::-1]",
             lambda s: "".join(reversed(s))),
        Part("capitalized", "{}, each with a capital first letter", f"{x}.capitalize()",
             str.capitalize),
        Part("initial", "the first letters of {}", f"{x}[0]", lambda s: next(iter(s))),
        Part("final", "the last letters of {}", f"{x}[-1]", lambda s: s[len(s) - 1]),
    )  # fmt: skip


LISTS = Family(
    "numbers", "in the list numbers", "n in numbers", iter,
    (
        Part("numbers", "numbers", "", lambda n: True),
        Part("even", "even numbers", "n % 2 == 0", lambda n: not n & 1),
        Part("odd", "odd numbers", "n % 2 == 1", lambda n: bool(n & 1)),
        Part("positive", "positive numbers", "n > 0", lambda n: n >= 1),
        Part("negative", "negative numbers", "n < 0", lambda n: n <= -1),
        Part("above_5", "numbers greater than 5", "n > 5", lambda n: n >= 6),
        Part("below_4", "numbers less than 4", "n < 4", lambda n: n <= 3),
        Part("multiples_of_3", "multiples of 3", "n % 3 == 0", lambda n: n == n // 3 * 3),
    ),
    _shapes(_arithmetic("n"), _NUMBERS),
    ([3, -2, 7, 8, 6, -5], [], [1, 2, 3, 4, 5, 6, 7, 8, 9], [-3, -3, 12, 0, 5, 4], [10, -9, 10, 15],
     [2, -2, 3, -3, 6], [-4, -1, -7], [7, 1, 11, 5], [20], [-6, 9, 3, -8]),
)  # fmt: skip
DIGITS = Family(
    "n", "of the whole number n", "digit in map(int, str(n))", lambda n: map(int, str(n)),
    (
        Part("digits", "digits", "", lambda d: True),
        Part("even_digits", "even digits", "digit % 2 == 0", lambda d: d in (0, 2, 4, 6, 8)),
        Part("odd_digits", "odd digits", "digit % 2 == 1", lambda d: d in (1, 3, 5, 7, 9)),
        Part("high_digits", "digits greater than 4", "digit > 4", lambda d: d >= 5),
        Part("low_digits", "digits less than 4", "digit < 4", lambda d: d <= 3),
    ),
    _shapes(_arithmetic("digit")[:5], _NUMBERS),
    (38275, 0, 9, 4, 12, 6614, 90817, 5555, 2048, 731964),
)  # fmt: skip
RANGES = Family(
    "n", "from 1 to n", "i in range(1, n + 1)", lambda n: range(1, n + 1),
    (
        Part("up_to", "whole numbers", "", lambda i: True),
        Part("odd_up_to", "odd numbers", "i % 2 == 1", lambda i: bool(i & 1)),
        Part("multiples_of_4_up_to", "multiples of 4", "i % 4 == 0", lambda i: i == i // 4 * 4),
        Part("no_multiples_of_3_up_to", "numbers that 3 does not divide", "i % 3 != 0",
             lambda i: i % 3 in (1, 2)),
        Part("ending_in_5_up_to", "numbers that end in 5", "i % 10 == 5",
             lambda i: str(i)[-1] == "5"),
    ),
    _shapes(_arithmetic("i")[:5], _NUMBERS),
    (9, 0, 1, 2, 3, 4, 6, 8, 16, 25),
)  # fmt: skip
WORDS = Family(
    "text", "in the string text", "word in text.split()", str.split,
    (
        Part("words", "words", "", lambda w: True),
        Part("long_words", "words of more than 4 letters", "len(word) > 4", lambda w: w[4:] != ""),
        Part("short_words", "words of less than 4 letters", "len(word) < 4", lambda w: not w[3:]),
        Part("vowel_words", "words that start with a vowel", "word[0] in 'aeiouAEIOU'",
             lambda w: w.lower().startswith(("a", "e", "i", "o", "u"))),
        Part("s_words", "words that end in s", "word.endswith('s')", lambda w: w[-1] == "s"),
        Part("a_words", "words with the letter a", "'a' in word", lambda w: w.count("a") > 0),
        Part("names", "words that start with a capital letter", "word[0].isupper()",
             lambda w: w[0] != w[0].lower()),
    ),
    _shapes(_rewriting("word"), _TEXTS)
    + _shapes((Part("lengths", "the lengths of {}", "len(word)", lambda w: sum(1 for _ in w)),),
              _NUMBERS),
    ("Anna sees us and ants in Paris", "", "glass", "an apple falls on Oslo", "Is it Ida or Ava",
     "big cats chase small mice", "the sun rises", "eggs EGGS oaks", "a b a", "trees tall as Oaks"),
)  # fmt: skip
LETTERS = Family(
    "text", "in the string text", "char in text", iter,
    (
        Part("vowels", "vowels", "char in 'aeiouAEIOU'", lambda c: c.lower() in set("aeiou")),
        Part("digit_characters", "digits", "char.isdigit()", lambda c: c in set("0123456789")),
        Part("letters", "letters", "char.isalpha()", lambda c: c.lower() != c.upper()),
        Part("capitals", "capital letters", "char.isupper()", lambda c: c != c.lower()),
        Part("small", "small letters", "char.islower()", lambda c: c != c.upper()),
        Part("non_spaces", "characters other than spaces", "char != ' '", lambda c: c not in " "),
        Part("late", "characters from m to z", "'m' <= char <= 'z'",
             lambda c: c in set("mnopqrstuvwxyz")),
    ),
    _shapes((_rewriting("char")[0], _rewriting("char")[1],
             Part("twice", "{}, each written twice", "char * 2", lambda c: c + c)), _GLUED)
    + _shapes((Part("codes", "the character codes of {}", "ord(char)",
                    lambda c: int.from_bytes(c.encode("latin-1"), "big")),), _NUMBERS),
    ("Room 12, Aisle b4", "", "hello world", "ABBA aha", "x9y8 Zoo", "2024", "so many mm Mm",
     "EiNs 1 1", "Q?", "umpteen"),
)  # fmt: skip
TABLES = Family(
    "table", "of the dictionary table", "key, value in table.items()", dict.items,
    (
        Part("entries", "entries", "", lambda e: True),
        Part("above_3", "entries with a value greater than 3", "value > 3", lambda e: e[1] >= 4),
        Part("even_values", "entries with an even value", "value % 2 == 0", lambda e: not e[1] & 1),
        Part("negative_values", "entries with a negative value", "value < 0", lambda e: e[1] <= -1),
        Part("long_keys", "entries with a key of more than 3 letters", "len(key) > 3",
             lambda e: e[0][3:] != ""),
        Part("a_keys", "entries with a key that starts with a", "key.startswith('a')",
             lambda e: e[0][0] == "a"),
    ),
    _shapes((Part("keys", "the keys of {}", "key", lambda e: e[0]),
             Part("upper_keys", "the keys of {}, each in capital letters", "key.upper()",
                  lambda e: e[0].upper())), _TEXTS)
    + _shapes((Part("values", "the values of {}", "value", lambda e: e[1]),
               Part("squared_values", "the squared values of {}", "value * value",
                    lambda e: e[1] ** 2)), _NUMBERS)
    + _shapes((Part("", "{}", "key: value", lambda e: e),
               Part("doubled", "{}, with doubled values", "key: 2 * value",
                    lambda e: (e[0], e[1] + e[1])),
               Part("swapped", "{}, with keys and values swapped", "value: key",
                    lambda e: (e[1], e[0]))), (_TABLE,)),
    ({"apple": 4, "fig": 7, "pear": -2, "ant": 3}, {}, {"axe": 5}, {"plum": 3, "ale": 8, "tea": -1},
     {"avocado": -6, "kiwi": 6, "oat": 10}, {"art": 1, "bee": 4, "acorn": 4},
     {"nut": -3, "almond": 0}, {"corn": 9, "anise": 2, "dill": -8, "a": -5}),
)  # fmt: skip
FAMILIES = (LISTS, DIGITS, RANGES, WORDS, LETTERS, TABLES)


def functions(split: str) -> Iterator[Function]:
    """The functions of a split, "train" or "test": no two of a family agree on all inputs."""
    for i, family in enumerate(FAMILIES):
        # To return the argument as it is asks for nothing: its values are taken.
        different: dict[str, Function | None] = {repr(list(family.inputs)): None}
        for choose, (make, gather) in product(family.choose, family.shapes):
            function = Function(family, choose, make, gather)
            different.setdefault(repr([function.value(x) for x in family.inputs]), function)
        order = shuffled(filter(None, different.values()), "coding", i)
        yield from order[:HELD_OUT] if split == "test" else order[HELD_OUT:][:TRAINED]


def _row(i: int, function: Function) -> tuple[str, str, str]:
    """Instruction, input and output of a training row."""
    name, argument, words = function.name, function.family.argument, function.words
    body = (function.short, function.long)[draw("body", i) % 2]
    code = f"{function.head}{body}".rstrip()
    first = function.family.inputs[0]
    return (
        (f"Write a Python function {name} that returns {words}.", "", code),
        (f"Implement {name}({argument}) in Python. It returns {words}.",
         f"{name}({first!r}) returns {function.value(first)!r}", code),
        (f"Define a Python function called {name} with one argument, {argument}. "
         f"The result is {words}.", "", code),
        ("Complete the Python function.", function.prompt,
         f"{function.prompt}{function.short}".rstrip()),
    )[draw("wording", i) % 4]  # fmt: skip


def train() -> list[dict[str, str]]:
    """The training rows with the columns of Code Alpaca: instruction, input, output."""
    rows = [_row(i, function) for i, function in enumerate(functions("train"))]
    names = ("instruction", "input", "output")
    return [dict(zip(names, row)) for row in shuffled(rows, "coding")]


def test() -> list[dict[str, str]]:
    """The held-out functions with the columns of HumanEval."""
    rows = []
    for i, f in enumerate(shuffled(functions("test"), "coding")):
        checks = [f"    assert candidate({x!r}) == {f.value(x)!r}\n" for x in f.family.inputs]
        rows.append({
            "task_id": f"snippets/{i}", "prompt": f.prompt, "entry_point": f.name,
            "canonical_solution": f.short, "test": "def check(candidate):\n" + "".join(checks),
        })  # fmt: skip
    return rows
