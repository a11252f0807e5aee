"""How many real tokens per second does a whole local round train, against stock PEFT?

Setting: SmolLM2-135M-Instruct, FinGPT sentiment, rank 32 on q_proj and v_proj, alpha 64, AdamW.
`flowertune` is 5 clients x batch 16, `small_batch` 16 clients x batch 2, 10 local steps each.

Arms, all on the same examples, start row, learning rate and clipping:
    engine                all clients in one pass, nothing shared between sequences
    engine_shared_prefix  the same, each client's common prompt prefix computed once
    b1                    this engine, one client per pass, no shared prefix: what batching gains
    b0                    stock transformers and PEFT, one client after another, each batch padded
                          to its longest sequence, no checkpointing; in the fastest of {sdpa,
                          eager} x {bf16, fp32}, found in the same run by one step of each
    b0_default            the same in the setting that `from_pretrained` gives by itself, which is
                          sdpa and the dtype of the checkpoint (bf16)

Timed is everything from the start row to the trained adapters: optimiser state, resets, padding or
packing, all steps. The model is loaded and the texts are tokenised before. Tokens are those of
the sequences, without padding, and the same for all arms. Before anything is timed, engine and
stock must give the same fp32 losses of two clients over two steps; `vs_x` is x's seconds over the
engine's, paired within this run. With --quick, 2 steps and 2 repeats, b0_default only in the
first; otherwise 3 repeats, and one more row with LoRA dropout 0.075.

    python bench/bench_clients.py --quick
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))  # benches are scripts, not a package
import harness
from harness import Arm

from fedsim import domains, model, seeds, weights
from fedsim.adapters import initial_row
from fedsim.config import Config, build
from fedsim.core import LocalRule, Population, RoundPlan, pick_device
from fedsim.data import partition, sources, tokens
from fedsim.errors import DataError, FedSimError, ModelError, RunError
from fedsim.plan import plan_round, step_examples
from fedsim.record import Meter, peak_memory_mib
from fedsim.train import Trainer

SETTINGS = {"flowertune": (5, 16), "small_batch": (16, 2)}  # clients, batch
STEPS, REPEATS = 10, 3
QUICK_STEPS, QUICK_REPEATS = 2, 2
DROPOUT = 0.075
TOLERANCE = 1e-4  # relative, of fp32 losses
MODEL = "smollm2-135m-instruct"
FILE = "finance/fingpt_sentiment.train.jsonl.gz"


def data_folder(given: str | None) -> Path:
    """`--data`, else FEDSIM_DATA, else ../shared/data. Raises DataError."""
    name = given or os.environ.get("FEDSIM_DATA") or harness.ROOT.parent / "shared" / "data"
    if not (Path(name) / FILE).is_file():
        raise DataError(
            "benchmark data", got=str(name), expected=f"a folder that holds {FILE}",
            remedy="Pass --data DIR or set FEDSIM_DATA.",
        )  # fmt: skip
    return Path(name)


def configure(name: str, data: Path, clients: int, batch: int, steps: int) -> Config:
    """The configuration of one setting; every client of the population trains."""
    return build({
        "model": {"name": name},
        "adapter": {"rank": 32, "alpha": 64.0, "targets": ["q_proj", "v_proj"]},
        "data": {"source": "directory", "dir": str(data), "max_length": 512},
        "clients": {"number": clients},
        "server": {"fraction": 1.0},
        "train": {"steps": steps, "batch": batch, "slots": clients, "shared_prefix": False},
    }, "bench_clients")  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """What is ready before the clock starts: the texts as tokens, and the engine's base."""

    found: weights.Weights
    store: tokens.TokenStore
    origin: str
    base: model.Base

    @classmethod
    def load(cls, config: Config) -> Loaded:
        """The base in the configuration's dtype."""
        domain = domains.load(config.data.domain)
        dataset = sources.training_set(config.data, domain)
        rows = sources.load(config.data, domain, dataset, domain.columns)
        found = weights.find(config.model.name)
        store = tokens.training_store(rows, domain, weights.tokenizer(found), config)
        device = pick_device(config.run.device)
        base = model.load(found, config, device, config.adapter.targets)
        return cls(found, store, rows.origin, base)


@dataclass(frozen=True)
class Work:
    """One round of local training, the same for every arm."""

    config: Config
    loaded: Loaded
    population: Population
    plan: RoundPlan
    start: Tensor  # (P,) fp32
    batches: list[list[np.ndarray]]  # the examples of each client's steps

    @classmethod
    def build(cls, loaded: Loaded, config: Config) -> Work:
        """Round 1 of this configuration."""
        key = seeds.run_key(config.run.seed)
        population = partition.build(config, len(loaded.store))
        plan = plan_round(config, population, 1, key)
        start = initial_row(loaded.base.layout, key).to(loaded.base.device)
        batches = [
            [step_examples(config, population.of(c), key, c, 1, s) for s in range(n)]
            for c, n in zip(plan.client_ids.tolist(), plan.steps.tolist())
        ]
        return cls(config, loaded, population, plan, start, batches)

    def train(self, **values: Any) -> Work:
        """The same round with other values in the configuration's section `train`."""
        section = self.config.train.model_copy(update=values)
        return replace(self, config=self.config.model_copy(update={"train": section}))

    def short(self, clients: int) -> Work:
        """One step of the first clients, to warm up on."""
        steps, lanes = np.ones_like(self.plan.steps), (np.arange(clients),)
        return replace(self, plan=replace(self.plan, steps=steps, lanes=lanes))


@dataclass(frozen=True)
class Trained:
    """What an arm did: real tokens, and each client's first and last loss."""

    tokens: int
    first: np.ndarray
    last: np.ndarray


def engine_round(work: Work) -> Trained:
    """The round in this engine, with the work's own slots and shared prefix."""
    config, loaded = work.config, work.loaded
    key = seeds.run_key(config.run.seed)
    trainer = Trainer(loaded.base, loaded.store, work.population, config, key)
    done = list(trainer.train(work.plan, LocalRule(work.start), Meter()))
    if not all(update.ok.all() for update in done):
        raise RunError("the engine met a loss that is not finite")
    first, last = (np.concatenate(x) for x in zip(*((u.loss_first, u.loss_last) for u in done)))
    return Trained(sum(int(u.tokens.sum()) for u in done), first, last)


class Stock:
    """B0: a second copy of the model under stock PEFT, one client after another."""

    def __init__(self, loaded: Loaded, config: Config, **setting: Any) -> None:
        base = AutoModelForCausalLM.from_pretrained(loaded.found.path, **setting)
        self.setting = f"{base.config._attn_implementation}, {str(base.dtype)[6:]}"
        self.layout, adapter = loaded.base.layout, config.adapter
        lora = LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
            target_modules=[p.module for p in self.layout.pieces[::2]], task_type="CAUSAL_LM",
        )  # fmt: skip
        self.model = get_peft_model(base.to(loaded.base.device), lora).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def reset(self, row: Tensor) -> None:
        """Every factor from a row (P,)."""
        for module, factors in self.layout.factors(row[None]).items():
            for kind, value in zip("AB", factors):
                name = f"base_model.model.{module}.lora_{kind}.default.weight"
                self.model.get_parameter(name).copy_(value[0])

    def round(self, work: Work) -> Trained:
        """The work's round, as one would write it with PEFT."""
        train, store, real, losses = work.config.train, work.loaded.store, 0, []
        for index in np.concatenate(work.plan.lanes):
            self.reset(work.start)
            optimiser = torch.optim.AdamW(
                self.trained, lr=float(work.plan.lr[index]), betas=(train.beta1, train.beta2),
                eps=train.eps, weight_decay=train.weight_decay,
            )  # fmt: skip
            seen = []
            for examples in work.batches[index][: work.plan.steps[index]]:
                loss = self.model(**padded(store, examples, work.start.device)).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.trained, train.clip_norm)
                optimiser.step()
                optimiser.zero_grad()
                seen.append(loss.detach().double())
                real += int(store.lengths[examples].sum())
            losses.append(torch.stack(seen).cpu().numpy()[[0, -1]])
        return Trained(real, *np.array(losses).T)


def padded(store: tokens.TokenStore, examples: np.ndarray, device: torch.device) -> dict[str, Any]:
    """A stock batch: right padding up to the longest, labels on the answers only."""
    rows = [torch.as_tensor(np.asarray(store.of(e), dtype=np.int64)) for e in examples.tolist()]
    ids = pad_sequence(rows, batch_first=True)
    column = torch.arange(ids.shape[1])
    ends = torch.as_tensor(store.lengths[examples])[:, None]
    starts = torch.as_tensor(np.asarray(store.label_start[examples]))[:, None]
    mask = column < ends
    labels = ids.masked_fill(~mask | (column < starts), -100)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: part.to(device) for name, part in batch.items()} | {"use_cache": False}


def check_equal(work: Work, stock: Stock) -> float:
    """Largest relative difference of a client's loss between engine, prefix shared or not, and
    stock, in fp32.

    B starts from noise: with B = 0 a wrong scale would not show in the first loss. The last loss
    stands on gradients and optimiser too. Raises ModelError above TOLERANCE.
    """
    layout, row = work.loaded.base.layout, work.start.cpu()[None].clone()
    noise = torch.Generator().manual_seed(0)
    for piece in layout.pieces[1::2]:
        layout.view(row, piece).normal_(std=0.02, generator=noise)
    work = replace(work, start=row[0].to(work.start.device))
    want = stock.round(work)
    error = 0.0
    for shared in (False, True):
        got = engine_round(work.train(shared_prefix=shared))
        for ours, theirs in ((got.first, want.first), (got.last, want.last)):
            error = max(error, float(np.max(np.abs(ours / theirs - 1))))
    if not error <= TOLERANCE:
        raise ModelError(
            f"engine and stock PEFT compute other losses: relative difference {error:.1e}",
            expected=f"at most {TOLERANCE:.0e} in fp32", remedy="Nothing was timed.",
        )  # fmt: skip
    return error


def arm(train: Callable[[Work], Trained], work: Work, warm: int, repeats: int) -> Arm[Trained]:
    """An arm that warms up on one step of `warm` clients."""
    return Arm(lambda: train(work), lambda: train(work.short(warm)), repeats)


def probe(work: Work) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of one stock step, after one to warm up, in every setting; and the fastest."""
    spent, best = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        for attention in ("sdpa", "eager"):
            setting = {"attn_implementation": attention, "dtype": dtype}
            stock = Stock(work.loaded, work.config, **setting)
            one = {stock.setting: arm(stock.round, work.short(1), 1, 1)}
            spent[stock.setting] = harness.time_arms(one, 1, "probe")[stock.setting].median
            best = setting if spent[stock.setting] == min(spent.values()) else best
    return spent, best


def measure(
    name: str, work: Work, fastest: Stock, default: Stock | None, repeats: int, once: bool
) -> dict[str, Any]:
    """Time the arms of one setting; `once`: b0_default in the first repeat only."""
    arms = {"engine": arm(engine_round, work, len(work.plan), repeats)}
    if work.config.adapter.dropout == 0:
        shared = work.train(shared_prefix=True)
        arms["engine_shared_prefix"] = arm(engine_round, shared, len(work.plan), repeats)
    arms["b1"] = arm(engine_round, work.train(slots=1), 1, repeats)
    arms["b0"] = arm(fastest.round, work, 1, repeats)
    if default and default.setting != fastest.setting:
        arms["b0_default"] = arm(default.round, work, 1, 1 if once else repeats)
    timed = harness.time_arms(arms, repeats, name)
    if default and "b0_default" not in timed:
        timed["b0_default"] = timed["b0"]
    real = timed["engine"].value.tokens
    if any(t.value.tokens != real for t in timed.values()):
        raise RunError(f"{name}: the arms trained different numbers of tokens")
    lengths = [work.loaded.store.lengths[b] for steps in work.batches for b in steps]
    return {
        "clients": len(work.plan), "batch": work.config.train.batch, "tokens": real,
        "sequences": sum(map(len, lengths)),
        "padded_tokens": sum(len(n) * int(n.max()) for n in lengths),
        "dropout": work.config.adapter.dropout,
        "arms": {
            arm: {
                "seconds": t.seconds, "tokens_per_second": real / t.median,
                "loss_first": float(t.value.first.mean()), "loss_last": float(t.value.last.mean()),
            } for arm, t in timed.items()
        },
        "ratios": {
            ours: {f"vs_{b}": harness.ratio(timed[b].seconds, timed[ours].seconds)
                   for b in ("b0", "b0_default", "b1") if b in timed}
            for ours in ("engine", "engine_shared_prefix") if ours in timed
        },
    }  # fmt: skip


def run(name: str, data: Path, quick: bool) -> dict[str, Any]:
    """Check, probe, then time every setting."""
    steps, repeats = (QUICK_STEPS, QUICK_REPEATS) if quick else (STEPS, REPEATS)
    ...
