"""Our backend writes what stock transformers writes under stock PEFT, token by token.

The oracle is `generate` of a stock model under PEFT's own wrapper, one prompt at a time, and plain
Python for stop texts. Five architectures; adapters made by PEFT, of different ranks, targets and
scales, beside the bare base, in one call; prompts of 1 to 120 tokens that share beginnings; passes
and caches too small for all. Draws are compared with softmax and with transformers' own filters.
The real model is compared on a few prompts; `slow` takes hundreds of every task. About 45 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fedsim import model, weights
from fedsim.config import Config
from fedsim.data.embedded import finance
from fedsim.errors import DataError, ModelError, RunError
from fedsim.evaluate.drawing import Drawing
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Output, Request, Sampling
from fedsim.evaluate.prefill import Prompt, fitting, pack
from fedsim.evaluate.stock import Stock
from fedsim.evaluate.writing import Reader, Writing
from tests.lab import open_base

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma2", "phi3")
GREEDY = Sampling()
TEXTS = [row["input"] for row in finance.train()]
LONG = " ".join(TEXTS[:4])
PROMPTS = (
    "S", TEXTS[0], TEXTS[0] + " " + TEXTS[1], TEXTS[0] + " " + TEXTS[2], LONG, LONG + " Again.",
    TEXTS[0], "Up or down?", TEXTS[5][:20],
)  # fmt: skip
LENGTHS = (7, 1, 12, 3, 20, 2, 5, 1, 30)


@dataclass(frozen=True)
class Bench:
    """One architecture: its folder, its adapters' folders, and the stock model's own texts."""

    config: Config
    folder: Path
    adapters: tuple[Adapter, ...]

    def base(self) -> model.Base:
        return open_base(self.config, self.folder)

    def engine(self, tokenizer: Any, budget: int = 10_000, **cache_rows: int) -> Engine:
        return Engine(self.base(), tokenizer, self.config.adapter, budget, **cache_rows)

    def stock(self, adapter: Adapter) -> Any:
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return PeftModel.from_pretrained(plain, adapter.folder) if adapter.folder else plain


def make_adapters(folder: Path, out: Path, architecture: str) -> tuple[Adapter, ...]:
    """PEFT's own files: whole and low ranks, one with patterns, one on few modules."""
    from peft import LoraConfig, get_peft_model

    down = {"target_modules": ["down_proj"]}
    kinds: dict[str, dict[str, Any]] = {
        "four": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "one": {"r": 1, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
        "few": {"r": 2, "lora_alpha": 6, **down},
        "patterns": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear",
                     "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.*o_proj": 9}},
    }  # fmt: skip
    made = [Adapter("bare")]
    for seed, (name, settings) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wrapped = get_peft_model(
            plain, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        )
        wrapped.save_pretrained(out / name)
        made.append(Adapter(name, out / name))
    made[2:2] = [Adapter("bare again")]
    return tuple(made)


@pytest.fixture(scope="module")
def bench(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[..., Config], str], Bench]:
    made: dict[str, Bench] = {}

    def make(settings: Callable[..., Config], architecture: str = "llama") -> Bench:
        if architecture not in made:
            folder, out = tiny(architecture), tmp_path_factory.mktemp("adapters")
            adapters = make_adapters(folder, out, architecture)
            made[architecture] = Bench(settings(architecture), folder, adapters)
        return made[architecture]

    return make


Make = Callable[..., Bench]
Settings = Callable[..., Config]


class Oracle:
    """`generate` of the stock model, a prompt at a time."""

    def __init__(self, made: Bench, tokenizer: Any) -> None:
        self._made, self._tokenizer = made, tokenizer
        self._loaded: tuple[int, Any] | None = None
        self._known: dict[Any, tuple[int, ...]] = {}

    def __call__(self, adapter: int, prompt: str, most: int, **settings: Any) -> tuple[int, ...]:
        key = (adapter, prompt, most, repr(settings))
        if key not in self._known:
            if self._loaded is None or self._loaded[0] != adapter:
                self._loaded = adapter, self._made.stock(self._made.adapters[adapter]).eval()
            ids = torch.tensor([self._tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                whole = self._loaded[1].generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=most, pad_token_id=0, **settings,
                )  # fmt: skip
            self._known[key] = tuple(whole[0, ids.shape[1] :].tolist())
        return self._known[key]


@pytest.fixture(scope="module")
def oracle(tokenizer: Any) -> Callable[[Bench], Oracle]:
    made: dict[Path, Oracle] = {}
    return lambda one: made.setdefault(one.folder, Oracle(one, tokenizer))


def requests(adapters: int) -> list[Request]:
    """Every prompt under every adapter, adapters taking turns."""
    return [Request(p, (i + a) % adapters, n) for a in range(adapters)
            for i, (p, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True))]  # fmt: skip


# --------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("budget", "rows"), [(10_000, 32_768), (150, 500), (1, 1)])
def test_greedy_is_the_stock_models(
    settings: Settings, tokenizer: Any, bench: Make, oracle: Any, architecture: str, budget: int,
    rows: int,
) -> None:  # fmt: skip
    made = bench(settings, architecture)
    asked = requests(len(made.adapters))
    if rows == 1:  # one sequence at a time, one prompt a pass: a few are enough
        asked = asked[::5]
    got = made.engine(tokenizer, budget, cache_rows=rows).generate(asked, made.adapters, GREEDY)
    want = {}
    for i, r in sorted(enumerate(asked), key=lambda pair: pair[1].adapter):
        want[i] = oracle(made)(r.adapter, r.prompt, r.max_new)
    assert [o.tokens for o in got] == [want[i] for i in range(len(asked))]
    for output in got:
        assert output.text == tokenizer.decode(output.tokens, skip_special_tokens=True)
        assert output.end == ("eos" if output.tokens[-1] == 0 else "length")
    if rows > 1:  # adapters matter, or this would prove little
        texts = {tuple(o.tokens for o, r in zip(got, asked, strict=True) if r.adapter == a)
                 for a in range(len(made.adapters))}  # fmt: skip
        assert len(texts) >= len(made.adapters) - 1


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_alone_is_together(
    settings: Settings, tokenizer: Any, bench: Make, architecture: str
) -> None:
    made = bench(settings, architecture)
    asked = requests(len(made.adapters))[3::4]
    engine = made.engine(tokenizer)
    together = engine.generate(asked, made.adapters, GREEDY)
    for request, output in zip(asked, together, strict=True):
        alone = made.adapters[request.adapter]
        assert engine.generate([replace(request, adapter=0)], [alone], GREEDY) == [output]


def test_dora(settings: Settings, tokenizer: Any, tiny: Any, tmp_path: Path) -> None:
    """Magnitudes of PEFT's own, and of the bare base, where they change nothing."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    wrapped = get_peft_model(plain, LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, use_dora=True, init_lora_weights=False,
        target_modules=["q_proj", "v_proj", "down_proj"],
    ))  # fmt: skip
    for name, p in wrapped.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + 0.3 * torch.rand_like(p)
    wrapped.save_pretrained(tmp_path / "dora")
    config = settings(adapter__dora=True)
    adapters = (Adapter("dora", tmp_path / "dora"), Adapter("bare"))
    made = Bench(config, tiny("llama"), adapters)
    asked = [Request(p, a, n) for a in (0, 1) for p, n in zip(PROMPTS[:5], LENGTHS, strict=False)]
    got = made.engine(tokenizer).generate(asked, adapters, GREEDY)
    told = Oracle(made, tokenizer)
    assert [o.tokens for o in got] == [told(r.adapter, r.prompt, r.max_new) for r in asked]
    assert [o.tokens for o in got[:5]] != [o.tokens for o in got[5:]]


def test_a_row_is_scaled_by_its_run(settings: Settings, tokenizer: Any, bench: Make) -> None:
    """A row is the adapter that its export is, at the run's own scale or at another."""
    from fedsim import peft_io

    made = bench(settings)
    folder = next(a.folder for a in made.adapters if a.name == "four")
    assert folder is not None
    engine = made.engine(tokenizer)  # alpha 8 of rank 4, as the folder has it
    row = peft_io.load(folder, made.base().layout)
    asked = [Request(p, a, 9) for a in range(3) for p in PROMPTS[:3]]
    adapters = [Adapter("folder", folder), Adapter("row", row=row), Adapter("r", row=row, scale=2)]
    got = engine.generate(asked, adapters, GREEDY)
    assert got[:3] == got[3:6] == got[6:]
    other = [replace(adapters[1], scale=0.0), Adapter("bare")]
    zero, bare = engine.generate([Request(PROMPTS[1], a, 9) for a in (0, 1)], other, GREEDY)
    assert zero == bare != got[1]


# --------------------------------------------------------------------------------- endings


def test_eos_in_the_middle(settings: Settings, tokenizer: Any, bench: Make, oracle: Any) -> None:
    """The model's generation_config names more tokens that end a text; all of them do."""
    made = bench(settings)
    asked = [replace(r, max_new=20) for r in requests(2)]
    whole = [oracle(made)(r.adapter, r.prompt, 20) for r in asked]
    more = sorted({whole[0][4], whole[7][9], whole[11][0]})
    engine = made.engine(tokenizer, 200, cache_rows=600)
    engine._settings.eos_token_id = more
    got = engine.generate(asked, made.adapters, GREEDY)
    want = [oracle(made)(r.adapter, r.prompt, 20, eos_token_id=[0, *more]) for r in asked]
    assert [o.tokens for o in got] == want
    ended = [o.end == "eos" for o in got]
    assert ended == [t[-1] in (0, *more) for t in want] and 3 <= sum(ended) < len(ended)
    assert {len(o.tokens) for o in got} >= {1, 20}


def first_with(tokens: Sequence[int], tokenizer: Any, found: Callable[[str], bool]) -> int:
    """Tokens until the text first has something."""
    texts = (tokenizer.decode(tokens[:n], skip_special_tokens=True) for n in range(len(tokens) + 1))
    return next(n for n, text in enumerate(texts) if found(text))


def test_stop_texts(settings: Settings, tokenizer: Any, bench: Make, oracle: Any) -> None:
    """Every piece of two or three letters of a text, most of them across tokens, as a stop text."""
    made = bench(settings)
    whole = oracle(made)(1, PROMPTS[1], 20)
    text = tokenizer.decode(whole)
    pieces = {text[i : i + n] for n in (2, 3) for i in range(len(text) - n)}
    pieces = {p for p in pieces if "\ufffd" not in p}
    tokens = {tokenizer.decode([t]) for t in whole}
    assert len([p for p in pieces if not any(p in t for t in tokens)]) >= 5
    asked = [Request(PROMPTS[1], 1, 20, (p, "never there")) for p in sorted(pieces)]
    asked.append(Request(PROMPTS[1], 1, 20, ("never there",)))
    got = made.engine(tokenizer).generate(asked, made.adapters, GREEDY)
    for request, output in zip(asked[:-1], got, strict=False):
        n = first_with(whole, tokenizer, lambda text: request.stop[0] in text)  # noqa: B023
        assert output.tokens == whole[:n] and output.end == "stop"
        assert output.text == text[: text.index(request.stop[0])]
    assert (got[-1].text, got[-1].end) == (text, "length")


def test_the_first_of_several_stop_texts(
    settings: Settings, tokenizer: Any, bench: Make, oracle: Any
) -> None:
    made = bench(settings)
    text = tokenizer.decode(oracle(made)(1, PROMPTS[1], 20))
    stops = (text[9:11], text[4:6])
    (got,) = made.engine(tokenizer).generate([Request(PROMPTS[1], 1, 20, stops)],
                                             made.adapters, GREEDY)  # fmt: skip
    assert got.text == text[: min(text.index(s) for s in stops)]


def test_decided(settings: Settings, tokenizer: Any, bench: Make, oracle: Any) -> None:
    """Asked after every token with the text so far; the first yes ends it, unless a stop does."""
    made = bench(settings)
    whole = oracle(made)(2, PROMPTS[3], 20)
    seen: list[str] = []

    def at_six(text: str) -> bool:
        seen.append(text)
        return len(text) >= 6

    n = first_with(whole, tokenizer, lambda text: len(text) >= 6 and text[-1] != "\ufffd")
    texts = [tokenizer.decode(whole[:i]) for i in range(1, n + 1)]
    asked = [
        Request(PROMPTS[3], 2, 20, decided=at_six),
        Request(PROMPTS[3], 2, 20, stop=(texts[-1][-2:],), decided=lambda text: len(text) >= 6),
        Request(PROMPTS[3], 2, 20, decided=lambda text: False),
    ]
    first, second, third = made.engine(tokenizer).generate(asked, made.adapters, GREEDY)
    assert (first.tokens, first.end, first.text) == (whole[:n], "decided", texts[-1])
    assert seen == [t for t in texts if not t.endswith("\ufffd")]
    assert second.end == "stop" and third == Output(tokenizer.decode(whole), whole, "length")


def test_half_a_character_decides_nothing(tokenizer: Any) -> None:
    """Of the two bytes of é, the first alone is no text yet; the second completes it."""
    ids = tokenizer("né")["input_ids"]
    assert len(ids) == 3 and tokenizer.decode(ids[:2]) == "n\ufffd"
    asked: list[str] = []
    request = Request("", 0, 9, ("é!",), lambda text: bool(asked.append(text)))
    writing = Writing(request, [], Reader(tokenizer, None))
    for token in [*ids, *tokenizer("!")["input_ids"]]:
        assert writing.end is None
        writing.add(token)
    assert asked == ["n", "né"] and writing.output().text == "n" and writing.end == "stop"


def test_tokens_that_end_a_text_are_not_in_it(tokenizer: Any) -> None:
    writing = Writing(Request("", 0, 9), [], Reader(tokenizer, None))
    for token in [*tokenizer("up")["input_ids"], 0]:
        writing.add(token)
    assert writing.output() == Output("up", (*tokenizer("up")["input_ids"], 0), "eos")


# --------------------------------------------------------------------------------- passes


def test_passes_stay_within_their_budget() -> None:
    """Any prompts: all are there, each ends in its own row, no row is computed for nobody."""
    generator = np.random.default_rng(0)
    heads = [generator.integers(0, 50, 30) for _ in range(3)]
    for budget in (1, 40, 90, 400):
        prompts = [
            Prompt(i, a, np.concatenate([heads[i % 3][: int(generator.integers(0, 31))],
                                         generator.integers(0, 3, int(generator.integers(1, 25)))]))
            for a in (0, 2, 3) for i in range(12)
        ]  # fmt: skip
        left = prompts
        while left:
            group = fitting(left, budget, 9)
            assert group == left[: len(group)] and 1 <= len(group) <= 9
            filled = pack(group, (4, 4, 4, 4), torch.device("cpu"))
            assert filled.batch.rows <= max(budget, len(group[0].ids))
            assert sorted(filled.order) == list(range(len(group)))
            assert filled.batch.segments.spans == tuple(sorted(filled.batch.segments.spans))
            for n, prompt in enumerate(group):
                rows, _, positions = filled.kept[:, filled.kept[1] == n]
                assert filled.batch.input_ids[rows].tolist() == prompt.ids.tolist()
                assert filled.batch.position_ids[rows].tolist() == positions.tolist()
                assert positions.tolist() == list(range(len(prompt.ids)))
                assert filled.batch.label_rows[filled.order.index(n)] == rows[-1]
            left = left[len(group) :]


def test_what_prompts_share_is_computed_once(
    settings: Settings, tokenizer: Any, bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(settings)
    passes: list[tuple[int, ...]] = []
    hidden = model.Base.hidden

    def spy(self: model.Base, ids: Tensor, *rest: Any) -> Tensor:
        passes.append((len(ids), len({slot for slot, *_ in rest[1].segments.spans})))
        return hidden(self, ids, *rest)

    engine = made.engine(tokenizer)
    monkeypatch.setattr(model.Base, "hidden", spy)
    length = len(tokenizer(LONG)["input_ids"])
    prompts = [f"{LONG} {c}" for c in "abcdefg"]
    asked = [Request(p, a, 2) for a in (1, 3) for p in prompts]
    engine.generate(asked, made.adapters, GREEDY)
    (rows, slots), step = passes
    assert slots == 2 and step == (14, 2)
    assert 2 * length < rows <= 2 * (length + 7 * 3)


def test_the_cache_is_bounded_and_refilled(
    settings: Settings, tokenizer: Any, bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for three: never more rows in a step, and those who leave are replaced before the
    others have ended."""
    made = bench(settings)
    steps: list[int] = []
    hidden = model.Base.hidden

    def spy(self: model.Base, ids: Tensor, positions: Tensor, work: Any, cache: Any) -> Tensor:
        steps.append(len(ids) if cache.steps else 0)
        return hidden(self, ids, positions, work, cache)

    asked = [Request("Up or down?", 0, 2 + 5 * (i % 3)) for i in range(12)]
    longest = len(tokenizer("Up or down?")["input_ids"]) + 12
    engine = made.engine(tokenizer, cache_rows=4 * longest - 1)
    monkeypatch.setattr(model.Base, "hidden", spy)
    engine.generate(asked, made.adapters, GREEDY)
    assert max(steps) == 3 and steps[0] == 0
    assert sum(steps) == sum(r.max_new - 1 for r in asked)
    assert steps.count(0) > 12 / 3


def test_the_repetition_penalty_is_the_models(
    settings: Settings, tokenizer: Any, bench: Make, oracle: Any
) -> None:
    made = bench(settings)
    asked = [Request(p, a, 15) for a in (0, 1) for p in PROMPTS[:4]]
    engine = made.engine(tokenizer)
    engine._settings.repetition_penalty = 1.4
    got = engine.generate(asked, made.adapters, GREEDY)
    want = [oracle(made)(r.adapter, r.prompt, 15, repetition_penalty=1.4) for r in asked]
    assert [o.tokens for o in got] == want
    assert want != [oracle(made)(r.adapter, r.prompt, 15) for r in asked]


# --------------------------------------------------------------------------------- draws


def test_a_draw_depends_on_nobody_else(settings: Settings, tokenizer: Any, bench: Make) -> None:
    """The same seed and place give the same text in any company; others give others."""
    made = bench(settings)
    asked = [Request(p, a, 12) for a in range(3) for p in PROMPTS]
    drawn = Sampling(temperature=0.8, top_p=0.95, seed=3)
    engine = made.engine(tokenizer)
    texts = engine.generate(asked, made.adapters, drawn)
    assert (
        made.engine(tokenizer, 100, cache_rows=400).generate(asked, made.adapters, drawn) == texts
    )
    # With fewer beside it, but at its place in the call.
    fewer = [r if i % 4 == 0 else replace(r, max_new=1) for i, r in enumerate(asked)]
    assert engine.generate(fewer, made.adapters, drawn)[::4] == texts[::4]
    same = [Request(PROMPTS[1], 0, 12)] * 8
    assert len({o.tokens for o in engine.generate(same, made.adapters, drawn)}) > 4
    other = engine.generate(asked, made.adapters, replace(drawn, seed=4))
    assert sum(a != b for a, b in zip(texts, other, strict=True)) > len(asked) / 2


def counts(sampling: Sampling, z: Tensor, n: int) -> np.ndarray:
    """How often each token is drawn at n places."""
    drawing = Drawing(None, sampling)
    chosen = drawing(z.expand(n, -1).clone(), range(n), [((), ())] * n)
    return np.bincount(chosen, minlength=z.shape[1])


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.4, 1.0, 0), (1.5, 0.8, 0), (1.0, 1.0, 5),
                                        (0.9, 0.7, 40), (2.0, 0.999, 0)],
)  # fmt: skip
def test_draws_have_the_distribution(temperature: float, top_p: float, top_k: int) -> None:
    """Chi-square of 40,000 draws against softmax behind transformers' own filters: with d degrees
    of freedom within d +- 4 sqrt(2 d); what they filter out is never drawn."""
    z = torch.randn(1, 300, generator=torch.Generator().manual_seed(2)) * 2
    filters = LogitsProcessorList()
    if top_k:
        filters.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        filters.append(TopPLogitsWarper(top_p))
    p = torch.softmax(filters(torch.zeros(1, 1), z.double() / temperature), -1)[0].numpy()
    n = 40_000
    seen = counts(Sampling(temperature, top_p, top_k, seed=5), z, n)
    assert seen.sum() == n and not seen[p == 0].any()
    often = p * n >= 5
    observed = np.append(seen[often], seen[~often].sum())
    expected = np.append(p[often] * n, p[~often].sum() * n)
    observed, expected = observed[expected > 0], expected[expected > 0]
    d = len(observed) - 1
    assert abs(((observed - expected) ** 2 / expected).sum() - d) < 4 * (2 * d) ** 0.5


def test_top_p_of_a_flat_distribution_sorts_all() -> None:
    """More tokens are kept than the 256 that are looked at first."""
    z = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * 0.01
    kept = torch.isfinite(TopPLogitsWarper(0.9)(torch.zeros(1, 1), z))[0].numpy()
    seen = counts(Sampling(1.0, 0.9), z, 2_000) > 0
    assert kept.sum() > 2000 and not seen[~kept].any() and seen.sum() > 0.5 * kept.sum()


def test_drawn_tokens_do_not_depend_on_each_other() -> None:
    """Neighbouring places and positions are uncorrelated: |r| of 20,000 pairs below 4.5 sigma."""
    from fedsim import seeds

    n = 20_000
    for request, position in ((np.arange(n), np.zeros(n, int)), (np.zeros(n, int), np.arange(n))):
        u = seeds.token_uniform(seeds.run_key(1), request, position).numpy()
        assert u.min() > 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4.5 / (12 * n) ** 0.5
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4.5 / n**0.5


# --------------------------------------------------------------------------------- transformers


def stock(made: Bench, tokenizer: Any, **how: Any) -> Stock:
    found = weights.Weights(made.folder, "test", "test")
    return Stock(found, tokenizer, made.config, **how)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_plain_backend_is_generate(
    settings: Settings, tokenizer: Any, bench: Make, oracle: Any, batch: int
) -> None:
    """Alone and padded on the left; bare bases before and behind adapters; every ending."""
    made = bench(settings)
    asked = [r for r in requests(len(made.adapters)) if r.max_new < 20]
    got = stock(made, tokenizer, batch=batch).generate(asked, made.adapters, GREEDY)
    for i, r in sorted(enumerate(asked), key=lambda pair: pair[1].adapter):
        assert got[i].tokens == oracle(made)(r.adapter, r.prompt, r.max_new)
    text = tokenizer.decode(oracle(made)(1, PROMPTS[1], 20))
    ending = [
        Request(PROMPTS[1], 1, 20, (text[5:8],)),
        Request(PROMPTS[1], 1, 20, decided=lambda text: len(text) >= 6),
        Request(PROMPTS[3], 0, 5),
    ]
    engine = made.engine(tokenizer).generate(ending, made.adapters, GREEDY)
    assert stock(made, tokenizer, batch=batch).generate(ending, made.adapters, GREEDY) == engine


def test_the_plain_backend_draws_by_its_seed(
    settings: Settings, tokenizer: Any, bench: Make
) -> None:
    made = bench(settings)
    plain, asked = stock(made, tokenizer), [Request(p, 0, 8) for p in PROMPTS[:3]]
    before = torch.random.get_rng_state()
    draws = [
        plain.generate(asked, made.adapters, Sampling(0.9, 0.9, 50, seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_quantised_base_is_the_same_in_both(
    settings: Settings, tokenizer: Any, bench: Make
) -> None:
    pytest.importorskip("bitsandbytes")
    made = bench(settings)
    asked = [Request(p, a, 10) for a in (0, 1) for p in PROMPTS[:4]]
    four = settings(model__quantisation="fp4")
    quantised = replace(made, config=four)
    got = quantised.engine(tokenizer).generate(asked, made.adapters, GREEDY)
    assert stock(quantised, tokenizer).generate(asked, made.adapters, GREEDY) == got
    assert made.engine(tokenizer).generate(asked, made.adapters, GREEDY) != got


# --------------------------------------------------------------------------------- errors


def test_what_cannot_be_continued_is_refused(
    settings: Settings, tokenizer: Any, bench: Make, tmp_path: Path
) -> None:
    made = bench(settings)
    engine, one = made.engine(tokenizer), [Request("Up?", 0, 3)]
    assert engine.generate([], made.adapters, GREEDY) == []
    with pytest.raises(DataError, match="prompt: got ''; expected at least one token"):
        engine.generate([Request("", 0, 3)], made.adapters, GREEDY)
    with pytest.raises(ModelError, match="adapters: got 0"):
        engine.generate(one, [], GREEDY)
    with pytest.raises(ModelError, match=str(tmp_path)):
        engine.generate(one, [Adapter("a", tmp_path)], GREEDY)
    row = torch.zeros(made.base().layout.size)
    with pytest.raises(ModelError, match=r"'r' as the transformers backend.*a row.*Export it"):
        stock(made, tokenizer).generate(one, [Adapter("r", row=row)], GREEDY)
    for sampling in (GREEDY, Sampling(1.0, 0.9)):
        with pytest.raises(RunError, match=r"'sick' gives logits that are not finite"):
            sick = Adapter("sick", row=row * torch.nan)
            engine.generate([*one, Request("Up?", 1, 3)], [Adapter("bare"), sick], sampling)
    engine._settings.no_repeat_ngram_size = 3
    with pytest.raises(ModelError, match=r"no_repeat_ngram_size: got 3; expected 0.*transformers"):
        engine.generate(one, made.adapters, GREEDY)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_pass_are_refused(
    settings: Settings, tokenizer: Any, bench: Make, kind: str
) -> None:
    engine = bench(settings).engine(tokenizer)
    engine._base.model.config.rope_parameters = {
        "rope_type": kind, "original_max_position_embeddings": 32,
    }  # fmt: skip
    with pytest.raises(ModelError, match=rf"prompt and answer with {kind} positions: got 5\d"):
        engine.generate([Request("Up or down?", 0, 48)], [Adapter("bare")], GREEDY)
