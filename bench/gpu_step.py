"""Parts `smollm2` and `8b` of gpu.py: whole rounds on models of real sizes with random weights.

`engine` packs the clients, `b1` is this engine with one client per pass, `b0` stock transformers
and PEFT, bf16, in the faster of sdpa and eager attention; all adapt every linear with rank 16. A
round is one AdamW step of every client, from rows to rows. `8b` has the layers of an 8 B model, but
few of them. fp32 losses of engine and stock must agree on two layers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import harness
import numpy as np
import torch
from gpu_cases import Item
from gpu_ops import Shape
from harness import Arm
from stock import Stock, Trained
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

from fedsim.adapters import initial_row
from fedsim.attention import attention
from fedsim.core import LocalRule, Population, RoundPlan
from fedsim.data.tokens import TokenStore
from fedsim.errors import ModelError
from fedsim.model import Base
from fedsim.plan import step_examples
from fedsim.record import Meter, peak_memory_mib
from fedsim.train import Trainer

SEED, TOLERANCE = 42, 1e-4
# name -> clients, sequences of a step, median tokens of a sequence
ROUNDS = {
    "smollm2": {"small": (32, 2, 96), "large": (8, 4, 480)},
    "8b": {"small": (32, 1, 224), "large": (4, 4, 480)},
    "tiny": {"small": (3, 2, 9), "large": (2, 3, 20)},
}


def configure(clients: int, batch: int, **train: Any) -> Any:
    """What the engine reads of a configuration. fedsim.config itself needs pydantic, which a
    machine that only has torch and transformers may lack."""
    return SimpleNamespace(
        run=SimpleNamespace(protocol="fedsim"), data=SimpleNamespace(max_length=512),
        adapter=SimpleNamespace(rank=16, ranks=(), alpha=32.0, dropout=0.0, dora=False,
                                lora_plus=1.0),
        train=SimpleNamespace(**{
            "steps": 1, "batch": batch, "slots": clients, "budget_tokens": 0, "mode": "fast",
            "chunk_tokens": 512, "tile": 64, "rows_per_product": 0, "shared_prefix": False,
            "recompute": "never", "memory": 0.0, "graphs": "never", "beta1": 0.9, "beta2": 0.999,
            "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0, **train,
        }),
        privacy=SimpleNamespace(of_clients=False, of_examples=False),
        per_round=clients, most_clients=clients, largest_chunk=512,
    )  # fmt: skip


def causal_lm(shape: Shape, device: torch.device, dtype: torch.dtype, kind: str) -> Any:
    """The same random weights at every call; `kind`: of transformers' attention."""
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        head_dim=shape.head, vocab_size=shape.vocabulary, max_position_embeddings=8192,
        tie_word_embeddings=shape.hidden < 1024, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kind)


def base_of(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Base:
    """The shared base, adapters on every linear."""
    AttentionInterface.register("fedsim", attention)
    lm = causal_lm(shape, device, dtype, "eager")
    return Base(lm, configure(1, 1), ("all-linear",))


class Round:
    """One step of every client, on random tokens of log-normal lengths (sigma 0.4)."""

    def __init__(self, base: Base, clients: int, batch: int, median: int) -> None:
        rng = np.random.default_rng(SEED)
        n = clients * batch
        lengths = np.exp(rng.normal(np.log(median), 0.4, n)).astype(int).clip(6, 512)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        ids = rng.integers(1, len(base.head), offsets[-1])
        first = np.repeat(lengths - np.minimum(16, lengths // 3) + offsets[:-1], lengths)
        self.store = TokenStore(ids, offsets, np.arange(offsets[-1]) >= first)
        self.population = Population(np.arange(clients + 1) * batch, np.arange(n))
        self.base, self.tokens = base, int(lengths.sum())
        self.clients, self.batch = clients, batch
        ones = np.ones(clients, dtype=np.int64)
        self.plan = RoundPlan(
            round=1, client_ids=np.arange(clients), weights=1.0 * ones, rank=16 * ones,
            scale=2.0 * ones, steps=ones, lr=1e-4 * ones, version=0 * ones,
            lanes=(np.arange(clients),), population=clients,
        )  # fmt: skip
        self.start = initial_row(base.layout, SEED)
        noise = torch.Generator().manual_seed(SEED)
        for _, b in base.layout.factors(self.start[None]).values():
            b.normal_(std=0.02, generator=noise)  # at B = 0 a wrong scale would not show
        self.start = self.start.to(base.device)

    def trainer(self, slots: int) -> Trainer:
        """With this many clients in a pass."""
        config = configure(self.clients, self.batch, slots=slots)
        return Trainer(self.base, self.store, self.population, config, SEED)

    def engine(self, trainer: Trainer) -> Trained:
        """The round in this engine."""
        done = list(trainer.train(self.plan, LocalRule(self.start), Meter()))
        losses = np.concatenate([np.stack([u.loss_first, u.loss_last], 1) for u in done])
        return sum(int(u.tokens.sum()) for u in done), losses

    def stock(self, stock: Stock, clients: int | None = None) -> Trained:
        """The round, or that of the first clients, under stock PEFT."""
        config = configure(self.clients, self.batch)
        visits = [
            (1e-4, [step_examples(config, self.population.of(c), SEED, c, 1, 0)])
            for c in range(clients or self.clients)
        ]
        return stock.round(self.start, visits, self.store, config.train)


class Model:
    """One base of this machine, made when the first item asks for it."""

    def __init__(self, name: str, shape: Shape, device: torch.device) -> None:
        self.name, self.shape, self.device = name, shape, device

    @cached_property
    def base(self) -> Base:
        return base_of(self.shape, self.device)

    def items(self) -> Iterator[Item]:
        """In the order of what they tell."""
        yield "equality", self.equality
        for name, sizes in ROUNDS[self.name].items():
            yield f"round {name}", partial(self.round, *sizes)
        yield "profile", self.profile
        yield "waits", self.waits

    def wait(self) -> None:
        """Until the device has come to its end."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def small(self, base: Base | None = None) -> Round:
        return Round(base or self.base, *ROUNDS[self.name]["small"])

    def equality(self) -> dict[str, Any]:
        """Raises ModelError where engine and stock lose differently."""
        shape = replace(self.shape, layers=2)
        base = base_of(shape, self.device, torch.float32)
        few = Round(base, 2, 2, ROUNDS[self.name]["small"][2])
        lm = causal_lm(shape, self.device, torch.float32, "sdpa")
        want = few.stock(Stock(lm, base.layout, configure(1, 1).adapter))[1]
        error = float(np.abs(few.engine(few.trainer(2))[1] / want - 1).max())
        if not error <= TOLERANCE:
            raise ModelError("|engine / stock - 1| of losses", got=error,
                             expected=f"<= {TOLERANCE}")  # fmt: skip
        return {"error": error}

    def fastest(self, round: Round) -> Stock:
        """B0, in the attention that trains two clients faster."""
        found: dict[float, Stock] = {}
        for kind in ("sdpa", "eager"):
            lm = causal_lm(self.shape, self.device, torch.bfloat16, kind)
            stock = Stock(lm, self.base.layout, configure(1, 1).adapter)
            found[harness.seconds_of(partial(self.timed, round.stock, stock, 2), 1)] = stock
        return found[min(found)]

    def timed(self, run: Callable[..., Trained], *arguments: Any) -> Trained:
        """Run to the device's end."""
        out = run(*arguments)
        self.wait()
        return out

    def round(self, clients: int, batch: int, median: int) -> dict[str, Any]:
        """Interleaved; without B0 where that fails, and then it says why."""
        work = Round(self.base, clients, batch, median)
        runs: dict[str, Callable[[], Trained]] = {
            name: partial(self.timed, work.engine, work.trainer(slots))
            for name, slots in (("engine", clients), ("b1", 1))
        }
        why = ""
        try:
            stock = self.fastest(work)
            runs["b0"] = partial(self.timed, work.stock, stock)
            why = stock.setting
        except Exception as failure:  # this engine's figures are worth having without B0's
            why = f"failed: {type(failure).__name__}: {failure}"[:200]
        arms = {name: Arm(run, run) for name, run in runs.items()}
        timed = harness.time_arms(arms, 3, self.name)
        found = {n: harness.ratio(timed[n].seconds, timed["engine"].seconds) for n in arms}
        return {
            "tokens": work.tokens, "tokens_per_second": work.tokens / timed["engine"].median,
            "ratios": {f"vs_{n}": r for n, r in found.items() if n != "engine"}, "b0": why,
            "loss": {n: float(t.value[1][:, 0].mean()) for n, t in timed.items()},
        }  # fmt: skip

    def profile(self) -> dict[str, Any]:
        """Where a round's time goes: busy share, launches, and the kernels that take most."""
        work = self.small()
        trainer = work.trainer(work.clients)
        self.timed(work.engine, trainer)
        cuda = self.device.type == "cuda"
        kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
        with profile(activities=[kind]) as seen:
            began = time.perf_counter()
            self.timed(work.engine, trainer)
            wall = time.perf_counter() - began
        spent = [
            (e.self_device_time_total if cuda else e.self_cpu_time_total, e.key, e.count)
            for e in seen.key_averages()
        ]
        spent = [entry for entry in spent if entry[0] > 0]
        most = sorted(spent, reverse=True)[:15]
        return {
            "busy": sum(us for us, *_ in spent) / 1e6 / wall, "launches": sum(n for *_, n in spent),
            "most": [[key[:60], us / 1e6 / wall, n] for us, key, n in most],
            "peak_memory_mib": peak_memory_mib(self.device),
        }  # fmt: skip

    def waits(self) -> dict[str, Any]:
        """How often the host waits for the device in a round: once at most for a leaving client."""
        work = self.small()
        trainer = work.trainer(work.clients)
        self.timed(work.engine, trainer)
        if self.device.type != "cuda":
            return {"waits": 0, "where": []}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work.engine(trainer)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        where = [f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in seen]
        return {"waits": len(where), "where": sorted(set(where))[:10]}
