"""SmolLM2: our backend and transformers write the same greedy tokens, all of them in fp32.

A few prompts in the normal run, about 25 s. `slow`: 400 of every multiple-choice task, 120 of every
finance set and 40 of every coding task, with the leaderboard's prompts, bare and under an adapter;
answers of finance and coding up to 128 tokens, which stock writes in left-padded batches of 8.
Where two tokens are nearer to each other than rounding, either may be written: such a place must be
within 1e-3 in stock's own logits, whose largest are about 20, and is printed. About an hour. In
bf16, whose unit at 20 is 1/8, a quarter of these prompts: the rate and the margins are printed.
Where the processor has no bf16 products they are taken as such a unit takes them, exact, summed in
fp32 and rounded once: 109 GFLOP/s on two AVX2 cores, where torch's own stand-in has 17.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedsim import config, domains, model, peft_io, seeds, weights
from fedsim.data import sources, tokens
from fedsim.data.embedded import finance
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Request, Sampling
from fedsim.evaluate.scores import most_tokens
from fedsim.evaluate.stock import Stock
from fedsim.evaluate.suite import items
from tests.conftest import require

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
USER_CACHE = tokens.cache_root()  # before a fixture turns it elsewhere
REAL = Path(os.environ.get("FEDSIM_DATA") or Path(__file__).parents[2] / "shared" / "data")
GREEDY = Sampling()
TIE = 1e-3
UNIT = 2.0**-3  # of bf16 from 16 to 32: what a logit of 20 is rounded to
LONGEST = 128
COUNTS = {"general": 400, "medical": 400, "finance": 120, "coding": 40}
TASKS = {
    "general": ("mmlu_stem", "mmlu_social_sciences", "mmlu_humanities"),
    "medical": ("pubmedqa", "medmcqa", "medqa", "careqa"),
    "finance": ("fpb", "fiqa", "tfns"),
    "coding": ("humaneval", "mbpp", "multipl_js", "multipl_cpp"),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Stock, tuple[Adapter, ...]]:
    """The two backends, and the bare base beside an adapter that changes every text."""
    return backends("float32", tmp_path_factory)


@pytest.fixture(scope="module")
def rounded(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, Stock, tuple[Adapter, ...]]]:
    """The same in bf16."""
    products = torch.library.Library("aten", "IMPL")  # undone when it is destroyed
    if not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name in ("mm", "bmm"):
                products.impl(name, partial(in_fp32, getattr(torch, name)), "CPU")
            products.impl("addmm", added_in_fp32, "CPU")
    yield backends("bfloat16", tmp_path_factory)
    products._destroy()


def in_fp32(product: Any, a: Tensor, b: Tensor) -> Tensor:
    """A product of bf16 matrices from its exact terms, summed in fp32 and rounded once."""
    out = a.new_empty(*a.shape[:-1], b.shape[-1], dtype=torch.float32)
    return product(a.float(), b.float(), out=out).to(a.dtype)


def added_in_fp32(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """addmm, the sum in fp32 as well."""
    out = torch.empty(a.shape[0], b.shape[1])
    return torch.addmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha, out=out).to(a.dtype)


def backends(
    dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Engine, Stock, tuple[Adapter, ...]]:
    folders = list((USER_CACHE / "models").glob("smollm2-135m-instruct-*"))
    require("model", bool(folders), f"no converted model lies in {USER_CACHE}/models")
    found = weights.Weights(folders[0], "test", "test")
    tokenizer = weights.tokenizer(found)
    settings = config.build(
        {"model": {"dtype": dtype}, "run": {"device": "cpu"},
         "adapter": {"rank": 8, "alpha": 16.0, "targets": ["all-linear"]}}, "test",
    )  # fmt: skip
    base = model.load(found, settings, torch.device("cpu"), settings.adapter.targets)
    row = torch.zeros(1, base.layout.size)
    for a, b in base.layout.factors(row).values():
        a.normal_(std=a.shape[-1] ** -0.5, generator=torch.Generator().manual_seed(1))
        b.normal_(std=0.01, generator=torch.Generator().manual_seed(2))
    folder = tmp_path_factory.mktemp("adapter") / "random"
    peft_io.export(folder, row[0], base.layout, settings.adapter, found.name)
    adapters = (Adapter("bare"), Adapter("random", folder))
    return (
        Engine(base, tokenizer, settings.adapter, 2048), Stock(found, tokenizer, settings), adapters
    )  # fmt: skip


def compare(
    both: Any, asked: Sequence[Request], batch: int = 1, tie: float = TIE
) -> list[float]:  # fmt: skip
    """Stock's top-two margin at every first difference, which is a tie or an error."""
    engine, stock, adapters = both
    stock._batch = batch
    ours = engine.generate(asked, adapters, GREEDY)
    theirs = stock.generate(asked, adapters, GREEDY)
    margins = []
    for request, got, want in zip(asked, ours, theirs, strict=True):
        if got == want:
            continue
        steps = zip(got.tokens, want.tokens, strict=False)
        at = next(i for i, (a, b) in enumerate(steps) if a != b)
        ids = engine._tokenizer(request.prompt)["input_ids"] + list(want.tokens[:at])
        lm = stock._under(adapters[request.adapter])
        with torch.no_grad():
            z = lm(torch.tensor([ids])).logits[0, -1]
        stock._model = lm.unload() if lm is not stock._model else lm
        pair = z[[got.tokens[at], want.tokens[at]]]
        margin = float((pair[1] - pair[0]).abs())
        assert max(margin, float(z.max() - pair.min())) < tie, (request.prompt[-200:], at, margin)
        margins.append(margin)
    return margins


def test_a_few_prompts(both: Any) -> None:
    rows = finance.test()
    texts = [f"Input: {row['sentence']}\nAnswer: " for row in rows[:10]]
    letters = [
        f"Question: {row['sentence']}\nA. up\nB. down\nThe answer is:" for row in rows[10:22]
    ]
    asked = [Request(t, a, 1) for a in (0, 1) for t in letters]
    asked += [Request(t, a, 6 + 5 * i) for a in (0, 1) for i, t in enumerate(texts[:4])]
    asked.append(Request("def add(a, b):\n", 0, 24, ("\n\n", "\ndef")))
    assert compare(both, asked) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "task"), [(domain, task) for domain, names in TASKS.items() for task in names]
)
def test_seeded_samples_of_every_task(both: Any, domain: str, task: str, capsys: Any) -> None:
    asked = sample(both, domain, task, COUNTS[domain])
    margins = compare(both, asked, 8 if domain in ("finance", "coding") else 1)
    with capsys.disabled():
        print(f"\n{task}: {len(asked)} prompts, ties at {[f'{m:.0e}' for m in margins]}")
    assert len(margins) <= 0.02 * len(asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "task"), [(domain, task) for domain, names in TASKS.items() for task in names]
)
def test_in_bf16(rounded: Any, domain: str, task: str, capsys: Any) -> None:
    """Where they differ, stock's own margin is of the size of its logits' rounding: 4 units."""
    asked = sample(rounded, domain, task, COUNTS[domain] // 4)
    margins = compare(rounded, asked, 8 if domain in ("finance", "coding") else 1, 4 * UNIT)
    with capsys.disabled():
        print(f"\n{task} in bf16: {len(asked) - len(margins)} of {len(asked)} alike, "
              f"others at margins of {[f'{m:.2g}' for m in sorted(margins)]}")  # fmt: skip


def sample(both: Any, domain: str, task: str, count: int) -> list[Request]:
    """Questions of a task, in turn bare and under the adapter."""
    require("data", REAL.is_dir(), f"no data at {REAL}")
    found = domains.load(domain)
    form = found.tasks[task].forms["flowertune"]
    data = config.Data(domain=domain, source="directory", dir=str(REAL))
    rows = sources.load(data, found, found.tasks[task].data, found.tasks[task].columns)
    order = seeds.permutation(seeds.run_key(7), seeds.Purpose.SUBSET, len(rows))
    picked = items(form, [rows.rows[i] for i in order[:count]], rows.origin)
    most = most_tokens(form, picked, both[0]._tokenizer)
    return [
        Request(item.prompt, i % 2, min(n, LONGEST), form.generation.stop)
        for i, (item, n) in enumerate(zip(picked, most, strict=True))
    ]
