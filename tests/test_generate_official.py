"""What the leaderboard's scripts grade, from tokens: padded batches, special tokens, ends.

Padded batches of stock `generate`, with the positions that transformers 4 computes, against both
backends: right and left, with a pad token and without, prompts of unequal and of equal lengths,
tiny models and real ones. The harness's decoding, transcribed in `tests/official.py`, against ours
on real tokenizers and drawn tokens. And both scores of an answer: each by its own text, an early
exit, what is asked twice, and what a backend cannot ask. 25 s.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from fedsim import config, domains, model, peft_io, weights
from fedsim.data.embedded import finance
from fedsim.errors import ModelError
from fedsim.evaluate import padding, sandbox
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.scores import Subject, answer, evaluate
from fedsim.evaluate.stock import Stock
from fedsim.evaluate.suite import Questions, Suite
from fedsim.evaluate.writing import Reader, Writing
from fedsim.tasks import MENDED, Item
from tests import official
from tests.conftest import require
from tests.lab import open_base
from tests.real import real
from tests.toy_tokenizers import words

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
GREEDY, BARE = Sampling(), Adapter("bare")
ROWS = finance.test()[:6]
PROMPTS = [official.prompt("fpb", {"sentence": r["sentence"], "label": 0}) for r in ROWS]
TEXTS = [row["sentence"] for row in ROWS] + ["S", "Up?"]
Settings = Callable[..., config.Config]


# ------------------------------------------------------------------------------------ padding


def batch(
    lm: Any, tokenizer: Any, prompts: Sequence[str], most: int, **how: Any
) -> tuple[int, list[tuple[int, ...]]]:
    """The official call on a fresh model: its width, and what it writes of each prompt."""
    tokenizer, rows = official.tokenizer_with_pad(copy.deepcopy(tokenizer))
    if rows is not None:
        torch.manual_seed(2024)
        lm.resize_token_embeddings(rows)
    stock = lm.prepare_inputs_for_generation

    @wraps(stock)
    def prepare(input_ids: Any, **given: Any) -> Any:
        inputs = stock(input_ids, **given)
        if given["attention_mask"] is None:  # nothing is padded
            return inputs
        positions = official.position_ids(given["attention_mask"])
        return inputs | {"position_ids": positions[:, -inputs["input_ids"].shape[1] :]}

    lm.prepare_inputs_for_generation = prepare
    tokens = tokenizer(
        list(prompts), return_tensors="pt", padding=True, return_token_type_ids=False
    )
    wide = tokens["input_ids"].shape[1]
    with torch.no_grad():
        whole = lm.eval().generate(
            **tokens, max_length=wide + most, eos_token_id=tokenizer.eos_token_id, do_sample=False,
            **how,
        )  # fmt: skip
    out = []
    for row in whole[:, wide:].tolist():
        eos = tokenizer.eos_token_id
        out.append(tuple(row[: row.index(eos) + 1] if eos in row else row))
    return wide, out


def requests(tokenizer: Any, prompts: Sequence[str], wide: int, most: int) -> list[Request]:
    counts = [len(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    return [Request(p, 0, most, padded=wide if n < wide else 0, one_end=True)
            for p, n in zip(prompts, counts, strict=True)]  # fmt: skip


def variant(tokenizer: Any, side: str, own: bool) -> Any:
    made = copy.deepcopy(tokenizer)
    made.padding_side = side
    if own:
        made.pad_token = "S"
    return made


@pytest.fixture
def wide_windows(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model whose attention sees all that the finance script allows."""

    def make(architecture: str) -> Path:
        folder = tmp_path / architecture
        shutil.copytree(tiny(architecture), folder)
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"sliding_window": 512} if "sliding_window" in settings else {}
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


@pytest.mark.parametrize("own", [False, True], ids=["new pad", "own pad"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3"])
def test_a_padded_batch(
    settings: Settings, tokenizer: Any, wide_windows: Callable[[str], Path], architecture: str,
    side: str, own: bool,
) -> None:  # fmt: skip
    """Engine, transformers backend and the script's own batch; few slots and one prompt a pass as
    well. Behind the prompt padding changes texts, before it none."""
    folder, tokenizer = wide_windows(architecture), variant(tokenizer, side, own)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wide, want = batch(lm, tokenizer, TEXTS, 9)
    asked = requests(tokenizer, TEXTS, wide, 9)
    assert len({bool(r.padded) for r in asked}) == 2
    chosen = settings(architecture)
    base = open_base(chosen, folder)
    for budget, rows in ((10_000, 32_768), (1, 3 * wide)):
        engine = Engine(base, tokenizer, chosen.adapter, budget, cache_rows=rows)
        assert [o.tokens for o in engine.generate(asked, [BARE], GREEDY)] == want
    plain = Stock(weights.Weights(folder, "t", "t"), tokenizer, chosen)
    assert [o.tokens for o in plain.generate(asked, [BARE], GREEDY)] == want
    unpadded = engine.generate([replace(r, padded=0) for r in asked], [BARE], GREEDY)
    changed = [o.tokens != w for o, w in zip(unpadded, want, strict=True)]
    assert any(changed) is (side == "right")
    assert not any(c for c, r in zip(changed, asked, strict=True) if not r.padded)


def test_equal_prompts_are_not_padded(settings: Settings, tokenizer: Any, tiny: Any) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    wide, want = batch(lm, tokenizer, [TEXTS[0]] * 3, 9)
    asked = requests(tokenizer, [TEXTS[0]] * 3, wide, 9)
    assert [r.padded for r in asked] == [0] * 3
    engine = Engine(open_base(settings()), tokenizer, settings().adapter, 10_000)
    assert [o.tokens for o in engine.generate(asked, [BARE], GREEDY)] == want


def test_under_adapters(settings: Settings, tokenizer: Any, tiny: Any, tmp_path: Path) -> None:
    """Several, beside the bare base and unpadded prompts, in one call."""
    from peft import PeftModel

    chosen = settings()
    base = open_base(chosen)
    row = torch.randn(base.layout.size, generator=torch.Generator().manual_seed(1)) * 0.3
    peft_io.export(tmp_path / "a", row, base.layout, chosen.adapter, str(tiny("llama")))
    lm = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    wide, first = batch(lm, tokenizer, TEXTS, 7)
    lm = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    _, second = batch(PeftModel.from_pretrained(lm, tmp_path / "a").merge_and_unload(),
                      tokenizer, TEXTS, 7)  # fmt: skip
    mine = requests(tokenizer, TEXTS, wide, 7)
    asked = [replace(r, adapter=a) for a in (1, 0) for r in mine]
    asked += [replace(r, padded=0) for r in mine]
    adapters = [BARE, Adapter("a", tmp_path / "a")]
    for backend in (
        Engine(base, tokenizer, chosen.adapter, 10_000),
        Stock(weights.Weights(tiny("llama"), "t", "t"), tokenizer, chosen, batch=4),
    ):
        got = [o.tokens for o in backend.generate(asked, adapters, GREEDY)]
        assert got[:16] == [*second, *first] and got[16:] != first


def test_repetitions_of_padding_count(settings: Settings, tokenizer: Any, tiny: Any) -> None:
    """transformers counts padding as a text that holds the pad token: a new one, and each of those
    that the model would have written."""

    def compare(made: Any) -> list[tuple[int, ...]]:
        lm = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
        wide, want = batch(lm, made, TEXTS, 12, repetition_penalty=3.0)
        engine = Engine(open_base(settings()), made, settings().adapter, 10_000)
        engine._settings.repetition_penalty = 3.0
        asked = requests(made, TEXTS, wide, 12)
        assert [o.tokens for o in engine.generate(asked, [BARE], GREEDY)] == want
        return want

    for token in sorted({tokens[1] for tokens in compare(tokenizer)})[:4]:
        made = copy.deepcopy(tokenizer)
        made.pad_token = made.convert_ids_to_tokens(token)
        compare(made)


def test_one_token_behind_padding(settings: Settings, tokenizer: Any, tiny: Any) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    wide, want = batch(lm, tokenizer, TEXTS, 1)
    engine = Engine(open_base(settings()), tokenizer, settings().adapter, 10_000)
    asked = requests(tokenizer, TEXTS, wide, 1)
    assert [o.tokens for o in engine.generate(asked, [BARE], GREEDY)] == want


def test_a_narrow_window_is_refused(settings: Settings, tokenizer: Any) -> None:
    engine = Engine(open_base(settings("mistral")), tokenizer, settings().adapter, 10_000)
    with pytest.raises(ModelError, match=r"sliding_window: got 5; expected at least 51,.*transf"):
        engine.generate([Request("Up?", 0, 11, padded=40)], [BARE], GREEDY)
    assert engine.generate([Request("Up?", 0, 11)], [BARE], GREEDY)


def test_the_embedding_of_a_new_pad_token() -> None:
    """The mean of the rows, through a module that scales what it looks up, and no longer."""
    module = Gemma3TextScaledWordEmbedding(20, 8, padding_idx=3, embed_scale=2.5)
    lm, before = SimpleNamespace(get_input_embeddings=lambda: module), module(torch.arange(20))
    with torch.no_grad(), padding.embedded(lm, 20):
        got = module(torch.tensor([[4, 20, 19]]))[0]
    assert torch.equal(got[[0, 2]], before[[4, 19]])
    torch.testing.assert_close(got[1], module.weight.mean(0) * 2.5)
    assert torch.equal(module(torch.arange(20)), before)
    with pytest.raises(IndexError):
        module(torch.tensor([20]))


def test_the_pad_token(tokenizer: Any) -> None:
    """The script's own choice: a new one where there is none, or where it is the EOS as well."""
    for made in (tokenizer, variant(tokenizer, "right", True)):
        theirs, _ = official.tokenizer_with_pad(copy.deepcopy(made))
        assert padding.pad_token(made) == theirs.pad_token_id
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    assert padding.pad_token(same) == len(same) == len(official.tokenizer_with_pad(same)[0]) - 1


def against_the_script(name: str, most: int) -> None:
    found = real(name)
    tokenizer = weights.tokenizer(found)
    chosen = config.build(
        {"model": {"dtype": "float32"}, "run": {"device": "cpu"},
         "adapter": {"targets": ["q_proj", "v_proj"]}}, "test",
    )  # fmt: skip
    lm = AutoModelForCausalLM.from_pretrained(found.path, dtype=torch.float32)
    lm.generation_config.repetition_penalty = 1.0
    wide, want = batch(lm, tokenizer, PROMPTS, most)
    base = model.load(found, chosen, torch.device("cpu"), chosen.adapter.targets)
    engine = Engine(base, tokenizer, chosen.adapter, 2048)
    engine._settings.repetition_penalty = 1.0
    asked = requests(tokenizer, PROMPTS, wide, most)
    got = engine.generate([*asked, *(replace(r, padded=0) for r in asked)], [BARE], GREEDY)
    assert [o.tokens for o in got[: len(want)]] == want
    assert [o.tokens for o in got[len(want) :]] != want


def test_a_padded_batch_of_smollm2() -> None:
    against_the_script("smollm2", 6)


@pytest.mark.slow
def test_a_padded_batch_of_qwen() -> None:
    against_the_script("qwen", 24)


# --------------------------------------------------------------------------------------- ends


def test_the_tokenizers_own_end(settings: Settings, tokenizer: Any) -> None:
    """Others that generation_config names end an ordinary text, and the mended one of this."""
    engine = Engine(open_base(settings()), tokenizer, settings().adapter, 10_000)
    asked = [Request(t, 0, 30, one_end=True) for t in TEXTS]
    got = engine.generate(asked, [BARE], GREEDY)
    assert all(o.mended == o.text for o in got)
    more = got[0].tokens[3]
    engine._settings.eos_token_id = [0, more]
    assert [o.tokens for o in engine.generate(asked, [BARE], GREEDY)] == [o.tokens for o in got]
    ordinary = engine.generate([replace(r, one_end=False) for r in asked], [BARE], GREEDY)
    again = engine.generate(asked, [BARE], GREEDY)
    assert [o.plain for o in again] == [o.text for o in ordinary] != [o.text for o in again]
    assert ordinary[0].end == "eos" and all(o.mended is None for o in ordinary)


# ------------------------------------------------------------------------- the harness's text

DOC = {"prompt": 'def two():\n    """ Two. """\n', "test": "", "entry_point": "two"}
TASKS = ("humaneval", "multiple-js", "multiple-cpp")


def tokenizer_of(name: str) -> tuple[Any, Reader]:
    """A real model's tokenizer, and its reader; ends are those of the published models."""
    tokenizer = weights.tokenizer(real(name))
    ends = {"smollm2": 2, "qwen": [151645, 151643], "gemma": [1, 106]}
    return tokenizer, Reader(tokenizer, GenerationConfig(eos_token_id=ends[name]))


def write(task: str, reader: Reader, tokens: Sequence[int]) -> Output:
    """What is read when a model writes these tokens behind the prompt, as they are asked for."""
    prompt, stop = official.prompt(task, DOC), official.stops(task, reader.tokenizer)
    request = Request(prompt, 0, len(tokens), tuple(stop), special=True)
    writing = Writing(request, reader.tokenizer(prompt)["input_ids"], reader)
    for token in tokens:
        writing.add(token)
        if writing.end is not None:
            break
    return writing.output()


def harness(task: str, tokenizer: Any, tokens: Sequence[int]) -> str:
    ids = tokenizer(official.prompt(task, DOC))["input_ids"]
    return official.code(task, DOC, tokenizer, [*ids, *tokens])


def test_file_sep_is_seen() -> None:
    """It is a special token of SmolLM2's."""
    tokenizer, reader = tokenizer_of("smollm2")
    body, rest = (tokenizer(t)["input_ids"] for t in ("\n    return 2", "\nmore"))
    sep = tokenizer.convert_tokens_to_ids("<file_sep>")
    assert tokenizer.decode([sep], skip_special_tokens=True) == ""
    got = write("humaneval", reader, [*body, sep, *rest])
    assert (got.text, got.end, got.tokens) == ("\n    return 2", "stop", (*body, sep))
    assert got.mended == got.text
    assert DOC["prompt"].strip() + got.text == harness("humaneval", tokenizer, [*body, sep, *rest])


def test_endoftext_stays_in_the_program() -> None:
    """Qwen ends with it, and it is not its tokenizer's EOS."""
    tokenizer, reader = tokenizer_of("qwen")
    body = tokenizer("\n    return 2")["input_ids"]
    text_end, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>"))
    assert tokenizer.eos_token_id == eos and text_end in reader.model_ends
    got = write("humaneval", reader, [*body, text_end])
    assert (got.text, got.end) == ("\n    return 2<|endoftext|>", "eos")
    assert got.mended == "\n    return 2"
    assert DOC["prompt"].strip() + got.text == harness("humaneval", tokenizer, got.tokens)
    got = write("humaneval", reader, [*body, eos])
    assert got.text == got.mended == "\n    return 2"
    assert DOC["prompt"].strip() + got.text == harness("humaneval", tokenizer, got.tokens)


@pytest.mark.parametrize("name", ["smollm2", "qwen", "gemma"])
def test_drawn_tokens_are_read_as_the_harness_reads_them(name: str) -> None:
    """Any tokens, special ones among them: it stops at the token at which the harness stops, its
    text is the harness's, and the mended one what an ordinary request reads in the same tokens."""
    tokenizer, reader = tokenizer_of(name)
    rng = random.Random(name)
    pieces = ["\n", "    return 2", "\n#", "\ndef", "}", "\n}", " x", "é", "😀", "\n//", "  ", "if",
              "<file_sep>", tokenizer.eos_token]  # fmt: skip
    ends, stopped, kept = set(), 0, 0
    for task in TASKS:
        for _ in range(60):
            tokens: list[int] = []
            for _ in range(12):
                kind = rng.random()
                if kind < 0.6:
                    tokens += tokenizer(rng.choice(pieces), add_special_tokens=False)["input_ids"]
                elif kind < 0.97:
                    tokens.append(rng.randrange(len(tokenizer)))
                else:
                    tokens.append(rng.choice(tokenizer.all_special_ids))
            got = write(task, reader, tokens)
            n = next((n for n in range(1, len(tokens) + 1)
                      if official.end_of_function(task, tokenizer, tokens[:n])
                      or tokens[n - 1] in reader.model_ends), len(tokens))  # fmt: skip
            assert got.tokens == tuple(tokens[:n])
            assert official.prompt(task, DOC) + got.text == harness(task, tokenizer, tokens[:n])
            stop = tuple(official.stops(task, tokenizer))
            plain = Writing(Request("", 0, n + 1, stop), [], reader)
            for token in tokens[:n]:
                plain.add(token)
            plain.end = plain.end or "length"
            assert got.mended == plain.output().text and plain.output().mended is None
            ends.add(got.end)
            stopped += n < len(tokens)
            kept += got.text != got.mended
    assert ends == {"eos", "stop", "length"} and stopped > 30 and kept > 5


# ---------------------------------------------------------------------------------- two scores


@dataclass
class Given:
    """A backend that answers from a list."""

    outputs: Sequence[Output]
    pads: bool = True
    name: str = "given"
    ranks: bool = False
    asked: list[Request] = field(default_factory=list)

    def generate(
        self, requests: Sequence[Request], adapters: Sequence[Adapter], sampling: Sampling
    ) -> list[Output]:
        self.asked = list(requests)
        return list(self.outputs)


def asked_of(
    backend: Given, tokenizer: Any, domain: str, task: str, rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    form = domains.load(domain).tasks[task].forms["flowertune"]
    questions = Questions(form, [form.item(row) for row in rows], "here", "0", True)
    subject = Subject(backend, tokenizer, [BARE], [0], "float32", GREEDY)
    lines = answer(subject, task, questions)
    scores, _ = evaluate(subject, Suite(domain, "flowertune", {task: questions}))
    assert [s.metric for s in scores] == [m for m in form.metrics if m in lines[0]]
    return lines


SENTENCES = [{"sentence": s, "label": 2} for s in ("Up .", "Up and up .", "Down .", "So .")]


def output(text: str, mended: str | None = None) -> Output:
    return Output(text, (), "length", mended=mended)


def test_padded_prompts_are_asked_twice() -> None:
    """All but the longest of the batch; each score by its own text, and both are kept."""
    texts = [output("none"), output("positive", "neutral"), output("positive"), output("no", "so"),
             output("x", "positive"), output("negative"), output("positive yes")]  # fmt: skip
    backend = Given(texts)
    lines = asked_of(backend, words(), "finance", "fpb", SENTENCES)
    wide = len(backend.asked[1].prompt.split())
    assert [r.padded for r in backend.asked] == [wide, 0, wide, wide, 0, 0, 0]
    assert [r.prompt for r in backend.asked[4:]] == [backend.asked[i].prompt for i in (0, 2, 3)]
    assert all(r.one_end and not r.special for r in backend.asked)
    assert [line["output"] for line in lines] == ["none", "positive", "positive", "no"]
    assert [line["mended"] for line in lines] == ["positive", "neutral", "negative", "positive yes"]
    assert [line["official"] for line in lines] == [False, True, True, False]
    assert [line[MENDED] for line in lines] == [True, False, False, True]


def test_padding_before_the_prompt_is_asked_once() -> None:
    backend = Given([output(t) for t in ("positive", "b", "c", "positive")])
    lines = asked_of(backend, words("left"), "finance", "fpb", SENTENCES)
    assert len(backend.asked) == 4 and sum(r.padded > 0 for r in backend.asked) == 3
    assert [line["official"] for line in lines] == [line[MENDED] for line in lines]


def test_batches_are_of_32_in_the_sets_order() -> None:
    counts = [1 + i % 7 + 5 * (i // 32) for i in range(70)]
    longest = [max(counts[i - i % 32 : i - i % 32 + 32]) for i in range(70)]
    shorter = sum(n < most for n, most in zip(counts, longest, strict=True))
    backend = Given([output("")] * (70 + shorter))
    rows = [{"sentence": "up " * n, "label": 1} for n in counts]
    assert len(asked_of(backend, words(), "finance", "fpb", rows)) == 70
    frame = len(backend.asked[0].prompt.split()) - counts[0]
    want = [frame + most if n < most else 0 for n, most in zip(counts, longest, strict=True)]
    assert [r.padded for r in backend.asked] == want + [0] * shorter


def test_a_backend_that_cannot_pad_gives_the_mended_score() -> None:
    backend = Given([output("positive", t) for t in ("a", "b", "positive", "d")], pads=False)
    lines = asked_of(backend, words(), "finance", "fpb", SENTENCES)
    assert all(r.padded == 0 for r in backend.asked) and len(backend.asked) == 4
    assert [line[MENDED] for line in lines] == [False, False, True, False]
    assert not any("official" in line or "output" in line for line in lines)


PROGRAMS = {
    "humaneval": {"prompt": "def two():\n", "test": "def check(f):\n    assert f() == 2\n",
                  "entry_point": "two"},
    "multipl_js": {"prompt": "function two(){", "tests": "require('assert').equal(two(), 2);"},
    "multipl_cpp": {"prompt": "#include <cassert>\n#include <cstdlib>\nlong two() {",
                    "tests": "}\nint main() { assert(two() == 2); }"},
}  # fmt: skip
RIGHT = {"humaneval": "\n    return 2", "multipl_js": "\nreturn 2}", "multipl_cpp": "\nreturn 2;"}
EARLY = {"humaneval": "\n    exit(0)", "multipl_js": "\nprocess.exit(0)}",
         "multipl_cpp": "\nexit(0);"}  # fmt: skip


@pytest.mark.parametrize("task", PROGRAMS)
def test_programs_are_graded_twice(task: str) -> None:
    """A token in the text, an exit before the tests, a right one and a wrong one."""
    for name in {"humaneval": (), "multipl_js": ("node",), "multipl_cpp": ("g++",)}[task]:
        require(name, shutil.which(name) is not None, f"{name} is not installed")
    right, early = RIGHT[task], EARLY[task]
    wrong = right.replace("2", "3")
    texts = [output(right, right), output(f"{right}<|endoftext|>", right), output(early, early),
             output(wrong, wrong)]  # fmt: skip
    backend = Given(texts)
    lines = asked_of(backend, words(), "coding", task, [PROGRAMS[task]] * 4)
    assert [line["official"] for line in lines] == [True, False, task != "humaneval", False]
    assert [line[MENDED] for line in lines] == [True, True, False, False]
    assert [line["output"] for line in lines] == [o.text for o in texts]
    assert [line["mended"] for line in lines] == [o.mended for o in texts]
    assert all(r.special and r.stop[-1] == "<eos>" and not r.padded for r in backend.asked)


def test_one_run_decides_both(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    grade = sandbox.grade
    monkeypatch.setattr(sandbox, "grade", lambda p, **how: ran.append(len(p)) or grade(p, **how))
    texts = [output(RIGHT["humaneval"], RIGHT["humaneval"])]
    asked_of(Given(texts), words(), "coding", "humaneval", [PROGRAMS["humaneval"]])
    assert set(ran) == {1}


def test_the_form_says_nothing_of_mended_where_no_accident_is_mended() -> None:
    for name in ("general", "medical"):
        for task in domains.load(name).tasks.values():
            assert MENDED not in task.forms["flowertune"].metrics
    form = domains.load("finance").tasks["fpb"].forms["flowertune"]
    assert form.grade(Item("Answer: ", "positive"), "positive") == {"official": True, MENDED: True}
