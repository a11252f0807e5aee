"""Answers are those of the stock model, one choice after another; statistics are those by hand.

`answer` packs all questions into a tree of shared prefixes; here every choice is read alone by
stock transformers with stock PEFT's adapter, token by token: log-probabilities within 1e-4 and the
same greedy flags, for choices of one and of several tokens, a choice that begins another, choices
that change how the prompt's end is tokenised, one pass and many. About 8 s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import domains, evaluate, model, peft_io, report, seeds, weights
from fedsim.config import Config
from fedsim.domains import PROMPT
from fedsim.evaluate.choices import Answer, Question, answer, question
from fedsim.prefix import common_prefix
from fedsim.world import load_world

SCALE = 2.0  # alpha 8 / rank 4, as `settings` has it


@dataclass(frozen=True)
class Pair:
    """The packed base with a random adapter, and the stock model with the same one."""

    base: model.Base
    row: Tensor
    stock: Any


@pytest.fixture(scope="module")
def pair(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Pair] = {}

    def make(config: Config, architecture: str) -> Pair:
        if architecture not in made:
            from peft import PeftModel

            found = weights.find(config.model.name)
            base = model.load(found, config, torch.device("cpu"), ("all-linear",))
            row = torch.zeros(1, base.layout.size)
            for piece in base.layout.pieces:
                base.layout.view(row, piece).normal_(generator=torch.Generator().manual_seed(3))
            row *= 0.1
            folder = tmp_path_factory.mktemp("adapter") / architecture
            peft_io.export(folder, row[0], base.layout, config.adapter, found.name)
            plain = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
            made[architecture] = Pair(base, row[0], PeftModel.from_pretrained(plain, folder).eval())
        return made[architecture]

    return make


@torch.no_grad()
def one_by_one(stock: Any, q: Question) -> Answer:
    """Every choice alone through the stock model, every token read off its own row."""
    logprob, greedy = [], []
    for ids, start in zip(q.choices, q.start, strict=True):
        z = stock(torch.as_tensor(ids)[None]).logits[0].double().log_softmax(-1)
        logprob.append(sum(float(z[i - 1, ids[i]]) for i in range(start, len(ids))))
        greedy.append(all(int(z[i - 1].argmax()) == ids[i] for i in range(start, len(ids))))
    return Answer(np.array(logprob), np.array(greedy))


def check(pair: Pair, questions: Sequence[Question], budget: int) -> list[Answer]:
    got = answer(pair.base, pair.row, SCALE, questions, budget)
    assert len(got) == len(questions)
    for q, ours in zip(questions, got, strict=True):
        theirs = one_by_one(pair.stock, q)
        assert np.abs(ours.logprob - theirs.logprob).max() <= 1e-4
        assert ours.greedy.tolist() == theirs.greedy.tolist()
    return got


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ASKED = ("Sales rose. Up or down?", "Sales fell by 3 %. Up or down?", "Profit was as before.")
CHOICES = {
    "labels": ("negative", "neutral", "positive"),
    "letters": ("A", "B", "C", "D"),
    "beginnings": ("up", "up and down", "upwards"),
    "two": ("yes, it did so in every quarter", "no"),
}


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("budget", [10_000, 130])
def test_answers_are_the_stock_models(
    settings: Callable[..., Config], tokenizer: Any, pair: Any, architecture: str, choices: str,
    budget: int,
) -> None:  # fmt: skip
    questions = [question(tokenizer, PROMPT.format(instruction=asked), CHOICES[choices])
                 for asked in ASKED]  # fmt: skip
    check(pair(settings(architecture), architecture), questions, budget)


def tree(generator: np.random.Generator, stem: int) -> Question:
    """A prompt that begins like the others, and choices that share tokens before and after it."""
    start = stem + int(generator.integers(-2, 3))
    common = generator.integers(1, 384, 40)
    head = np.concatenate([np.arange(5, 17), common])[:stem]
    lengths = generator.integers(0, 5, int(generator.integers(2, 6)))
    rows = [
        np.concatenate([head, [300 + i], generator.integers(1, 384, int(n))])
        for i, n in enumerate(lengths)
    ]
    rows.append(rows[0][: max(start + 1, len(rows[0]) - 1)])  # one begins another
    starts = tuple(min(start, len(row) - 1) for row in rows)
    rows = [np.asarray(row, dtype=np.int64) for row in rows]
    return Question(tuple(rows), starts, common_prefix(rows, min(map(len, rows)) - 1))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [4096, 70, 1])
def test_any_tree(
    settings: Callable[..., Config], pair: Any, seed: int, budget: int
) -> None:  # fmt: skip
    generator = np.random.default_rng(seed)
    questions = [tree(generator, int(n)) for n in generator.integers(4, 40, 9)]
    got = check(pair(settings("llama"), "llama"), questions, budget)
    assert all((a.logprob < 0).all() for a in got)


def test_a_greedy_choice_is_seen(settings: Callable[..., Config], pair: Any) -> None:
    """The stock model's own continuation is greedy; with another token in it, it is not."""
    both = pair(settings("llama"), "llama")
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, both.stock(ids).logits[:, -1:].argmax(-1)], 1)
    right = ids[0].numpy()
    wrong_at_last = right.copy()
    wrong_at_last[-1] = (wrong_at_last[-1] + 1) % 384
    wrong_at_first = right[:12].copy()
    wrong_at_first[10] = (wrong_at_first[10] + 1) % 384
    with torch.no_grad():  # what follows is what the model would write there
        follows = both.stock(torch.as_tensor(wrong_at_first[:11])[None]).logits[0, -1].argmax()
    wrong_at_first[11] = int(follows)
    choices = (right, wrong_at_last, wrong_at_first, right[:11])
    (got,) = check(both, [Question(choices, (10,) * 4, 10)], 1000)
    assert got.greedy.tolist() == [True, False, False, True]


def test_many_rows_of_logits(settings: Callable[..., Config], pair: Any) -> None:
    """More label rows than one block of logits holds."""
    generator = np.random.default_rng(5)
    questions = []
    for _ in range(4):
        prompt = generator.integers(1, 384, 6)
        rows = tuple(np.concatenate([prompt, generator.integers(1, 384, 50)]) for _ in range(3))
        questions.append(Question(rows, (6,) * 3, common_prefix(rows, 55)))
    check(pair(settings("llama"), "llama"), questions, 1 << 20)


def test_questions_are_tokenised_whole(tokenizer: Any) -> None:
    q = question(tokenizer, "Up or down?", ("up", "down"))
    for ids, start, text in zip(q.choices, q.start, ("up", "down"), strict=True):
        assert tokenizer.decode(ids) == f"Up or down? {text}"
        assert tokenizer.decode(ids[start:]) == f" {text}"
    assert (q.choices[0][: q.stem] == q.choices[1][: q.stem]).all()


def test_scores_are_counted_from_the_records(settings: Callable[..., Config]) -> None:
    config = settings(evaluate__limit=20)
    world = load_world(config, seeds.run_key(config.run.seed))
    row = torch.zeros(world.base.layout.size)
    scores, records = evaluate.evaluate(world.base, world.tests, row, config, 3)
    (task, lines), = records.items()  # fmt: skip
    assert task == "newswire" and len(lines) == 20
    for line, example in zip(lines, world.tests.examples[task], strict=True):
        assert line["prompt"] == example.prompt and line["round"] == 3
        assert line["gold"] == example.choices[example.gold]
        assert line["output"] == example.choices[int(np.argmax(line["logprob"]))]
        assert line["likelihood"] is (line["output"] == line["gold"])
    assert [s.metric for s in scores] == ["likelihood", "exact"]
    for score in scores:
        hits = sum(line[score.metric] for line in lines)
        assert score.value == hits / 20 and score.n == 20
        assert score.stderr == math.sqrt(score.value * (1 - score.value) / 20)
        assert (score.precision, score.file) == ("float32", "eval/newswire.jsonl")
        assert score.source == "embedded:finance/newswire.test"


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_a_limit_takes_a_random_subset(
    settings: Callable[..., Config], tokenizer: Any, limit: int
) -> None:
    domain = domains.load("finance")

    def prompts(seed: int) -> list[str]:
        suite = evaluate.suite(
            settings(evaluate__limit=limit), domain, tokenizer, seeds.run_key(seed)
        )
        assert len(suite) == min(limit, 480)
        return [e.prompt for e in suite.examples["newswire"]]

    assert prompts(1) == prompts(1) and len(set(prompts(1))) == min(limit, 480)
    assert (prompts(1) == prompts(2)) is (limit >= 480)


def test_a_proportion_by_hand() -> None:
    """3 of 4: p = 0.75, sqrt(0.75 x 0.25 / 4) = 0.2165."""
    p, error = evaluate.proportion([True, True, False, True])
    assert p == 0.75 and error == pytest.approx(0.21650635, abs=1e-8)
    assert evaluate.proportion([True]) == (1.0, 0.0) and evaluate.proportion([False]) == (0.0, 0.0)


def test_a_paired_difference_by_hand() -> None:
    """d = (0, 1, 1, -1): mean 0.25, variance (0.0625 + 2 x 0.5625 + 1.5625) / 3 = 0.91667,
    half the interval 1.95996 x sqrt(0.91667 / 4) = 0.93828."""
    change, low, high = evaluate.paired_difference(
        [True, False, False, True], [True, True, True, False]
    )
    assert change == 0.25
    assert low == pytest.approx(0.25 - 0.93827, abs=1e-4)
    assert high == pytest.approx(0.25 + 0.93827, abs=1e-4)


def test_the_table_compares_the_first_evaluation_with_the_last(tmp_path: Path) -> None:
    hits = {0: [True, False, False, True], 5: [False] * 4, 9: [True, True, True, False]}
    records = [{"round": round, "likelihood": hit, "exact": not hit}
               for round, row in hits.items() for hit in row]  # fmt: skip
    (tmp_path / "eval").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in records)
    (tmp_path / "eval" / "newswire.jsonl").write_text(text)
    first, second = report.changes(tmp_path)
    assert (first.task, first.metric, second.metric) == ("newswire", "likelihood", "exact")
    assert (first.n, first.before, first.after, first.change) == (4, 0.5, 0.75, 0.25)
    assert (second.before, second.after, second.change) == (0.5, 0.25, -0.25)
    assert (first.low, first.high) == (-second.high, -second.low) and not first.significant


@pytest.mark.parametrize("n", [2, 50])
def test_no_change_has_no_interval(n: int) -> None:
    hits = [i % 3 == 0 for i in range(n)]
    assert evaluate.paired_difference(hits, hits) == (0.0, 0.0, 0.0)


def test_one_example_says_nothing() -> None:
    change, low, high = evaluate.paired_difference([False], [True])
    assert (change, low, high) == (1.0, -math.inf, math.inf)


def test_the_interval_holds_what_it_says() -> None:
    """Of 2000 intervals of 400 pairs, 95 % hold the true change of 0.1: 1900 +- 4.5 x 9.75."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        before = generator.random(400) < 0.4
        after = np.where(before, generator.random(400) < 0.85, generator.random(400) < 0.2667)
        _, low, high = evaluate.paired_difference(before.tolist(), after.tolist())
        held += low <= 0.4 * 0.85 + 0.6 * 0.2667 - 0.4 <= high
    assert abs(held - 1900) < 44
