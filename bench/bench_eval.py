"""How fast are answers, against the loop that the leaderboard's scripts run?

SmolLM2-135M-Instruct with a random rank-16 adapter on every linear, questions of the data folder
under protocol `flowertune`, fp32 (the official precision). Figures:

    choice_vs_official  seconds of the official loop for multiple choice (bitsandbytes' fp4 base,
                        fp32 compute, stock PEFT, generate() one prompt at a time) over the engine's
    choice_vs_bf16      the same loop as bitsandbytes runs it by itself on a CPU with bf16: its
                        4-bit product then rounds to bf16, whatever the compute dtype
    choice_vs_dense     the same loop on the same dense weights that the engine multiplies with
    ..._prefix          the three for MedMCQA, whose prompts begin alike; the others are MMLU's
    eight_adapters      eight adapters in one call over eight calls of one
    vllm_one, vllm_many transformers' seconds on coding prompts over vLLM's, one request at a time
                        and 32 at once; both greedy, as many new tokens; left out without vLLM
    examples_per_second by kind of task, the engine, whole answers graded

The engine's answers must equal those of the dense loop, token by token, before anything is timed;
how often bitsandbytes' own product gives the same ones is reported.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
import torch
from bench_clients import data_folder
from harness import Arm, Figure
from torch import Tensor

from fedsim import domains, model, peft_io, seeds, weights
from fedsim.adapters import initial_row
from fedsim.config import Config, build
from fedsim.core import pick_device
from fedsim.errors import FedSimError, RunError
from fedsim.evaluate import Subject, suite
from fedsim.evaluate.engine import Engine
from fedsim.evaluate.generation import Adapter, Request, Sampling
from fedsim.evaluate.scores import answer, most_tokens
from fedsim.evaluate.stock import Stock
from fedsim.plan import pass_budget

CHOICE = {"": ("general", "mmlu_humanities"), "_prefix": ("medical", "medmcqa")}
KINDS = {"choice": CHOICE[""], "sentiment": ("finance", "fpb"), "code": ("coding", "humaneval")}
GREEDY = Sampling()
VLLM = Path(".venv-vllm/bin/python")
TOKENS = 48  # new ones of a coding answer, in the comparison with vLLM


def configure(model: str, data: Path, domain: str, task: str, limit: int) -> Config:
    """One task under the leaderboard's protocol; coding unquantised, the others over fp4."""
    return build({
        "run": {"protocol": "flowertune"},
        "model": {"name": model, "quantisation": "none" if domain == "coding" else "fp4"},
        "adapter": {"rank": 16, "alpha": 32.0, "targets": ["all-linear"]},
        "data": {"domain": domain, "source": "directory", "dir": str(data)},
        "evaluate": {"tasks": [task], "limit": limit},
    }, "bench_eval")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One task's questions, the engine, and adapters on disk."""

    config: Config
    base: model.Base
    engine: Engine
    tokenizer: Any
    found: weights.Weights
    adapters: list[Adapter]
    task: str

    @property
    def questions(self) -> Any:
        key = seeds.run_key(0)
        return suite(self.config, domains.load(self.config.data.domain), key).tasks[self.task]

    def requests(self, adapters: int) -> list[Request]:
        """Every question under so many adapters, adapter by adapter."""
        asked = self.questions
        most = most_tokens(asked.form, asked.items, self.tokenizer)
        return [Request(item.prompt, a, n) for a in range(adapters)
                for item, n in zip(asked.items, most, strict=True)]  # fmt: skip


def open_work(config: Config, folder: Path, count: int) -> Work:
    """Load the base and write `count` random adapters."""
    found = weights.find(config.model.name)
    tokenizer = weights.tokenizer(found)
    device = pick_device("auto")
    base = model.load(found, config, device, config.adapter.targets)
    adapters = []
    for number in range(count):
        row = random_row(base.layout, number)
        place = folder / f"adapter_{number}"
        peft_io.export(place, row, base.layout, config.adapter, found.name)
        adapters.append(Adapter(place.name, place))
    engine = Engine(base, tokenizer, config.adapter, pass_budget(config, device))
    (task,) = config.evaluate.tasks
    return Work(config, base, engine, tokenizer, found, adapters, task)


def random_row(layout: Any, seed: int) -> Tensor:
    """A fresh adapter whose B is not zero: small enough for the model to stay a model."""
    row = initial_row(layout, seeds.run_key(seed))[None].clone()
    make = torch.Generator().manual_seed(seed)
    for piece in layout.pieces:
        if piece.kind == "B":
            layout.view(row, piece).normal_(0, 0.002, generator=make)
    return row[0]


class OfficialLoop:
    """generate() prompt by prompt under stock PEFT, over bitsandbytes' own 4-bit linears.

    `bf16`: let bitsandbytes compute in bf16 where it wants to on this processor.
    """

    def __init__(self, work: Work, bf16: bool) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        base = AutoModelForCausalLM.from_pretrained(
            work.found.path, dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )  # fmt: skip
        for module in base.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu &= bf16
        self.model = PeftModel.from_pretrained(base, work.adapters[0].folder).eval()
        self.tokenizer = work.tokenizer

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        out = []
        for request in requests:
            given = self.tokenizer(request.prompt, return_tensors="pt")
            ids = self.model.generate(
                **given, max_new_tokens=request.max_new, do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
            )  # fmt: skip
            out.append(tuple(ids[0, given["input_ids"].shape[1] :].tolist()))
        return out


def tokens_of(backend: Any, requests: Sequence[Request], adapters: Sequence[Adapter]) -> list[Any]:
    return [output.tokens for output in backend.generate(requests, adapters, GREEDY)]


def choice(work: Work, repeats: int, suffix: str) -> dict[str, Figure]:
    """The engine against the loops, on the same questions."""
    one, requests = work.adapters[:1], work.requests(1)
    dense = Stock(work.found, work.tokenizer, work.config)
    loops = {"official": OfficialLoop(work, False), "bf16": OfficialLoop(work, True)}
    if not any(getattr(m, "support_avx512bf16_for_cpu", 0) for m in loops["bf16"].model.modules()):
        del loops["bf16"]
    ours = tokens_of(work.engine, requests, one)
    if ours != tokens_of(dense, requests, one):
        raise RunError("the engine's answers differ from those of the dense loop")
    n, same = len(requests), {"dense": 1.0}
    for name, loop in loops.items():
        same[name] = sum(a == b for a, b in zip(ours, loop(requests), strict=True)) / n
    timed = harness.time_arms({
        "engine": Arm(partial(tokens_of, work.engine, requests, one)),
        "dense": Arm(partial(tokens_of, dense, requests, one)),
        **{name: Arm(partial(loop, requests), repeats=min(repeats, 2))
           for name, loop in loops.items()},
    }, repeats, "choice")  # fmt: skip
    return {
        f"choice_vs_{name}{suffix}": harness.figure(
            harness.ratio(timed[name].seconds, timed["engine"].seconds), examples=n,
            per_second={"engine": n / timed["engine"].median, name: n / timed[name].median},
            same_answers=agree,
        )
        for name, agree in same.items()
    }  # fmt: skip


def eight_adapters(work: Work, repeats: int) -> Figure:
    """Seconds of one call with eight adapters over those of eight calls, on a few questions."""
    together, few = work.requests(8), work.requests(1)

    def one_by_one() -> list[Any]:
        return [t for a in work.adapters for t in tokens_of(work.engine, few, [a])]

    at_once = partial(tokens_of, work.engine, together, work.adapters)
    if at_once() != one_by_one():
        raise RunError("eight adapters in one call answer otherwise than one by one")
    timed = harness.time_arms({"together": Arm(at_once), "apart": Arm(one_by_one)}, repeats, "8")
    found = harness.ratio(timed["together"].seconds, timed["apart"].seconds)
    return harness.figure(found, examples=len(few))


def vllm(work: Work, repeats: int) -> dict[str, Figure]:
    """Coding prompts, greedy, the same number of new tokens; the warm worker's seconds."""
    from fedsim.evaluate.vllm import VLLM as Backend

    prompts = [item.prompt for item in work.questions.items]
    many = [Request(prompts[i % len(prompts)], 0, TOKENS) for i in range(32)]
    one = many[:2]
    stock = Stock(work.found, work.tokenizer, work.config)
    padded = Stock(work.found, work.tokenizer, work.config, batch=32)
    figures = {}
    with Backend(work.found, work.tokenizer, work.config, VLLM.absolute()) as backend:
        adapter = work.adapters[:1]

        def each() -> list[Any]:
            return [tokens_of(backend, [request], adapter) for request in one]

        for name, arms in {
            "vllm_one": {"vllm": Arm(each, each),
                         "transformers": Arm(partial(tokens_of, stock, one, adapter))},
            "vllm_many": {"vllm": Arm(partial(tokens_of, backend, many, adapter)),
                          "transformers": Arm(partial(tokens_of, padded, many, adapter))},
        }.items():  # fmt: skip
            timed = harness.time_arms(arms, repeats, name)
            n = sum(len(t) for t in timed["transformers"].value)
            found = harness.ratio(timed["transformers"].seconds, timed["vllm"].seconds)
            figures[name] = harness.figure(found, transformers_tokens_per_second=n
                                           / timed["transformers"].median)  # fmt: skip
    return figures


def speed(work: Work, repeats: int) -> Figure:
    """Examples per second: answers written and graded, everything that a score takes."""
    subject = Subject(
        work.engine, work.tokenizer, work.adapters[:1], [0], work.base.precision, GREEDY
    )
    asked = work.questions
    run = partial(answer, subject, work.task, asked)
    timed = harness.time_arms({"engine": Arm(run)}, repeats, work.task)
    rates = [len(asked.items) / s for s in timed["engine"].seconds]
    return harness.figure(harness.summary(rates), examples=len(asked.items))


def run(name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Every figure; returns the whole record."""
    n, repeats = (32, 2) if quick else (128, 5)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as folder:
        for suffix, which in CHOICE.items():
            work = open_work(configure(name, data, *which, n), Path(folder), 1)
            figures |= choice(work, repeats, suffix)
        few = open_work(configure(name, data, *CHOICE[""], max(4, n // 8)), Path(folder), 8)
        figures["eight_adapters"] = eight_adapters(few, repeats)
        for kind, (domain, task) in KINDS.items():
            config = configure(name, data, domain, task, n if kind == "choice" else n // 4)
            work = open_work(config, Path(folder), 1)
            figures[f"examples_per_second_{kind}"] = speed(work, 1 if kind == "code" else repeats)
        if VLLM.is_file():
            figures |= vllm(work, repeats)
    return {"quick": quick, "machine": harness.machine(work.base.device),
            "dtype": work.base.precision, "figures": figures}  # fmt: skip


TITLES = {
    "choice_vs_official": "MMLU, x the official loop (fp4, fp32 compute, one prompt at a time)",
    "choice_vs_bf16": "MMLU, x the same, bitsandbytes rounding to bf16",
    "choice_vs_dense": "MMLU, x the same loop on dense fp32 weights",
    "choice_vs_official_prefix": "MedMCQA, x the official loop",
    "choice_vs_bf16_prefix": "MedMCQA, x the same, bitsandbytes rounding to bf16",
    "choice_vs_dense_prefix": "MedMCQA, x the same loop on dense fp32 weights",
    "eight_adapters": "eight adapters in one call / eight calls",
    "vllm_one": "coding, vLLM x transformers, one request at a time",
    "vllm_many": "coding, vLLM x transformers, 32 requests",
    "examples_per_second_choice": "multiple choice, examples/s",
    "examples_per_second_sentiment": "finance sentiment, examples/s",
    "examples_per_second_code": "HumanEval, examples/s, graded",
}


def report(result: dict[str, Any]) -> dict[str, float]:
    """Print the table; returns the values."""
    rows = [[key, TITLES[key], f"{f['value']:.3g}", f"{f['low']:.3g} to {f['high']:.3g}",
             str(f["n"])] for key, f in result["figures"].items()]  # fmt: skip
    harness.show(f"Evaluation, {result['dtype']}", ("figure", "what", "value", "range", "n"), rows)
    return {key: round(f["value"], 4) for key, f in result["figures"].items()}


def main(argv: Sequence[str] | None = None) -> None:
    given = harness.options(str(__doc__).partition("\n")[0]).parse_args(argv)
    torch.set_num_threads(given.threads)
    try:
        result = run(given.model, data_folder(given.data), given.quick)
    except FedSimError as failure:
        sys.exit(f"error: {failure}")
    harness.finish("eval", result, report(result), given.save or not given.quick)


if __name__ == "__main__":
    main()
