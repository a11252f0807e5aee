"""Answers are those of the stock model, one choice after another.

`answer` packs all questions into a tree of shared prefixes; here every choice is read alone by
stock transformers with stock PEFT's adapter, token by token: log-probabilities within 1e-4 and the
same greedy flags, for choices of one and of several tokens, a choice that begins another, choices
that change how the prompt's end is tokenised, one pass and many. About 8 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedsim import model, peft_io, weights
from fedsim.config import Config
from fedsim.domains import PROMPT
from fedsim.evaluate.choices import Answer, Question, answer, question
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Request, Sampling
from fedsim.prefix import common_prefix

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
    (got,) = answer(pair.base, pair.row[None], [SCALE], questions, budget)
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


@pytest.mark.parametrize("budget", [4096, 150, 1])
def test_many_adapters_in_one_call(
    settings: Callable[..., Config], pair: Any, budget: int
) -> None:  # fmt: skip
    """Each answers as it does alone; the bare base is the row of zeros, or the scale 0."""
    both = pair(settings("llama"), "llama")
    generator = np.random.default_rng(7)
    questions = [tree(generator, int(n)) for n in generator.integers(4, 40, 7)]
    rows = torch.stack([both.row, both.row * 0, both.row, both.row * -0.5])
    scales = [SCALE, 3.0, 0.0, 1.0]
    got = answer(both.base, rows, torch.tensor(scales), questions, budget)
    assert [len(answers) for answers in got] == [7] * 4
    for row, scale, answers in zip(rows, scales, got, strict=True):
        (alone,) = answer(both.base, row[None], [scale], questions, budget)
        for mine, theirs in zip(answers, alone, strict=True):
            assert np.abs(mine.logprob - theirs.logprob).max() <= 1e-4
            assert mine.greedy.tolist() == theirs.greedy.tolist()
    stock = one_by_one(both.stock, questions[3])
    assert np.abs(got[0][3].logprob - stock.logprob).max() <= 1e-4
    assert np.abs(got[1][3].logprob - got[2][3].logprob).max() <= 1e-4
    assert np.abs(got[1][3].logprob - got[0][3].logprob).max() > 1e-2


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("budget", [4096, 70])
def test_a_call_that_writes_also_ranks(
    settings: Callable[..., Config], tokenizer: Any, pair: Any, choices: str, budget: int
) -> None:
    """The log-probabilities of `answer`, whether a choice is one token or several."""
    config = settings("llama")
    both = pair(config, "llama")
    prompts = [PROMPT.format(instruction=asked) for asked in ASKED]
    engine = Engine(both.base, tokenizer, config.adapter, budget)
    adapters = [Adapter("zero", row=both.row * 0), Adapter("own", row=both.row)]
    requests = [Request(p, a, 3, choices=CHOICES[choices]) for a in (1, 0) for p in prompts]
    got = engine.generate(requests, adapters, Sampling())
    asked = [question(tokenizer, p, CHOICES[choices]) for p in prompts]
    want = [one for row in (both.row, both.row * 0)
            for one in answer(both.base, row[None], [SCALE], asked, 10_000)[0]]  # fmt: skip
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(np.array(ours.logprob) - theirs.logprob).max() <= 1e-4
    plain = engine.generate([Request(p, 1, 3) for p in prompts], adapters, Sampling())
    assert [o.tokens for o in plain] == [o.tokens for o in got[:3]]
    assert all(o.logprob == () for o in plain)


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
