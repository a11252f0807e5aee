"""Grading: the official rules by an independent reading of them, and nothing that breaks it.

Proves, over every row of every evaluation file: prompt, gold and settings of protocol `flowertune`
are those of `tests/official.py`, and so is the grade or program of typed, drawn and malicious
outputs; whole categories are graded like the official script grades them, equal prompts by one
output. And for both protocols: no output and no row gives anything but grades or a DataError, in
time that grows with the length of the text. 35 seconds; the slow sweep 4 minutes.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedsim import domains
from fedsim.config import Data
from fedsim.data import sources
from fedsim.domains import Form, Item, Program, Task
from fedsim.errors import DataError
from fedsim.evaluate import items, scores
from fedsim.evaluate.generation import Output
from fedsim.tasks import MENDED
from tests import hostile, official
from tests.conftest import require
from tests.toy_tokenizers import letters

REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
NAMES = {"multiple-js": "multipl_js", "multiple-cpp": "multipl_cpp"}  # the harness's -> ours
LANGUAGES = {"multiple-js": "javascript", "multiple-cpp": "cpp"}
DOMAINS = {
    official.MCQ: "medical", official.BOOLEAN: "medical",
    official.SENTIMENT: "finance", official.CODE: "coding",
}  # fmt: skip
PROTOCOLS = ("flowertune", "fedsim")
by_task = pytest.mark.parametrize("task", official.KIND)
by_form = pytest.mark.parametrize("protocol", PROTOCOLS)


def ours(task: str) -> tuple[domains.Domain, Task]:
    mmlu = task.startswith("mmlu_")
    domain = domains.load("general" if mmlu else DOMAINS[official.KIND[task]])
    return domain, domain.tasks[NAMES.get(task, task)]


@cache
def rows(task: str) -> list[dict[str, Any]]:
    """A task's file, read without fedsim."""
    domain, mine = ours(task)
    path = REAL / domain.folder / f"{mine.data.name}.{mine.data.split}.jsonl.gz"
    require("data", path.is_file(), f"FEDSIM_DATA has no {domain.folder}/{path.name}")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def questions(task: str, protocol: str = "flowertune") -> list[Item]:
    """A task's questions, from the file to the items, the way that an evaluation takes."""
    domain, mine = ours(task)
    require("data", REAL.is_dir(), "FEDSIM_DATA names no directory")
    data = Data(domain=domain.name, source="directory", dir=str(REAL))
    loaded = sources.load(data, domain, mine.data, mine.columns)
    return items(mine.forms[protocol], loaded.rows, loaded.origin)


def form(task: str, protocol: str = "flowertune") -> Form:
    return ours(task)[1].forms[protocol]


# ---------------------------------------------------------------------------------- agreement


@by_task
def test_every_row_has_the_official_prompt_and_gold(task: str) -> None:
    for row, item in zip(rows(task), questions(task), strict=True):
        assert item.prompt == official.prompt(task, row)
        assert item.gold == (official.gold(task, row) or "")


@by_task
def test_settings_are_the_official_ones(task: str) -> None:
    call, mine = official.generation(task), form(task).generation
    assert mine.max_length == call.max_length and mine.stop == call.stop
    assert mine.max_new == 0 and mine.batch == call.batch
    sampled = {None: None, False: 0.0, True: call.temperature}[call.do_sample]
    assert mine.temperature == sampled
    if call.do_sample:
        assert (mine.top_p, mine.top_k) == (call.top_p, call.top_k)
    assert (mine.padded, mine.one_end) == (call.padding, call.eos)
    assert mine.special is not call.skip_special_tokens
    assert form(task).precision == ("full" if official.KIND[task] == official.CODE else "base")


def expected(task: str, row: dict[str, Any], output: str) -> dict[str, bool | Program]:
    """By the official rules; where the script has accidents, also as the metric beside it."""
    if official.KIND[task] != official.CODE:
        hit = official.grade(task, row, output)
        both = official.KIND[task] == official.SENTIMENT
        return {"official": hit} | ({MENDED: hit} if both else {})
    language: Any = LANGUAGES.get(task, "python")
    call = official.generation(task)
    source = official.program(task, row, output)
    mended = Program(language, source, call.seconds, call.build)
    return {"official": replace(mended, early=call.process), MENDED: mended}


def compare(task: str, drawn: int, seed: int) -> dict[bool, int]:
    """Grade `drawn` outputs a row, half of them typed; how often each grade was given."""
    rng = random.Random(f"{task} {seed}")
    grade, seen = form(task).grade, {True: 0, False: 0}
    for row, item in zip(rows(task), questions(task), strict=True):
        for k in range(drawn):
            output = hostile.text(rng) if k % 2 else rng.choice(hostile.RECORDED)
            want = expected(task, row, output)
            assert grade(item, output) == want, (item.prompt, output)
            seen[want["official"] is True] += 1
    return seen


@by_task
def test_outputs_get_the_official_grade(task: str) -> None:
    seen = compare(task, 12, 0)
    assert seen[False] > 100
    assert seen[True] > 100 or official.KIND[task] == official.CODE


@pytest.mark.slow
@by_task
def test_many_outputs_get_the_official_grade(task: str) -> None:
    compare(task, 100, 1)


@by_task
def test_every_typed_output_under_every_gold(task: str) -> None:
    pairs = zip(rows(task), questions(task), strict=True)
    for row, item in {item.gold: (row, item) for row, item in pairs}.values():
        for output in (*hostile.RECORDED, *hostile.long_texts(5000)):
            assert form(task).grade(item, output) == expected(task, row, output), output


@pytest.mark.parametrize("task", [t for t, kind in official.KIND.items() if kind != official.CODE])
def test_a_whole_set_is_graded_as_its_script_writes_outputs_back(task: str) -> None:
    rng, asked = random.Random(task), questions(task)
    prompts = [item.prompt for item in asked]
    texts = [rng.choice(hostile.RECORDED) for _ in asked]
    got = scores.grade(form(task), asked, [Output(t, (), "length") for t in texts])
    if official.KIND[task] != official.SENTIMENT:
        texts = official.written_back(prompts, texts)
    want = [official.grade(task, row, text) for row, text in zip(rows(task), texts, strict=True)]
    assert [marks["official"] for marks in got] == want


def test_some_questions_of_mmlu_are_there_twice() -> None:
    """Without them the test above would prove nothing about writing back."""
    prompts = [item.prompt for t in official.KIND if "mmlu" in t for item in questions(t)]
    assert len(prompts) - len(set(prompts)) > 0


# ------------------------------------------------------------------------------------ limits


LETTERS = letters()


def test_an_official_batch_has_the_length_of_its_first_gold() -> None:
    asked = questions("pubmedqa")
    most = scores.most_tokens(form("pubmedqa"), asked, LETTERS)
    assert most == [len(asked[i - i % 16].gold) for i in range(len(asked))]
    assert {2, 3} < set(most) and any(m < len(item.gold) for m, item in zip(most, asked))


def test_an_official_finance_batch_is_as_long_as_its_longest_prompt() -> None:
    """It is padded, and `max_length` counts the padding."""
    asked = questions("fpb")
    batches = [asked[i : i + 32] for i in range(0, len(asked), 32)]
    longest = [max(len(item.prompt) for item in batch) for batch in batches]
    want = [max(512 - n, 1) for n, batch in zip(longest, batches) for _ in batch]
    assert scores.most_tokens(form("fpb"), asked, LETTERS) == want


# ----------------------------------------------------------------------------------- hostility


def check(mine: Form, item: Item, output: str) -> None:
    marks = mine.grade(item, output)
    assert tuple(marks) == mine.metrics
    assert all(isinstance(mark, bool | Program) for mark in marks.values())
    if mine.decided is not None:
        assert isinstance(mine.decided(item, output), bool)


def attack_with_texts(task: str, protocol: str, count: int, seed: int) -> None:
    rng = random.Random(f"{task} {protocol} {seed}")
    asked = questions(task, protocol)
    for _ in range(count):
        check(form(task, protocol), rng.choice(asked), hostile.text(rng))


@by_form
@by_task
def test_hostile_outputs_are_graded(task: str, protocol: str) -> None:
    attack_with_texts(task, protocol, 10_000 // len(official.KIND), 0)


@by_form
@by_task
def test_no_output_takes_more_than_time_in_proportion(task: str, protocol: str) -> None:
    """100,000 characters: 20 ms where one pass is made, minutes where every pair is."""
    item = questions(task, protocol)[0]
    for output in hostile.long_texts(100_000):
        start = time.process_time()
        check(form(task, protocol), item, output)
        assert time.process_time() - start < 2.0, output[:40]


def attack_with_rows(task: str, protocol: str, count: int, seed: int) -> int:
    """How many hostile rows were questions all the same."""
    rng, mine, accepted = random.Random(f"{task} {protocol} {seed}"), form(task, protocol), 0
    for _ in range(count):
        row = hostile.row(rng, rng.choice(rows(task)))
        try:
            (item,) = items(mine, [row], "hostile")
        except DataError as refused:
            assert "hostile, row 0" in str(refused) and len(str(refused)) < 1000
            continue
        accepted += 1
        item.prompt.encode()
        assert not item.choices or item.gold in item.choices
        check(mine, item, hostile.text(rng))
        if protocol == "flowertune":
            same_question(task, row, item)
    return accepted


def same_question(task: str, row: Any, item: Item) -> None:
    """What both take for a question is the same question. Ours may refuse more."""
    try:
        theirs = official.prompt(task, row), official.gold(task, row) or ""
    except Exception:  # the script has no errors of its own
        return
    assert (item.prompt, item.gold) == theirs


@by_form
@by_task
def test_hostile_rows_are_questions_or_errors(task: str, protocol: str) -> None:
    count = 10_000 // len(official.KIND)
    assert 0 < attack_with_rows(task, protocol, count, 0) < count


@pytest.mark.parametrize("line", hostile.LINES, ids=range(len(hostile.LINES)))
def test_hostile_files_hold_questions_or_are_errors(line: str, tmp_path: Path) -> None:
    domain, mine = ours("fpb")
    (tmp_path / domain.folder).mkdir()
    with gzip.open(tmp_path / domain.folder / "fpb.test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(line + "\n")
    data = Data(domain=domain.name, source="directory", dir=str(tmp_path))
    with pytest.raises(DataError):
        loaded = sources.load(data, domain, mine.data, mine.columns)
        items(mine.forms["fedsim"], loaded.rows, loaded.origin)


@pytest.mark.slow
@by_form
@by_task
def test_many_hostile_outputs_and_rows(task: str, protocol: str) -> None:
    attack_with_texts(task, protocol, 10_000, 1)
    attack_with_rows(task, protocol, 10_000, 1)
