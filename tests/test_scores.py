"""From answers to scores: what is asked, how it is graded, what is counted, what is kept.

By hand, with a backend that answers from a list: how many tokens an answer may have under each
rule, equal prompts that share the last output, programs that decide, several adapters in one call,
the likelihood's own metric, scores as counts of the records, subsets by counter, rows that are no
questions, and the statistics. About 10 s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedsim import domains, evaluate, report, seeds
from fedsim.config import Config
from fedsim.core import ServerState
from fedsim.errors import DataError
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling, own_sampling
from fedsim.evaluate.scores import Subject, answer, most_tokens, sampling
from fedsim.evaluate.suite import Questions
from fedsim.tasks import Form, Generation, Item, Program
from fedsim.world import load_world
from tests.rules import Kept
from tests.toy_tokenizers import words

ITEMS = [Item("one?", "yes"), Item("two?", "maybe not"), Item("one?", "no"), Item("four?", "a")]


@dataclass
class Listed:
    """Answers adapter by adapter from a list, and remembers what it was asked."""

    texts: Sequence[str]
    name: str = "listed"
    ranks: bool = False
    asked: list[Request] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        self.asked = list(requests)
        return [Output(text, (), "eos") for text, _ in zip(self.texts, requests, strict=True)]


WORDS = words()


def form(generation: Generation, **changes: Any) -> Form:
    def grade(item: Item, output: str) -> dict[str, bool]:
        return {"same": output == item.gold}

    return Form(lambda row: Item(**row), changes.pop("grade", grade), ("same",), generation,
                **changes)  # fmt: skip


def asked(form: Form, items: Sequence[Item] = ITEMS) -> Questions:
    return Questions(form, list(items), "here", "0", True)


def subject(backend: Any, adapters: int = 1) -> Subject:
    names = [Adapter(f"a{i}") for i in range(adapters)]
    return Subject(backend, WORDS, names, list(range(adapters)), "float32", Sampling())


@pytest.mark.parametrize(
    ("generation", "most"),
    [
        (Generation(7), [7, 7, 7, 7]),
        (Generation(0, batch=2), [1, 1, 1, 1]),  # yes, no
        (Generation(0, batch=1), [1, 2, 1, 1]),  # each its own gold
        (Generation(0, max_length=4), [3, 3, 3, 3]),  # one-word prompts
        (Generation(2, max_length=4), [2, 2, 2, 2]),
        (Generation(0, max_length=1), [1, 1, 1, 1]),  # no room: one token all the same
    ],
)
def test_tokens_of_an_answer(generation: Generation, most: list[int]) -> None:
    assert most_tokens(form(generation), ITEMS, WORDS) == most


def test_a_batch_takes_the_first_golds_length() -> None:
    items = [ITEMS[1], *ITEMS]  # "maybe not" leads the first batch of three
    assert most_tokens(form(Generation(0, batch=3)), items, WORDS) == [2, 2, 2, 1, 1]


def test_a_batch_is_padded_to_its_longest_prompt() -> None:
    """4 tokens less 2 of "and two?" for the first batch, less 1 for the second."""
    items = [Item("one?"), Item("and two?"), Item("three?"), Item("four?")]
    assert most_tokens(form(Generation(0, max_length=4, batch=2)), items, WORDS) == [2, 2, 3, 3]


def test_every_adapter_answers_every_question() -> None:
    texts = ["yes", "no", "no", "a", "no", "maybe not", "no", "b"]
    backend = Listed(texts)
    lines = answer(subject(backend, 2), "task", asked(form(Generation(3))))
    assert [r.adapter for r in backend.asked] == [0] * 4 + [1] * 4
    assert [r.prompt for r in backend.asked] == [i.prompt for i in ITEMS] * 2
    assert [line["output"] for line in lines] == texts
    assert [line["same"] for line in lines] == [True, False, True, True, False, True, True, False]
    assert [(line["adapter"], line["index"]) for line in lines[3:5]] == [("a0", 3), ("a1", 0)]


def test_equal_prompts_share_the_last_output() -> None:
    """ "one?" is asked twice; both are graded by "no", the second answer."""
    shared = form(Generation(3), shared_outputs=True)
    lines = answer(subject(Listed(["yes", "", "no", "a"])), "task", asked(shared))
    assert [line["same"] for line in lines] == [False, False, True, True]
    assert lines[0]["output"] == "yes"  # what was written is kept


def test_programs_decide() -> None:
    def grade(item: Item, output: str) -> dict[str, bool | Program]:
        return {"same": Program("python", f"assert {output}", 10.0), "said": output != ""}

    lines = answer(subject(Listed(["1 == 1", "1 == 2", "(", "1 == 1"])), "task",
                   asked(form(Generation(9), grade=grade)))  # fmt: skip
    assert [line["same"] for line in lines] == [True, False, False, True]
    assert all(line["said"] for line in lines)


def test_decided_is_asked_of_the_item() -> None:
    backend = Listed(["", "", "", ""])
    told = form(Generation(3), decided=lambda item, output: output == item.gold)
    answer(subject(backend), "task", asked(told))
    decided = [r.decided for r in backend.asked]
    assert all(d is not None and d(i.gold) and not d("?") for d, i in zip(decided, ITEMS))


def test_a_models_own_sampling(tmp_path: Path) -> None:
    assert own_sampling(tmp_path) == Sampling()
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.8}))
    own = own_sampling(tmp_path)
    assert own == Sampling(0.7, 0.8, 50)
    assert sampling(form(Generation(1, temperature=None)), own) == own
    assert sampling(form(Generation(1, temperature=0.2, top_p=0.95)), own) == Sampling(0.2, 0.95)
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    assert own_sampling(tmp_path) == Sampling()


def test_a_row_that_is_no_question() -> None:
    rows = [{"prompt": "a"}, {"gold": "b"}]
    with pytest.raises(DataError, match=r"set x, row 1 is no question \(TypeError"):
        evaluate.items(form(Generation(1)), rows, "set x")


def test_scores_are_counted_from_the_records(settings: Callable[..., Config]) -> None:
    config = settings(evaluate__limit=20)
    world = load_world(config, seeds.run_key(config.run.seed))
    server = ServerState(3, world.base.anchor.detach().new_zeros(world.base.layout.size))
    scores, records = evaluate.evaluate(world.subject(server, Kept(), (), 1), world.tests)
    (task, lines), = records.items()  # fmt: skip
    assert task == "newswire" and len(lines) == 20
    for line, item in zip(lines, world.tests.tasks[task].items, strict=True):
        assert (line["prompt"], line["gold"]) == (item.prompt, item.gold) and line["round"] == 3
        assert line["choice"] == item.choices[int(np.argmax(line["logprob"]))]
        assert line["likelihood"] is (line["choice"] == line["gold"])
        assert line["strict"] is (line["output"].strip().removesuffix(".") == item.gold)
    assert [s.metric for s in scores] == ["likelihood", "strict", "lenient"]
    for score in scores:
        hits = sum(line[score.metric] for line in lines)
        assert score.value == hits / 20 and score.n == 20 and not score.whole
        assert score.stderr == math.sqrt(score.value * (1 - score.value) / 20)
        assert (score.precision, score.file) == ("float32", "eval/newswire.jsonl")
        assert score.source == "embedded:finance/newswire.test"


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_a_limit_takes_a_random_subset(settings: Callable[..., Config], limit: int) -> None:
    domain = domains.load("finance")

    def prompts(seed: int) -> list[str]:
        suite = evaluate.suite(settings(evaluate__limit=limit), domain, seeds.run_key(seed))
        assert len(suite) == min(limit, 480)
        assert suite.tasks["newswire"].whole is (limit >= 480)
        return [item.prompt for item in suite.tasks["newswire"].items]

    assert prompts(1) == prompts(1) and len(set(prompts(1))) == min(limit, 480)
    assert (prompts(1) == prompts(2)) is (limit >= 480)


def test_the_table_compares_the_first_evaluation_with_the_last(tmp_path: Path) -> None:
    """Where a round has two adapters, an example counts by the share that is right: in round 9
    1, 1, 1/2, 0 of four."""
    hits = {0: [True, False, False, True], 5: [False] * 4, 9: [True, True, True, False]}
    records = [{"round": round, "index": i, "prompt": f"{i}?", "gold": "",
                "likelihood": hit, "strict": not hit}
               for round, row in hits.items() for i, hit in enumerate(row)]  # fmt: skip
    more = [{"round": 9, "index": i, "prompt": f"{i}?", "gold": "",
             "likelihood": hit, "strict": hit}
            for i, hit in enumerate([True, True, False, False])]  # fmt: skip
    (tmp_path / "eval").mkdir()
    scores = [{"task": "newswire", "metric": m} for m in ("likelihood", "strict")]
    (tmp_path / "scores.json").write_text(json.dumps(scores))

    def changes(records: list[dict[str, Any]]) -> list[report.Change]:
        text = "".join(json.dumps(line) + "\n" for line in records)
        (tmp_path / "eval" / "newswire.jsonl").write_text(text)
        return report.changes(tmp_path)

    first, second = changes(records)
    assert (first.task, first.metric, second.metric) == ("newswire", "likelihood", "strict")
    assert (first.n, first.before, first.after, first.change) == (4, 0.5, 0.75, 0.25)
    assert (second.before, second.after, second.change) == (0.5, 0.25, -0.25)
    assert (first.low, first.high) == pytest.approx((-second.high, -second.low))
    assert not first.significant
    first, _ = changes(records + more)
    assert first.after == (1 + 1 + 0.5 + 0) / 4
    only, _ = changes(records[8:])
    assert only.before is None and only.after == 0.75 and not only.significant
    assert math.isnan(only.change)
    other = [line | {"prompt": "another"} if line["round"] == 9 and line["index"] == 1 else line
             for line in records]  # fmt: skip
    first, _ = changes(other)  # a question that was not asked before is not paired
    assert (first.n, first.before, first.after) == (3, 2 / 3, 2 / 3)
    other = [line | {"prompt": "another"} if line["round"] == 9 else line for line in records]
    none, _ = changes(other)
    assert none.before is None and none.after == 0.75 and math.isnan(none.change)
