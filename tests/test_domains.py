"""Every task asks what its protocol asks, word for word, and grades as its rules say.

Prompts are compared with texts typed from the leaderboard's rules (flowertune.md 2), gradings with
examples of every quirk worked out by hand. Properties, on text made of what the rules look for:
grading never raises; what is decided stays decided whatever follows; what is strictly right is
leniently right. Where the real data are, every row of every file becomes a question under both
protocols, and reference solutions become programs (nothing is executed here). About 15 s.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import completion, domains, extraction
from fedsim.config import Data
from fedsim.data import sources
from fedsim.domains import Form, Generation, Item, Program
from fedsim.errors import DataError
from fedsim.tasks import MENDED, chance, majority
from tests.conftest import require

REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
DOMAINS = {name: domains.load(name) for name in domains.known()}
TASKS = {
    name: task for domain in DOMAINS.values()
    for name, task in [*domain.tasks.items(), *domain.embedded_tasks.items()]
}  # fmt: skip
ORDER = {
    "general": ["mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"],
    "finance": ["fpb", "fiqa", "tfns"],
    "medical": ["pubmedqa", "medmcqa", "medqa", "careqa"],
    "coding": ["humaneval", "mbpp", "multipl_js", "multipl_cpp"],
}
EMBEDDED = {
    "general": "facts", "finance": "newswire", "medical": "clinic", "coding": "snippets",
}  # fmt: skip

MMLU = {"question": "2 + 2 is", "choices": ["3", "4", "None", "22"], "answer": 1, "subject": "x"}
EXAM = {"question": "Which vitamin?", "opa": "A", "opb": "B12", "opc": "C", "opd": "K", "cop": 2}
ABROAD = {"question": "So:", "op1": "one", "op2": "two", "op3": "three", "op4": "four", "cop": 4}
LICENCE = {
    "question": "Next step.", "answer": "Rest",
    "options": [{"key": k, "value": v} for k, v in zip("ABCD", ("Wait", "Rest", "Rest", "Run"))],
}  # fmt: skip
STUDY = {"CONTEXTS": ["We did.", "We saw."], "QUESTION": "Does it?", "final_decision": "maybe"}
FPB = {"sentence": "Sales rose .", "label": 2}
FIQA = {"sentence": "$X up", "sentiment_score": 0.4, "format": "post"}
TFNS = {"text": "$Y - cut", "label": 0}
HUMANEVAL = {
    "task_id": "HumanEval/0", "prompt": '\n\ndef two(x: int) -> int:\n    """ Twice x. """\n',
    "entry_point": "two", "canonical_solution": "    return 2 * x\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(3) == 6\n",
}  # fmt: skip
MBPP = {
    "text": "Write a function.", "code": "def f(x):\n  return x", "test_setup_code": "y = f",
    "test_list": ["assert f(1) == 1", "assert y(2) == 2"],
}  # fmt: skip
JS = {"prompt": "//Twice x.\nfunction two(x){\n", "tests": "two(3);\n"}
CPP = {"prompt": "#include<assert.h>\nlong two(long x) {\n", "tests": "}\nint main() {\n}\n"}
ROWS: dict[str, dict[str, Any]] = {
    "mmlu_stem": MMLU, "mmlu_social_sciences": MMLU, "mmlu_humanities": MMLU, "facts": MMLU,
    "fpb": FPB, "fiqa": FIQA, "tfns": TFNS, "newswire": FPB,
    "pubmedqa": STUDY, "medmcqa": EXAM, "medqa": LICENCE, "careqa": ABROAD, "clinic": EXAM,
    "humaneval": HUMANEVAL, "snippets": HUMANEVAL, "mbpp": MBPP,
    "multipl_js": JS, "multipl_cpp": CPP,
}  # fmt: skip
GOLD = {
    "mmlu_stem": "B", "fpb": "positive", "fiqa": "positive", "tfns": "negative",
    "pubmedqa": "maybe", "medmcqa": "C", "medqa": "B", "careqa": "D",
}  # fmt: skip
TEXT = [name for name in ROWS if TASKS[name].forms["fedsim"].likelihood]
CODE = [name for name in ROWS if name not in TEXT]


def form(task: str, protocol: str = "flowertune") -> Form:
    return TASKS[task].forms[protocol]


def item(task: str, protocol: str = "flowertune", **changes: Any) -> Item:
    return form(task, protocol).item(ROWS[task] | changes)


def official(task: str, output: str, **changes: Any) -> bool:
    hit = form(task).grade(item(task, **changes), output)["official"]
    assert isinstance(hit, bool)
    return hit


def ours(task: str, output: str, **changes: Any) -> tuple[bool, bool]:
    """Strict and lenient."""
    grades = form(task, "fedsim").grade(item(task, "fedsim", **changes), output)
    strict, lenient = grades["strict"], grades["lenient"]
    assert isinstance(strict, bool) and isinstance(lenient, bool)
    return strict, lenient


def source(task: str, output: str, metric: str = "official", **changes: Any) -> str:
    protocol = "flowertune" if metric == "official" else "fedsim"
    program = form(task, protocol).grade(item(task, protocol, **changes), output)[metric]
    assert isinstance(program, Program)
    return program.source


# ------------------------------------------------------------------------------- what there is


@pytest.mark.parametrize("name", DOMAINS)
def test_tasks_and_protocols(name: str) -> None:
    domain = DOMAINS[name]
    assert list(domain.tasks) == ORDER[name]
    assert list(domain.embedded_tasks) == [EMBEDDED[name]]
    for task in (*domain.tasks.values(), *domain.embedded_tasks.values()):
        assert list(task.forms) == ["flowertune", "fedsim"]
        mended = (MENDED,) if name in ("finance", "coding") else ()
        assert task.forms["flowertune"].metrics == ("official", *mended)
        assert task.forms["fedsim"].metrics == ("strict", "lenient")
    assert list(domain.pairs) == ["flowertune", "fedsim"]


PUBMED, MEDQA, EXAMS = (
    "As an expert doctor in clinical science and medical knowledge, can you tell me if the "
    "following statement is correct? Answer yes, no, or maybe.",
    "You are a medical doctor taking the US Medical Licensing Examination. You need to demonstrate "
    "your understanding of basic and clinical science, medical knowledge, and mechanisms "
    "underlying health, disease, patient care, and modes of therapy. Show your ability to apply "
    "the knowledge essential for medical practice. For the following multiple-choice question, "
    "select one correct answer from A to E. Base your answer on the current and standard practices "
    "referenced in medical guidelines.",
    "You are a medical doctor answering realworld medical entrance exam questions. Based on your "
    "understanding of basic and clinical science, medical knowledge, and mechanisms underlying "
    "health, disease, patient care, and modes of therapy, answer the following multiple-choice "
    "question. Select one correct answer from A to D. Base your answer on the current and standard "
    "practices referenced in medical guidelines.",
)
TAIL = "\nThe answer is:\n<|im_end|>\n<|im_start|>answer\n"
OFFICIAL = {
    "mmlu_stem": "<|im_start|>question\nAnswer the following multiple choice question.\n"
    "Question: 2 + 2 is?\n\nOptions:\nA. 3\nB. 4\nC. nan\nD. 22" + TAIL,
    "pubmedqa": f"<|im_start|>question\n{PUBMED}\nWe did.\nWe saw.\nDoes it?" + TAIL,
    "medmcqa": f"<|im_start|>question\n{EXAMS}\nQuestion: Which vitamin?\n\nOptions:\n"
    "A. A\nB. B12\nC. C\nD. K" + TAIL,
    "medqa": f"<|im_start|>question\n{MEDQA}\nQuestion: Next step.\n\nOptions:\n"
    "A. Wait\nB. Rest\nC. Rest\nD. Run" + TAIL,
    "careqa": f"<|im_start|>question\n{EXAMS}\nQuestion: So:?\n\nOptions:\n"
    "A. one\nB. two\nC. three\nD. four" + TAIL,
    "fpb": "Instruction: What is the sentiment of this news? Please choose an answer from "
    "{negative/neutral/positive}.\nInput: Sales rose .\nAnswer: ",
    "fiqa": "Instruction: What is the sentiment of this tweet? Please choose an answer from "
    "{negative/neutral/positive}.\nInput: $X up\nAnswer: ",
    "tfns": "Instruction: What is the sentiment of this tweet? Please choose an answer from "
    "{negative/neutral/positive}.\nInput: $Y - cut\nAnswer: ",
    "humaneval": 'def two(x: int) -> int:\n    """ Twice x. """',
    "mbpp": '"""\nWrite a function.\nassert f(1) == 1\n"""\n',
    "multipl_js": "//Twice x.\nfunction two(x){",
    "multipl_cpp": "#include<assert.h>\nlong two(long x) {",
}
HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n### Instruction:\n"
)
LETTER = f"{HEAD}Answer this multiple-choice question with the letter of the right option.\n"
OWN = {
    "mmlu_stem": LETTER + "2 + 2 is\nA. 3\nB. 4\nC. None\nD. 22\n### Response:",
    "medqa": LETTER + "Next step.\nA. Wait\nB. Rest\nC. Rest\nD. Run\n### Response:",
    "careqa": LETTER + "So:\nA. one\nB. two\nC. three\nD. four\n### Response:",
    "pubmedqa": HEAD + "We did.\nWe saw.\nDoes it? Answer yes, no, or maybe.\n### Response:",
    "fpb": HEAD + "What is the sentiment of this news? Please choose an answer from "
    "{negative/neutral/positive}. Sales rose .\n### Response:",
    **{name: OFFICIAL[name] for name in ORDER["coding"]},
}


@pytest.mark.parametrize("task", OFFICIAL)
def test_official_prompts_word_for_word(task: str) -> None:
    assert item(task).prompt == OFFICIAL[task]
    assert item(task).gold == GOLD.get(task, "")


@pytest.mark.parametrize("task", OWN)
def test_our_prompts_word_for_word(task: str) -> None:
    assert item(task, "fedsim").prompt == OWN[task]
    assert item(task, "fedsim").gold == GOLD.get(task, "")


@pytest.mark.parametrize(("name", "task"), EMBEDDED.items())
def test_embedded_tasks_are_asked_like_the_real_ones(name: str, task: str) -> None:
    twin = {"facts": "mmlu_stem", "clinic": "medmcqa", "newswire": "fpb", "snippets": "humaneval"}
    assert TASKS[task].forms is TASKS[twin[task]].forms
    domain, data = DOMAINS[name], Data(source="embedded")
    module = import_module(str(domain.embedded))
    rows = sources.load(data, domain, TASKS[task].data, TASKS[task].columns)
    assert rows.rows == module.test() and len(rows) >= 30
    for protocol in ("flowertune", "fedsim"):
        assert all(TASKS[task].forms[protocol].item(row).prompt for row in rows.rows)
    train = sources.load(data, domain, sources.training_set(data, domain), domain.columns)
    assert all(all(pair(row)) for row in train.rows for pair in domain.pairs.values())


def test_generation_settings() -> None:
    gold = Generation(max_new=0, batch=16)
    assert {form(t).generation for t in TEXT if t not in ("fpb", "fiqa", "tfns", "newswire")} == {
        gold
    }
    drawn = Generation(
        max_new=0, max_length=512, batch=32, temperature=None, padded=True, one_end=True
    )
    assert {form(t).generation for t in ("fpb", "fiqa", "tfns", "newswire")} == {drawn}
    limits = [("humaneval", 1024, 3), ("mbpp", 2048, 3), ("multipl_js", 1024, 5),
              ("multipl_cpp", 1024, 15), ("snippets", 1024, 3)]  # fmt: skip
    for task, length, seconds in limits:
        g, program = form(task).generation, form(task).grade(item(task), "")["official"]
        assert (g.max_new, g.max_length, g.temperature, g.top_p, g.top_k) == (
            0,
            length,
            0.2,
            0.95,
            0,
        )
        assert isinstance(program, Program) and (program.seconds, program.build) == (seconds, 15)
        assert g.special and program.early is (task in ("multipl_js", "multipl_cpp"))
        assert form(task).precision == "full" and form(task).decided is None
        own = form(task, "fedsim")
        assert own.generation == Generation(max_new=512) and own.precision == "base"
        assert {p.seconds for p in own.grade(item(task, "fedsim"), "").values()
                if isinstance(p, Program)} == {30.0}  # fmt: skip
    assert form("humaneval").generation.stop == (
        "\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>",
    )  # fmt: skip
    assert form("mbpp").generation.stop == (
        "\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```",
    )  # fmt: skip
    for task in TEXT:
        own = form(task, "fedsim").generation
        assert own.temperature == 0 and not own.stop and own.max_new in (16, 32)
        assert form(task).precision == form(task, "fedsim").precision == "base"
    written_back = {task for task in ROWS if form(task).shared_outputs}
    assert written_back == set(TEXT) - {"fpb", "fiqa", "tfns", "newswire"}
    assert not any(form(task, "fedsim").shared_outputs for task in ROWS)


# ------------------------------------------------------------------------------ official grading


@pytest.mark.parametrize(
    ("output", "prediction"),
    [("B", "b"), (" b", "b"), ("B.", "b"), ("(B)", "b"), ("Because", "b"), ("\nB", "b"),
     ("The answer is B", "the answer is b"), ("", ""), ("\n", "\n"), ("1B", "1b"),
     ("yes", "yes"), ("é B", "b"), ("A\n## B\nC", "b"), ("A\n##\nB", "a\n##\nb"),
     ("## B", "b"), ("A\n###Best\n## C", "b"), ("\n##!", "\n##!"), ("E", "e"), ("ªB", "b")],
)  # fmt: skip
def test_the_official_letter(output: str, prediction: str) -> None:
    """The first letter or digit decides; of `\\n##`, only what stands behind it."""
    assert extraction.official_choice(output, boolean=False) == prediction
    assert official("mmlu_stem", output) is (prediction == "b")


@pytest.mark.parametrize(
    ("output", "gold", "hit"),
    [("yes", "yes", True), ("Yes.", "yes", True), ("yesyes", "yes", True), ("yesno", "yes", True),
     ("noyes", "no", True), ("nono", "no", True), ("nonono", "no", False),
     ("noyesyes", "no", False), ("yes yes", "yes", False), ("yes, it is", "yes", False),
     ("maybe", "maybe", True), ("Maybe", "maybe", True),
     ("maybe.", "maybe", False), (" maybe", "maybe", False), ("may", "maybe", False),
     ("yesyesyes", "yes", False), ("a", "yes", False), ("x\n## no\n", "no", True)],
)  # fmt: skip
def test_the_official_yes_and_no(output: str, gold: str, hit: bool) -> None:
    """`nonono` becomes `nono`, `noyesyes` becomes `noyes`: one repair is made, and only once."""
    assert official("pubmedqa", output, final_decision=gold) is hit


@pytest.mark.parametrize(
    ("output", "label"),
    [("positive", 2), ("It is not positive", 2), ("negative, or Positive", 2), ("POSITIVE", 1),
     ("Negative", 0), ("nonnegative", 0), ("", 1), ("bad", 1), ("x Answer: positive", 1),
     ("negative\nAnswer: positive", 0), ("Answer: positive", 1)],
)  # fmt: skip
def test_the_official_sentiment(output: str, label: int) -> None:
    """Only text between the first two `Answer: ` counts, and there positive anywhere wins."""
    assert [official("fpb", output, label=k) for k in range(3)] == [k == label for k in range(3)]


def test_stored_labels() -> None:
    labels = {task: [item(task, label=k).gold for k in range(3)] for task in ("fpb", "tfns")}
    assert labels["fpb"] == ["negative", "neutral", "positive"]
    assert labels["tfns"] == ["negative", "positive", "neutral"]
    scores = (-0.11, -0.1, 0.09, "0.1")
    golds = [item("fiqa", sentiment_score=score).gold for score in scores]
    assert golds == ["negative", "neutral", "neutral", "positive"]
    assert "this news?" in item("fiqa", format="headline").prompt


def test_an_input_with_the_mark_answers_for_the_model() -> None:
    text = "Q: buy? Answer: a positive maybe"
    assert official("fpb", "negative", sentence=text, label=2)
    decided = form("fpb").decided
    assert decided and decided(item("fpb", sentence=text), "")
    assert item("fpb", sentence="").prompt.endswith("{negative/neutral/positive}.\nAnswer: ")


def test_official_programs_are_the_harness_programs() -> None:
    body = "\n    return 2 * x\n\ndef other():"
    assert source("humaneval", body) == (
        'def two(x: int) -> int:\n    """ Twice x. """\n    return 2 * x\n\n\n\n\n'
        "def check(candidate):\n    assert candidate(3) == 6\n\ncheck(two)"
    )
    assert source("mbpp", "def f(x):\n  return x\nassert") == (
        '"""\nWrite a function.\nassert f(1) == 1\n"""\ndef f(x):\n  return x\n'
        "assert f(1) == 1\nassert y(2) == 2"  # the harness never runs the setup code
    )
    assert source("mbpp", "def f(x):\n  return x", "strict").endswith(
        "return x\ny = f\nassert f(1) == 1\nassert y(2) == 2"
    )
    assert source("multipl_js", "\n  return 2*x;\n}\n\nfunction g(){") == (
        "//Twice x.\nfunction two(x){\n  return 2*x;\n}\n\ntwo(3);\n"
    )
    assert source("multipl_cpp", "\n  return 2*x;\n}\nint g() {") == (
        "#include<assert.h>\nlong two(long x) {\n  return 2*x;\n}\nint main() {\n}\n"
    )


# ----------------------------------------------------------------------------------- our grading

LETTERS = [
    ("B", True, True), (" B", True, True), ("B.", True, True), ("\n\n B \nmore", True, True),
    ("b", False, True), ("(b)", False, True), ("b) of course", False, True), ("**B**", False, True),
    ("B. 4", False, True), ("B: 4", False, True), ("B because", False, True), ("B is", False, True),
    ("The answer is B", False, True), ("the correct answer is: (B)", False, True),
    ("I choose option B", False, True), ("4", False, True), ("It is four", False, False),
    ("B cells", False, False), ("B12", False, False), ("B-cells", False, False), ("", False, False),
    ("Best", False, False), ("A", False, False), ("A or B", False, False), ("C\nB", False, False),
    ("The answer is not B", False, False), ("3 or 4", False, False), ("4.5", False, False),
    ("B..", False, True), ("B'", False, False),
]  # fmt: skip


@pytest.mark.parametrize(("output", "strict", "lenient"), LETTERS)
def test_our_letter(output: str, strict: bool, lenient: bool) -> None:
    assert ours("mmlu_stem", output) == (strict, lenient)


@pytest.mark.parametrize(
    ("output", "letter"),
    [("Vitamin A", "A"), ("It is vitamin A.", "A"), ("vitamin", "D"), ("A vitamin", "D"),
     ("Iron and zinc", "C"), ("iron", "B"), ("Not iron", None), ("iron or vitamin A", None),
     ("It isn't iron", None), ("neither iron nor copper", None), ("e", None)],
)  # fmt: skip
def test_an_option_that_is_quoted(output: str, letter: str | None) -> None:
    """An option within another one that is quoted too is not meant; two that are apart are none."""
    assert extraction.letter(output, ("Vitamin A", "Iron", "Iron and zinc", "Vitamin")) == letter


@pytest.mark.parametrize(
    ("output", "strict", "lenient"),
    [("positive", True, True), (" positive.", True, True), ("Positive", False, True),
     ("The sentiment is positive", False, True), ("not positive", False, False),
     ("not negative, positive", False, True), ("It isn't very positive", False, False),
     ("negative or positive", False, False), ("{negative/neutral/positive}", False, False),
     ("positively", False, False), ("neither negative nor positive", False, False),
     ("", False, False), ("non-positive", False, False), ("positive\nnegative", True, True)],
)  # fmt: skip
def test_our_sentiment(output: str, strict: bool, lenient: bool) -> None:
    assert ours("fpb", output) == (strict, lenient)


@pytest.mark.parametrize(
    ("output", "word"),
    [("yes", "yes"), ("Yes, it does.", "yes"), ("No.", "no"), ("The answer is maybe.", "maybe"),
     ("It is not", None), ("Nobody", None), ("there is no doubt", None), ("Answer: No", "no")],
)  # fmt: skip
def test_our_yes_and_no(output: str, word: str | None) -> None:
    for gold in ("yes", "no", "maybe"):
        assert ours("pubmedqa", output, final_decision=gold)[1] is (gold == word)


FENCE = "Sure:\n```python\nimport math\n\ndef two(x):\n    return 2 * x\n```\nThat is all."


def test_a_program_that_is_given_instead_of_gone_on_with() -> None:
    whole = "import math\n\ndef two(x):\n    return 2 * x\n\n\n\n\ndef check(candidate):"
    assert source("humaneval", FENCE, "lenient").startswith(whole)
    assert source("humaneval", "\n\ndef two(x):\n    return 1\n\nIt works.", "lenient").startswith(
        "def two(x):\n    return 1\n\n\n\n\n\ndef check"
    )
    assert "import math" not in source("humaneval", FENCE, "strict")
    assert "Sure:" in source("humaneval", FENCE, "strict")
    body = "```\n    return 3\n```"
    assert '""" Twice x. """\n    return 3\n' in source("humaneval", body, "lenient")
    typed = HUMANEVAL["prompt"].replace(
        "\n\ndef", "from typing import List\n\n\ndef helper():\n    pass\n\n\ndef"
    )
    got = source("humaneval", FENCE, "lenient", prompt=typed)
    assert got.startswith("from typing import List\n\n\ndef helper():\n    pass\n\n\nimport math\n")
    for output in ("\n    return 2\n```\ndef two(x): pass\n```", "\n    x", "", "What?"):
        assert source("humaneval", output, "lenient") == source("humaneval", output, "strict")


def test_other_languages_too() -> None:
    block = "```js\nfunction two(x) {\n  return 2*x;\n}\n```"
    assert source("multipl_js", block, "lenient") == (
        "//Twice x.\nfunction two(x) {\n  return 2*x;\n}\n\ntwo(3);\n"
    )
    plain = "Here:\nconst two = x => {\n  return 2*x;\n};\nGood luck"
    assert source("multipl_js", plain, "lenient").endswith(
        "two = x => {\n  return 2*x;\n};\ntwo(3);\n"
    )
    block = (
        "```cpp\n#include <x>\nlong two(long x) {\n  return 2*x;\n}\nint main() { two(1); }\n```"
    )
    assert source("multipl_cpp", block, "lenient") == (
        "#include<assert.h>\n#include <x>\nlong two(long x) {\n  return 2*x;\n}\n"
        "\nint main() {\n}\n"
    )
    fenced = "```python\ndef f(x):\n  return x\n```"
    assert '"""\ndef f' not in source("mbpp", fenced, "strict")
    assert "`" not in source("mbpp", fenced, "lenient")
    assert source("mbpp", f"I call f(x):\n{fenced}", "lenient") == source("mbpp", fenced, "lenient")


# ------------------------------------------------------------------------------------ properties

PIECES = [
    "A", "B", "C", "D", "b", ".", " ", "\n", "\n##", "##", "is", "not ", "answer is ", "yes", "no",
    "maybe", "positive", "Positive", "negative", "neutral", "/", "Answer: ", "option", "4", "'",
    "```", "\n```", "```python\n", "def two(x):\n", "def f(x):\n", "\ndef", "    return 2", "\n}",
    "}\n", "function two(x){\n", "\nfunction ", "long two(long x) {\n", "\n#", "<file_sep>",
    "\nprint", "\n//", "<|im_end|>", "\u2028", "\x00", "e\u0301", "\u0130", "\U0001f600", "\r\n",
]  # fmt: skip
OUTPUT = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14).map("".join)
PROTOCOLS = ("flowertune", "fedsim")


@pytest.mark.parametrize("task", ROWS)
@given(output=OUTPUT, more=OUTPUT)
@settings(max_examples=300, deadline=None)
def test_grading_never_raises_and_what_is_decided_stays(task: str, output: str, more: str) -> None:
    for protocol in PROTOCOLS:
        asked, question = form(task, protocol), item(task, protocol)
        grades = asked.grade(question, output)
        assert tuple(grades) == asked.metrics
        assert all(isinstance(g, bool if task in TEXT else Program) for g in grades.values())
        if asked.decided and asked.decided(question, output):
            assert asked.grade(question, output + more) == grades
            assert asked.decided(question, output + more)


@pytest.mark.parametrize("task", TEXT)
@given(before=st.text(alphabet=" \t\n", max_size=3), after=OUTPUT, stop=st.sampled_from(["", "."]))
@settings(max_examples=60, deadline=None)
def test_strictly_right_is_leniently_right(task: str, before: str, after: str, stop: str) -> None:
    asked = form(task, "fedsim")
    question = item(task, "fedsim")
    for choice in question.choices:
        grades = asked.grade(question, f"{before}{choice}{stop}\n{after}")
        assert set(grades.values()) == {choice == question.gold}


def test_decided_is_not_never() -> None:
    """Each rule does end something early."""
    for task, output in [("fpb", "It is positive"), ("fpb", "bad. Answer: ")]:
        decided = form(task).decided
        assert decided and decided(item(task), output) and not decided(item(task), output[:-1])
    ends = [("mmlu_stem", "A\n"), ("fpb", " positive\n"), ("pubmedqa", "\nno\n"),
            ("humaneval", "\n    return 1\ndef"), ("mbpp", "def f(x):\n  return x\nassert"),
            ("humaneval", FENCE[: FENCE.rindex("```") + 3]), ("multipl_cpp", "\n  return x;\n}"),
            ("multipl_js", "\n  return x;\n}\n//")]  # fmt: skip
    for task, output in ends:
        decided = form(task, "fedsim").decided
        assert decided and decided(item(task, "fedsim"), output)
        assert not decided(item(task, "fedsim"), output[:-1])


LONG = ("```", "```\n", "not positive ", "A ", "((", "def f(x):\n", " \n", "answer is ", "\n##",
        "Answer: ", "long two", "a'", "x, ", "option")  # fmt: skip


@pytest.mark.parametrize("piece", LONG)
def test_long_outputs_take_no_time(piece: str) -> None:
    """Nothing is quadratic: 200 kB of what the rules look for take seconds, not hours."""
    output = piece * (200_000 // len(piece))
    for task in ("mmlu_stem", "fpb", "pubmedqa", "humaneval", "mbpp", "multipl_js", "multipl_cpp"):
        for protocol in PROTOCOLS:
            asked, question = form(task, protocol), item(task, protocol)
            asked.grade(question, output)
            if asked.decided:
                asked.decided(question, output)


BROKEN = [
    ("mmlu_stem", {"answer": 4}), ("mmlu_stem", {"answer": -1}), ("mmlu_stem", {"answer": 1.5}),
    ("mmlu_stem", {"choices": "ABCD"}), ("mmlu_stem", {"choices": ["a", None, "c", "d"]}),
    ("mmlu_stem", {"question": 5}), ("medmcqa", {"cop": 4}), ("medmcqa", {"cop": None}),
    ("careqa", {"cop": 0}), ("careqa", {"cop": 5}), ("medqa", {"answer": "Fly"}),
    ("medqa", {"options": {"A": 1}}), ("pubmedqa", {"final_decision": "Yes"}),
    ("pubmedqa", {"CONTEXTS": "one text"}), ("fpb", {"label": 3}), ("fpb", {"label": "x"}),
    ("fiqa", {"sentiment_score": float("nan")}), ("tfns", {"text": None}), ("tfns", {"label": -1}),
    ("humaneval", {"prompt": 3}), ("mbpp", {"test_list": []}), ("mbpp", {"test_list": "assert"}),
    ("multipl_js", {"tests": None}), ("fpb", {"sentence": "\ud800"}),
    ("medqa", {"options": [{"value": "x"}] * 27, "answer": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("task", "changes"), BROKEN)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_row_that_is_no_question(task: str, changes: dict[str, Any], protocol: str) -> None:
    with pytest.raises((ValueError, TypeError, IndexError)):
        item(task, protocol, **changes)


# ----------------------------------------------------------------------------------------- rows


def test_configs_of_the_hub_are_joined_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration a subject; also where a copy has lukaemon/mmlu's columns."""
    import datasets

    asked = []

    def local(hub: str, name: str, **_: Any) -> list[dict[str, str]]:
        asked.append((hub, name))
        return [{"input": name, "A": "3", "B": "4", "C": "None", "D": "22", "target": "B"}]

    monkeypatch.setattr(datasets, "load_dataset", local)
    task, sizes = TASKS["mmlu_humanities"], {"stem": 19, "social_sciences": 12, "humanities": 13}
    for category, size in sizes.items():
        assert len(TASKS[f"mmlu_{category}"].data.configs) == size
    rows = sources.load(Data(source="hub"), DOMAINS["general"], task.data, task.columns)
    assert asked == [("cais/mmlu", config) for config in task.data.configs]
    assert asked[0][1] == "formal_logic" and asked[-1][1] == "world_religions"
    for protocol in PROTOCOLS:
        assert [task.forms[protocol].item(row) for row in rows.rows] == [
            item("mmlu_humanities", protocol, question=config) for _, config in asked
        ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"input": "x", "target": "F"}])
    with pytest.raises(DataError, match=r"cais/mmlu@main, row 0: column 'answer' is missing"):
        sources.load(Data(source="hub"), DOMAINS["general"], task.data, task.columns)


def test_a_file_with_half_a_character(tmp_path: Path) -> None:
    (tmp_path / "finance").mkdir()
    with gzip.open(tmp_path / "finance" / "fpb.test.jsonl.gz", "wt") as file:
        file.write('{"sentence": "x", "label": 1}\n{"sentence": "\\ud800", "label": 1}\n')
    data, task = Data(source="directory", dir=str(tmp_path)), TASKS["fpb"]
    with pytest.raises(DataError, match=r"fpb.test, row 1: a text is no Unicode"):
        sources.load(data, DOMAINS["finance"], task.data, task.columns)


def test_options_of_medqa_may_be_a_mapping() -> None:
    mapping = {option["key"]: option["value"] for option in LICENCE["options"]}
    for protocol in PROTOCOLS:
        assert item("medqa", protocol, options=mapping) == item("medqa", protocol)


def test_training_pairs() -> None:
    """Under flowertune the accidents of the apps: general drops the input, an empty input leaves a
    space. Under fedsim neither."""
    row = {"instruction": "I", "input": "Q", "output": "A"}
    pairs = {name: [p(row) for p in domain.pairs.values()] for name, domain in DOMAINS.items()}
    assert pairs == {
        "coding": [("I Q", "A")] * 2, "finance": [("I Q", "A")] * 2,
        "general": [("I", "A"), ("I Q", "A")], "medical": [("Q", "A")] * 2,
    }  # fmt: skip
    empty = row | {"input": ""}
    assert [p(empty) for p in DOMAINS["coding"].pairs.values()] == [("I ", "A"), ("I", "A")]
    assert [p(empty) for p in DOMAINS["general"].pairs.values()] == [("I", "A")] * 2


def test_what_always_giving_one_answer_scores() -> None:
    items = [Item("", gold, tuple("ABCD")) for gold in "ABBA" + "B"]
    assert majority(items) == ("B", 0.6) and chance(items) == 0.25
    assert chance([Item("", "A", ("A", "B")), Item("")]) == 0.25
    assert chance([item(task) for task in ("fpb", "pubmedqa")]) == pytest.approx(1 / 3)


# ------------------------------------------------------------------------------------- real data

SIZES = {
    "mmlu_stem": 2838, "mmlu_social_sciences": 2771, "mmlu_humanities": 4235, "fpb": 1091,
    "fiqa": 274, "tfns": 2149, "pubmedqa": 450, "medmcqa": 3765, "medqa": 1146, "careqa": 5059,
    "humaneval": 148, "mbpp": 450, "multipl_js": 145, "multipl_cpp": 145,
}  # fmt: skip
TRAIN = {
    "alpaca_gpt4": 985, "alpaca": 6000, "dolly": 2990, "fingpt_sentiment": 13961,
    "medical_meadow_wikidoc_patient_information": 5848, "codealpaca": 2015, "codealpaca_new": 4535,
}  # fmt: skip


def real() -> Data:
    require("data", REAL.is_dir(), f"there is no data set in {REAL}; see FEDSIM_DATA")
    return Data(source="directory", dir=str(REAL))


@cache
def rows(task: str) -> list[dict[str, Any]]:
    domain = next(d for d in DOMAINS.values() if task in d.tasks)
    return sources.load(real(), domain, TASKS[task].data, TASKS[task].columns).rows


@pytest.mark.parametrize("task", SIZES)
def test_every_row_is_a_question(task: str) -> None:
    given = rows(task)
    assert len(given) == SIZES[task]
    for protocol in PROTOCOLS:
        items = [form(task, protocol).item(row) for row in given]
        assert all(i.prompt and (not i.choices or i.gold in i.choices) for i in items)
        assert all(bool(i.gold) is (task in TEXT) for i in items)
    golds = [Counter(form(task, p).item(row).gold for row in given) for p in PROTOCOLS]
    assert golds[0] == golds[1]


@pytest.mark.parametrize("name", DOMAINS)
def test_every_training_set(name: str) -> None:
    domain, data = DOMAINS[name], real()
    for dataset in domain.train:
        if dataset.name not in TRAIN:  # the flashcards are on the hub only
            with pytest.raises(DataError, match=r"flashcards.*wikidoc"):
                sources.load(data, domain, dataset, domain.columns)
            continue
        named = sources.training_set(Data(source="directory", train=dataset.name), domain)
        assert named is dataset
        got = sources.load(data, domain, dataset, domain.columns)
        assert len(got) == TRAIN[dataset.name]
        assert all(all(pair(row)) for row in got.rows for pair in domain.pairs.values())


def test_every_other_file_of_a_task_is_read_alike() -> None:
    """Development and training parts of the evaluation sets have the columns of their tests."""
    real()
    parts = {"general/mmlu.dev": "mmlu_stem", "general/mmlu_other.test": "mmlu_stem",
             "medical/pubmedqa.train": "pubmedqa", "code/mbpp.prompt": "mbpp",
             "code/mbpp.validation": "mbpp", "code/mbpp.train": "mbpp"}  # fmt: skip
    known = {f"{d.folder}/{s.name}.{s.split}" for d in DOMAINS.values()
             for s in (*d.train, *(t.data for t in d.tasks.values()))}  # fmt: skip
    files = {str(p.relative_to(REAL)).removesuffix(".jsonl.gz") for p in REAL.rglob("*.jsonl.gz")}
    assert files == (known & files) | set(parts)
    for name, task in parts.items():
        with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                assert all(form(task, protocol).item(row).prompt for protocol in PROTOCOLS)


def test_the_text_none_is_read_as_the_official_copy_reads_it() -> None:
    given = [row for row in rows("mmlu_stem") if "None" in row["choices"]]
    assert 1 <= len(given) <= 7
    for row in given:
        assert "None" not in form("mmlu_stem").item(row).prompt.split("Options:")[1].split()
        assert "nan" in form("mmlu_stem").item(row).prompt.split("Options:")[1].split()
        assert "nan" not in form("mmlu_stem", "fedsim").item(row).prompt.split()


def solutions(task: str) -> list[tuple[Item, Item, str]]:
    """Both items of each problem with its reference solution as a model would write it."""
    out = []
    for row in rows(task):
        text = row["code"] if task == "mbpp" else "\n" + row["canonical_solution"]
        out.append((form(task).item(row), form(task, "fedsim").item(row), text))
    return out


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@pytest.mark.parametrize(("task", "cut"), [("humaneval", 0), ("mbpp", 1)])
def test_reference_solutions_become_programs(task: str, cut: int) -> None:
    """They are whole, valid and the same for all readings, but for the one that the harness's own
    stop texts cut (a class behind another definition)."""
    stop, short = form(task).generation.stop, 0
    for theirs, own, text in solutions(task):
        program = form(task).grade(theirs, text)["official"]
        strict, lenient = form(task, "fedsim").grade(own, text).values()
        assert isinstance(program, Program) and isinstance(strict, Program)
        assert strict == lenient and (strict.source == program.source) is (
            theirs.facts["tests"] == own.facts["tests"]
        )
        if extraction.cut(text, stop) != text:
            short += 1
            continue
        compile(program.source, task, "exec")
        assert text in program.source and program.source.endswith(theirs.facts["tests"])
        fence = f"Here it is:\n```python\n{text.strip()}\n```\n"
        if task == "mbpp":
            given = form(task, "fedsim").grade(own, fence)["lenient"]
            assert isinstance(given, Program) and text.strip() in given.source
            compile(given.source, task, "exec")
    assert short == cut


@pytest.mark.parametrize("task", ["humaneval", "multipl_js", "multipl_cpp"])
def test_every_prompt_defines_the_function_that_is_tested(task: str) -> None:
    dialects = {"humaneval": completion.HUMANEVAL, "multipl_js": completion.JAVASCRIPT,
                "multipl_cpp": completion.CPP}  # fmt: skip
    stops = set()
    for row in rows(task):
        question = form(task, "fedsim").item(row)
        name = question.facts["name"]
        assert f"candidate = {name};" in row["tests"] if "tests" in row else row["entry_point"]
        whole = f"```\n{question.prompt}\n    pass\n```"
        lenient = form(task, "fedsim").grade(question, whole)["lenient"]
        assert isinstance(lenient, Program) and "```" not in lenient.source
        signature = [line for line in question.prompt.splitlines()
                     if line[:1].isalpha() and f"{name}(" in line][-1]  # fmt: skip
        assert lenient.source.count(signature) == 1
        assert completion.lenient(question, whole, dialects[task], 30.0) == lenient
        stops.add(tuple(row.get("stop_tokens", ())))
    harness = form(task).generation.stop
    assert stops == ({()} if task == "humaneval" else {harness[:-1]})
    assert harness[-1] == "<file_sep>"
