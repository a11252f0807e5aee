"""The project's own sets: counts, balance, held-out rows, right references, pinned rows.

Finance: disjoint patterns and companies, numbers that follow the stated direction. General and
medical: a rule that does not know the facts is at chance, one that looks them up in the training
rows is right. Exercises are solved again here. Coding: every function is executed; what a test
expects was written without the code, and rejects every other function of its family. About 15 s.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from types import ModuleType

import pytest

from fedsim.data.embedded import coding, exercises, finance, general, medical

SETS = {"coding": coding, "finance": finance, "general": general, "medical": medical}
QUIZZES = [general, medical]
SHA256 = {
    ("coding", "train"): "df9365aa62813f6ce936d07ab1d0aa0061029ea3a8c8ccf27aa79adc34f2fd88",
    ("coding", "test"): "3d1f290c92ece0c55b3d317f5f1f3cf8a862e089d0e37d90c25b30239406504c",
    ("general", "train"): "6620e4c24a6739c6829595489685e69bb4154fb286cb611bdabd385ac55da70a",
    ("general", "test"): "6e153719a8831d1ab4a1b4c9bfe3c0fbf945d742e05a8e84a1c85b674d3b780a",
    ("medical", "train"): "d2c299a53905e2eadc0031c08ac504cc1002536412f5ae3f29429a336acffa95",
    ("medical", "test"): "b223ba034d48793da41800b05638a57e059bb5ee649ef675a55de2d6e6c800b8",
    ("finance", "train"): "6da2a9c7568135d09fde67431ed143fcba362bceca50522dedde3e567be72262",
    ("finance", "test"): "22a006f6a5e91fb9e2ccb4f41210fe1ca72a0f7b3ad84bf90419ce7dd60e9130",
}
STOP = (
    "a an the of in on at to for from and or is are was were be been has have had it its that "
    "this with by as will not than which after eur mn"
)
UP = "rose|grew|increased|climbed|went up|widened|swelled|spreading|worsened|raising|improved"
DOWN = (
    "fell|declined|decreased|dropped|went down|narrowed|receded|drying up|eased|lowering|weakened"
    "|squeezed"
)


@functools.cache
def rows(split: str) -> list[tuple[str, str]]:
    """Return (sentence, label) pairs of a split."""
    if split == "train":
        return [(row["input"], row["output"]) for row in finance.train()]
    names = ("negative", "neutral", "positive")
    return [(row["sentence"], names[row["label"]]) for row in finance.test()]


def words(pattern: str) -> set[str]:
    """Return the words of a pattern without slots and stop words."""
    return set(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", pattern).lower())) - set(STOP.split())


def patterns(table: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the patterns of all classes."""
    return [pattern for group in table.values() for pattern in group]


def slot_regex(match: re.Match[str]) -> str:
    """Return the named group that a slot matches."""
    return f"(?P<{match[1]}>{'|'.join(finance.FILLERS.get(match[1], ['.+?']))})"


def test_finance_columns_counts_and_uniqueness():
    assert {tuple(row) for row in finance.train()} == {("input", "output", "instruction")}
    assert {row["instruction"] for row in finance.train()} == {
        "What is the sentiment of this news? "
        "Please choose an answer from {negative/neutral/positive}."
    }
    assert {tuple(row) for row in finance.test()} == {("sentence", "label")}
    train, test = rows("train"), rows("test")
    assert Counter(label for _, label in train) == dict.fromkeys(finance.TRAIN_PATTERNS, 560)
    assert Counter(row["label"] for row in finance.test()) == {0: 160, 1: 160, 2: 160}
    sentences = [text for text, _ in train + test]
    assert len(sentences) == len(set(sentences)) == 2160
    assert not [text for text in sentences if re.search(r"[{}|]|  |\n", text)]


def test_held_out_patterns_and_companies_are_disjoint_from_training():
    train, test = patterns(finance.TRAIN_PATTERNS), patterns(finance.TEST_PATTERNS)
    assert len(set(train)) == len(train) == 3 * 40
    assert len(set(test)) == len(test) == 3 * 32
    assert not set(train) & set(test)
    for held_out in map(words, test):
        assert held_out
        assert max(len(held_out & w) / len(held_out | w) for w in map(words, train)) <= 0.6
    stems = {split: {name[:5] for name in names} for split, names in finance.COMPANIES.items()}
    assert not stems["train"] & stems["test"]
    assert all(len(stems[split]) == len(finance.COMPANIES[split]) for split in stems)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SETS)
def test_rows_are_pinned(name, split):
    data = json.dumps(getattr(SETS[name], split)(), sort_keys=True)
    assert hashlib.sha256(data.encode()).hexdigest() == SHA256[name, split]


@pytest.mark.parametrize("split", ["train", "test"])
def test_numbers_follow_the_stated_direction(split):
    table = finance.TRAIN_PATTERNS if split == "train" else finance.TEST_PATTERNS
    checked = 0
    for pattern in patterns(table):
        pair = re.search(r"\{([pc]?)(lo|hi)\}.*\{\1(lo|hi)\}", pattern)
        if not pair:
            continue
        regex = re.sub(r"\\\{(\w+)\\\}", slot_regex, re.escape(pattern))
        hits = [hit for text, _ in rows(split) if (hit := re.fullmatch(regex, text))]
        assert len(hits) == finance.COPIES[split], pattern
        for hit in hits:
            low, high = float(hit[pair[1] + "lo"]), float(hit[pair[1] + "hi"])
            assert low < high
            if pattern in table["neutral"]:
                continue
            up, down = re.search(rf"\b({UP})\b", hit[0]), re.search(rf"\b({DOWN})\b", hit[0])
            assert bool(up) != bool(down), hit[0]
            later = pair[3] if re.search(r"from EUR \S+ mn to|today", pattern) else pair[2]
            assert (later == "hi") == bool(up), hit[0]
            checked += 1
    assert checked >= (200 if split == "train" else 30)


@pytest.mark.parametrize("split", ["train", "test"])
def test_surface_features_say_little_about_the_sentiment(split):
    groups = [[t for t, got in rows(split) if got == want] for want in finance.TRAIN_PATTERNS]
    lengths = [sum(map(len, group)) / len(group) for group in groups]
    assert max(lengths) < 1.05 * min(lengths)
    for mark in (r"\d", "EUR", "%", r"\$", r"\.$", ",", '"'):
        shares = [sum(bool(re.search(mark, t)) for t in g) / len(g) for g in groups]
        assert min(shares) > 0
        assert max(shares) - min(shares) < 0.16, mark


# ------------------------------------------------------------------------- general and medical


def plain(text: str) -> str:
    """Return the words in lower case, parted by single spaces."""
    return re.sub(r"[\W_]+", " ", text.casefold()).strip()


@functools.cache
def lessons(module: ModuleType) -> list[str]:
    """Return the training rows as plain text."""
    return [plain(" ".join(row.values())) for row in module.train()]


@functools.cache
def sheets(module: ModuleType) -> list[tuple[str, list[str], int]]:
    """Return (question, choices, place of the right one) of the test rows."""
    if module is general:
        return [(row["question"], row["choices"], row["answer"]) for row in general.test()]
    rows = medical.test()
    return [(r["question"], [r[f"op{k}"] for k in "abcd"], r["cop"]) for r in rows]


def accuracy(module: ModuleType, score) -> float:
    """Return the expected share right of the choice with the highest score, ties drawn."""
    hits = 0.0
    for question, choices, answer in sheets(module):
        scores = [score(question, choice) for choice in choices]
        hits += (scores[answer] == max(scores)) / scores.count(max(scores))
    return hits / len(sheets(module))


def shared(a: str, b: str) -> int:
    """Return how many words two texts share."""
    return len(set(plain(a).split()) & set(plain(b).split()))


def told(fact: str, lesson: str) -> bool:
    """Whether a lesson holds the words of a fact."""
    return f" {plain(fact)} " in f" {lesson} "


def test_quiz_columns_and_counts():
    assert {tuple(row) for row in general.train()} == {("instruction", "input", "output")}
    assert {tuple(row) for row in general.test()} == {("question", "subject", "choices", "answer")}
    assert {tuple(row) for row in medical.train()} == {("input", "output", "instruction")}
    assert {row["instruction"] for row in medical.train()} == {"Answer this question truthfully"}
    columns = ("question", "opa", "opb", "opc", "opd", "cop")
    assert {tuple(row) for row in medical.test()} == {columns}
    assert [len(module.train()) for module in QUIZZES] == [1479, 636]
    assert [len(module.test()) for module in QUIZZES] == [467, 208]
    assert 0.1 < sum(bool(row["input"]) for row in general.train()) / 1479 < 0.2


@pytest.mark.parametrize("module", QUIZZES)
def test_no_row_twice_and_no_question_in_both_splits(module):
    assert len(set(lessons(module))) == len(lessons(module))
    asked = [plain(" ".join((question, *sorted(c)))) for question, c, _ in sheets(module)]
    assert len(set(asked)) == len(asked)
    training = "\n".join(lessons(module))
    assert not [question for question, _, _ in sheets(module) if plain(question) in training]
    texts = [value for row in module.train() for value in row.values()]
    texts += [text for question, choices, _ in sheets(module) for text in (question, *choices)]
    assert not [text for text in texts if re.search(r"[{}]| = $|  | \n|^\s|\s$", text)]


@pytest.mark.parametrize("module", QUIZZES)
def test_wordings_that_ask_are_not_those_that_teach(module):
    for relation in module.TAUGHT:
        taught = [words(wording) for wording in relation.taught]
        for wording in relation.asked:
            here = words(wording)
            assert max(len(here & there) / len(here | there) for there in taught) <= 0.4, wording


@pytest.mark.parametrize("module", QUIZZES)
def test_every_fact_is_taught_and_asked_once_with_choices_of_its_kind(module):
    asked = {question: (choices, answer) for question, choices, answer in sheets(module)}
    practised = exercises.FACTS if module is general else medical.PRACTISED
    for relation in (*module.TAUGHT, *practised):
        for side in zip(*relation.pairs):
            assert len(set(side)) == len(side) and all(side), relation.subject
    for relation in module.TAUGHT:
        for a, b in relation.pairs:
            both = [t for t in lessons(module) if told(a, t) and told(b, t)]
            assert len(both) >= 2, (a, b)
        once: list[str] = []
        for a, b in relation.pairs:
            forms = [(w.format(a=a, b=b), a if "{b}" in w else b) for w in relation.asked]
            ((form, right),) = [f for f in forms if f[0] in asked]
            choices, answer = asked[form]
            assert choices[answer] == right
            assert set(choices) <= {pair[right == b] for pair in relation.pairs}
            once += choices
        assert set(Counter(once).values()) == {4}  # right once, wrong three times


@pytest.mark.parametrize("module", QUIZZES)
def test_places_of_the_right_answer_are_balanced_from_the_first_four_on(module):
    places = [answer for _, _, answer in sheets(module)]
    assert all(sorted(places[i : i + 4]) == [0, 1, 2, 3] for i in range(0, len(places) - 3, 4))
    letters = Counter(row["output"] for row in module.train() if row["output"] in tuple("ABCD"))
    assert set(letters) == set("ABCD") and max(letters.values()) - min(letters.values()) <= 4


@pytest.mark.parametrize("module", QUIZZES)
def test_rules_without_knowledge_are_at_chance(module):
    seen = Counter(choice for _, choices, _ in sheets(module) for choice in choices)
    everything = "\n".join(lessons(module))
    for rule in (
        lambda _, c: len(c), lambda _, c: -len(c), lambda _, c: c.casefold(), shared,
        lambda q, c: -shared(q, c), lambda _, c: seen[c], lambda _, c: -seen[c],
        lambda _, c: everything.count(plain(c)),
    ):  # fmt: skip
        assert abs(accuracy(module, rule) - 0.25) <= 0.03


@pytest.mark.parametrize("module", QUIZZES)
def test_who_looks_the_facts_up_in_the_training_rows_is_right(module):
    rows = [set(text.split()) for text in lessons(module)]
    rarity = {word: 1 / n for word, n in Counter(w for row in rows for w in row).items()}

    def found(question: str, choice: str) -> float:
        wanted = set(plain(question).split())
        hits = [row & wanted for text, row in zip(lessons(module), rows) if told(choice, text)]
        return max((sum(map(rarity.__getitem__, sorted(hit))) for hit in hits), default=0.0)

    exercise = {question.text for question in exercises.test()}
    facts = [sheet for sheet in sheets(module) if sheet[0] not in exercise]
    wrong = 0
    for question, choices, answer in facts:
        scores = [found(question, choice) for choice in choices]
        wrong += max(scores) != scores[answer] or scores.count(max(scores)) > 1
    assert wrong <= 0.02 * len(facts)


NUMBER, LIST = r"(\d+)", r"(.+)"
SOLUTIONS = {  # instruction and input -> output, solved from the text alone
    rf"What is {NUMBER} \+ {NUMBER}\?": lambda a, b: str(int(a) + int(b)),
    rf"Subtract {NUMBER} from {NUMBER}\.": lambda a, b: f"{b} - {a} = {int(b) - int(a)}",
    rf"Calculate {NUMBER} times {NUMBER}\.": lambda a, b: f"{a} times {b} is {int(a) * int(b)}.",
    rf"Divide {NUMBER} by {NUMBER}\.": lambda a, b: f"{a} divided by {b} is {int(a) / int(b):g}.",
    rf"Is {NUMBER} greater than {NUMBER}\?": lambda a, b: (
        f"Yes, {a} is greater than {b}." if int(a) > int(b) else f"No, {a} is smaller than {b}."
    ),
    rf"Is {NUMBER} an even or an odd number\?": lambda a: (
        f"{a} is {'even' if a[-1] in '02468' else 'odd'}."
    ),
    rf"How many minutes are {NUMBER} hours\?": lambda a: f"{a} hours are {int(a) * 60} minutes.",
    rf"Sort the numbers from the smallest to the largest\. {LIST}": lambda x: listed(
        sorted(x.split(", "), key=int)
    ),
    rf"Sort the numbers from the largest to the smallest\. {LIST}": lambda x: listed(
        sorted(x.split(", "), key=lambda n: -int(n))
    ),
    rf"Find the largest number\. {LIST}": lambda x: str(max(map(int, x.split(", ")))),
    rf"Find the smallest number\. {LIST}": lambda x: str(min(map(int, x.split(", ")))),
    rf"Put the words in alphabetical order\. {LIST}": lambda x: listed(sorted(x.split(", "))),
    rf"Write the list in the opposite order\. {LIST}": lambda x: listed(x.split(", ")[::-1]),
    rf"Rewrite the words in capital letters\. {LIST}": str.upper,
    rf"Count the words in the list\. {LIST}": lambda x: str(x.count(",") + 1),
    rf"Form an acronym from the words\. {LIST}": lambda x: re.sub(r"(\w)\w*\W*", r"\1", x).upper(),
    rf'Take the word "(\w+)" out of the list\. {LIST}': lambda w, x: listed(
        word for word in x.split(", ") if word != w
    ),
}


def listed(items) -> str:
    """Return the items, parted by commas."""
    return ", ".join(items)


def test_exercises_have_the_right_answers():
    solved: Counter[str] = Counter()
    for row in general.train():
        text = f"{row['instruction']} {row['input']}".strip()
        for pattern, solve in SOLUTIONS.items():
            if hit := re.fullmatch(pattern, text):
                assert row["output"] == solve(*hit.groups()), row
                solved[pattern] += 1
        if hit := re.fullmatch(r"Name (two|three|four) things of this kind: (\w+)\.", text):
            things = row["output"].split(", ")
            assert len(set(things)) == ("two", "three", "four").index(hit[1]) + 2
            assert set(things) <= set(exercises.KINDS[hit[2]])
        if hit := re.fullmatch(r'What kind of thing does the word "(\w+)" name\?', text):
            assert hit[1] in exercises.KINDS[row["output"]]
    assert set(solved) == set(SOLUTIONS) and sum(solved.values()) >= 15 * 20
    kinds = [*exercises.KINDS.values(), *exercises.TEST_KINDS]
    assert len({word for kind in kinds for word in kind}) == sum(map(len, kinds))


def test_held_out_exercises_have_one_right_answer_of_every_rank():
    ranks: Counter[int] = Counter()
    for question, choices, answer in sheets(general):
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if "eggs" in question:
            right = numbers[0] * numbers[1]
        elif "passengers" in question:
            right = numbers[0] - numbers[1] + numbers[2]
        elif "counts aloud" in question:
            right = 2 * numbers[3] - numbers[2]
            assert len({b - a for a, b in itertools.pairwise(numbers)}) == 1
        else:
            if question.startswith("Three of these"):
                homes = [next(k for k in exercises.TEST_KINDS if c in k) for c in choices]
                assert sorted(map(homes.count, homes)) == [1, 3, 3, 3]
                assert homes.count(homes[answer]) == 1
            continue
        assert choices[answer] == str(right)
        ranks[sorted(map(int, choices)).index(right)] += 1
    assert ranks == dict.fromkeys(range(4), 12)


# ---------------------------------------------------------------------------------------- coding

BY_HAND = {  # the value in the docstring of two held-out functions of each family
    "sum_negated_positive": -24,
    "sorted_cubed_below_4": [-125, -8, 27],
    "sorted_squared_odd_digits": [9, 25, 49],
    "sum_squared_low_digits": 13,
    "largest_cubed_up_to": 729,
    "list_no_multiples_of_3_up_to": [1, 2, 4, 5, 7, 8],
    "list_upper_a_words": ["ANNA", "AND", "ANTS", "PARIS"],
    "hyphenated_capitalized_short_words": "Us-And-In",
    "distinct_digit_characters": 3,
    "joined_twice_late": "oooommss",
    "hyphenated_keys_above_3": "apple-fig",
    "sum_squared_values_above_3": 65,
}


def passes(source: str, name: str, test: str) -> bool:
    """Whether a definition passes a test of this project's own."""
    space: dict = {}
    exec(f"{source}\n{test}", space)
    try:
        space["check"](space[name])
    except Exception:
        return False
    return True


def test_coding_columns_counts_and_held_out_functions():
    train, test = coding.train(), coding.test()
    assert {tuple(row) for row in train} == {("instruction", "input", "output")}
    columns = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    assert {tuple(row) for row in test} == {columns}
    assert 300 <= len(train) <= 800 and len(test) == 48
    assert len({plain(" ".join(row.values())) for row in train}) == len(train)
    told = "\n".join(" ".join(row.values()) for row in train)
    for function in coding.functions("test"):
        assert not re.search(rf"\b{function.name}\b", told)
    taught = {part for f in coding.functions("train") for part in (f.choose, f.make, f.gather)}
    held_out = {part for f in coding.functions("test") for part in (f.choose, f.make, f.gather)}
    assert held_out <= taught


def test_all_code_computes_what_its_parts_mean():
    functions = {f.name: f for s in ("train", "test") for f in coding.functions(s)}
    assert len(functions) == len(coding.train()) + len(coding.test())
    assert len({f.words for f in functions.values()}) == len(functions)
    for row in coding.train():
        space: dict = {}
        exec(row["output"], space)
        (name,) = set(space) - {"__builtins__"}
        function = functions[name]
        assert not hasattr(builtins, name)  # such a function would call itself
        assert function.words in row["instruction"] + row["input"]
        for argument in function.family.inputs:
            assert space[name](argument) == function.value(argument), name


@pytest.mark.parametrize("family", coding.FAMILIES, ids=lambda family: family.argument)
def test_held_out_tests_accept_the_solution_and_reject_every_other_function(family):
    rows = {row["entry_point"]: row for row in coding.test()}
    both = [f for s in ("train", "test") for f in coding.functions(s) if f.family is family]
    for row in (rows[f.name] for f in coding.functions("test") if f.family is family):
        name, test = row["entry_point"], row["test"]
        assert passes(row["prompt"] + row["canonical_solution"], name, test)
        for constant in ("None", "[]", "0", "''", "{}", family.argument):
            assert not passes(f"{row['prompt']}    return {constant}\n", name, test)
        for other in both:
            right = other.name == name
            assert passes(other.head + other.long, other.name, test) == right, other.name


def test_examples_worked_out_by_hand():
    prompts = {row["entry_point"]: row["prompt"] for row in coding.test()}
    for name, value in BY_HAND.items():
        assert prompts[name].splitlines()[-2].strip() == repr(value), name
