"""Coding: instruction following on Code Alpaca (Chaudhary, 2023), asked by running programs.

Tasks: Chen et al., HumanEval, arXiv:2107.03374; Austin et al., MBPP, arXiv:2108.07732; Cassano et
al., MultiPL-E, arXiv:2208.08227.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

from fedsim import completion
from fedsim.completion import CPP, HUMANEVAL, JAVASCRIPT, MBPP, Dialect, official
from fedsim.domains import Domain, joined, spaced
from fedsim.forms import listed, texts
from fedsim.tasks import MENDED, DataSet, Form, Generation, Item, Program, Row, Task

SECONDS = 30.0  # ours: the slowest MBPP reference takes 9 s alone on a small machine


def humaneval(row: Row) -> Item:
    """The prompt without the space around it; `check(entry_point)` after the tests."""
    prompt, test, name = texts(row["prompt"], row["test"], row["entry_point"])
    tests = f"\n{test}\ncheck({name})"
    return Item(prompt.strip(), facts={"tests": tests, "name": name})


def mbpp(row: Row) -> Item:
    """The text and the first test as a comment. The harness knows no `test_setup_code`."""
    tests = listed(row["test_list"])
    called = re.search(r"assert\s+\(*(\w+)\(", tests[0])
    return Item(
        '"""\n{}\n{}\n"""\n'.format(*texts(row["text"]), tests[0]),
        facts={"tests": "\n".join(tests), "name": called[1] if called else ""},
    )  # fmt: skip


def mbpp_set_up(row: Row) -> Item:
    """With `test_setup_code`, which builds on the solution (task 367) and so comes after it."""
    item = mbpp(row)
    parts = [part for part in (*texts(row["test_setup_code"]), item.facts["tests"]) if part]
    return Item(item.prompt, facts={**item.facts, "tests": "\n".join(parts)})


def multipl(row: Row) -> Item:
    """The prompt without the space around it; the function's name is on its last line."""
    prompt, tests = texts(row["prompt"], row["tests"])
    called = re.search(r"\b(\w+)\(", prompt.strip().rpartition("\n")[2])  # \b: in linear time
    name = called[1] if called else ""
    return Item(prompt.strip(), facts={"tests": tests, "name": name})


def _forms(
    item: Callable[[Row], Item], dialect: Dialect, max_length: int = 1024,
    own: Callable[[Row], Item] | None = None,
) -> Mapping[str, Form]:  # fmt: skip
    """Official: one sample a problem, never quantised. Ours: greedy, without stop texts, which a
    lenient reading may have to read beyond."""
    generation = Generation(
        0, max_length, stop=dialect.stop, temperature=0.2, top_p=0.95, top_k=0, special=True
    )

    def grade(item: Item, output: str) -> dict[str, bool | Program]:
        readings = {"strict": completion.strict, "lenient": completion.lenient}
        return {name: read(item, output, dialect, SECONDS) for name, read in readings.items()}

    return {
        "flowertune": Form(
            item, partial(official, dialect=dialect), ("official", MENDED), generation,
            precision="full",
        ),
        "fedsim": Form(
            own or item, grade, ("strict", "lenient"), Generation(max_new=512),
            decided=partial(completion.decided, dialect=dialect),
        ),
    }  # fmt: skip


_HUMANEVAL = _forms(humaneval, HUMANEVAL)
_PROBLEM = ("prompt", "test", "entry_point")


def _multipl(code: str, dialect: Dialect) -> Task:
    data = DataSet(
        f"multiple_humaneval_{code}", "test", "nuprl/MultiPL-E", (f"humaneval-{code}",),
        "ff5c146da05f10bc69b9ce393b77f381b3825d1b",
    )  # fmt: skip
    return Task(data, ("prompt", "tests"), _forms(multipl, dialect))


DOMAIN = Domain(
    name="coding",
    train=(DataSet("codealpaca", "train", "flwrlabs/code-alpaca-20k"),
           DataSet("codealpaca_new", "train")),
    columns=("instruction", "output"), optional=("input",),
    pairs={"flowertune": spaced, "fedsim": joined},  # as the leaderboard's code app joins them
    clients=10, folder="code",
    tasks={
        "humaneval": Task(
            DataSet("humaneval", "test", "openai/openai_humaneval"), _PROBLEM, _HUMANEVAL
        ),
        "mbpp": Task(
            DataSet("mbpp", "test", "google-research-datasets/mbpp", ("full",)),
            ("text", "test_list", "test_setup_code"), _forms(mbpp, MBPP, 2048, mbpp_set_up),
        ),
        "multipl_js": _multipl("js", JAVASCRIPT),
        "multipl_cpp": _multipl("cpp", CPP),
    },
    embedded="fedsim.data.embedded.coding",
    embedded_tasks={"snippets": Task(DataSet("snippets", "test"), _PROBLEM, _HUMANEVAL)},
)  # fmt: skip
