"""What a run leaves on disk while it goes on: figures of rounds and clients."""

from __future__ import annotations

import math
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsim import launch
from fedsim.core import AdapterLayout, ClientUpdates, LocalRule, RoundPlan
from fedsim_kernels import dispatch, native

if TYPE_CHECKING:
    from fedsim.channel import Wire  # bench/gpu.py runs where pydantic is not installed

MIB = 1 << 20
FLOWERTUNE_BUDGET_MIB = 200_000  # flowertune.md 1.4: both directions, all rounds
PACKAGES = ("fedsim-llm", "torch", "transformers", "peft", "datasets", "safetensors", "numpy",
             "bitsandbytes", "deepspeed", "triton", "vllm")  # fmt: skip
OPERATIONS = ("grouped_lora", "packed_attention", "linear_xent", "adamw", "reduce", "rms_norm",
              "rotary", "swiglu", "dropout")  # fmt: skip


def implementation(device: torch.device) -> str:
    """What runs the hot operations on this device, for people."""
    which = dispatch.chosen(device)
    if which == "native":
        return f"C++ ({native.isa()})"
    if which == "triton":
        return "Triton"
    missing = "Triton is not installed" if device.type == "cuda" else "no C++ kernels were built"
    return f"PyTorch reference, several times slower: {missing}"


def transfer_mib(numbers: int) -> float:
    """MiB of one adapter one way: fp32 arrays only, as FlowerTune's tracker counts."""
    return numbers * 4 / MIB


def traffic(
    rule: LocalRule, layout: AdapterLayout, ranks: Sequence[int], wire: Wire | None = None
) -> tuple[float, float]:
    """MiB that clients of these ranks receive and send in a round."""
    m, down, up = len(ranks), 0.0, 0.0
    for r in ranks:
        received = layout.numel(r, rule.down) + rule.more_down * r // layout.rank + rule.base_down
        numbers = layout.numel(r, rule.up)
        down += (received * 4 + (wire.down(m) if wire else 0)) / MIB
        pieces = wire.up(numbers, m) if wire else 4 * numbers
        up += (pieces + rule.more_up * r // layout.rank * 4) / MIB
    return down, up


@dataclass
class Meter:
    """Counts work as it is done. The display reads it from its own thread; nothing waits for it."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    phase: str = "loading"
    round: int = 0
    rounds: int = 0
    clients: int = 0  # that share the pass
    steps: int = 0  # of all clients, done, of the round
    steps_total: int = 0
    steps_done: int = 0  # of this process's rounds
    passes: int = 0  # of the round
    rows: int = 0  # real ones, of the round's passes
    room: int = 0  # that these passes had
    evaluations: int = 0  # done
    evaluations_total: int = 0
    tokens: int = 0  # trained, of the whole run
    totals: dict[str, float] = field(default_factory=dict)  # seconds by phase, of the whole run
    seconds: dict[str, float] = field(default_factory=dict)  # seconds by phase, of the round
    lines: list[dict[str, Any]] = field(default_factory=list)  # finished rounds
    notes: list[str] = field(default_factory=list)  # for people, in order
    _began: float = 0.0
    _trained: float = 0.0  # seconds of training up to the last step
    _loss: Tensor | None = None

    def begin(self, round: int, steps: int) -> None:
        """A round of so many optimiser steps, over all its clients, begins."""
        self.round, self.steps_total, self.seconds = round, steps, {}
        self.steps = self.passes = self.rows = self.room = 0

    def count(
        self, *, rows: int, budget: int, clients: int = 0, steps: int = 0, tokens: int = 0,
        losses: Tensor | None = None,
    ) -> None:  # fmt: skip
        """One pass of `clients` clients is queued, `steps` of whose steps it completes.

        Args:
            rows: packed, without padding. tokens: of its sequences.
            losses: (K,) of the completed steps, NaN elsewhere; they stay on the device.
        """
        self.clients = clients
        self.tokens += tokens
        self.steps += steps
        self.steps_done += steps
        self.passes += 1
        self.rows += rows
        self.room += max(rows, budget)  # a longer sequence is a pass of its own
        self._trained = self.totals.get("train", 0.0) + time.perf_counter() - self._began
        if losses is not None:
            self._loss = losses

    def took(self, *, tokens: int, steps: int) -> None:
        """A client that another process has trained is here."""
        self.tokens += tokens
        self.steps += steps
        self.steps_done += steps
        self._trained = self.totals.get("train", 0.0) + time.perf_counter() - self._began

    @property
    def utilisation(self) -> float | None:
        """Real rows over the budget, of the round's passes."""
        return self.rows / self.room if self.room else None

    @property
    def loss(self) -> float | None:
        """Mean loss of the steps that ended last; reading it waits for the device, so the loop
        never does."""
        if self._loss is None:
            return None
        finite = self._loss[torch.isfinite(self._loss)]
        return float(finite.mean()) if len(finite) else None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens of training sequences over the seconds spent training."""
        return self.tokens / max(self._trained, 1e-9)

    @property
    def remaining(self) -> float | None:
        """Seconds to go, from the mean step and the mean evaluation so far."""
        if not self.steps_done:
            return None
        left = self.rounds * self.steps_total - self.steps_done
        each = self.totals.get("evaluate", 0.0) / max(self.evaluations, 1)
        total = self._trained / self.steps_done * left
        total += each * (self.evaluations_total - self.evaluations)
        since = (
            time.perf_counter()
            - self._began
            - (self._trained - self.totals.get("train", 0.0) if self.phase == "train" else 0.0)
        )
        return max(total - since, 0.0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of a phase to the round's and the run's account."""
        self.phase, self._began = phase, time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - self._began
            self.phase = "working"
            for account in (self.seconds, self.totals):
                account[phase] = account.get(phase, 0.0) + spent


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory: of the device on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def versions() -> dict[str, str]:
    """Installed versions of what a result may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def surroundings(device: torch.device) -> dict[str, Any]:
    """Machine, device, threads and versions, for environment.json."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": launch.size(),
        "versions": versions(),
    }


def client_lines(plan: RoundPlan, seen: list[ClientUpdates]) -> list[dict[str, Any]]:
    """One line for each client visit of a round, in the plan's order."""
    lines = []
    for block in seen:
        for i, index in enumerate(block.index):
            lines.append({
                "round": plan.round, "client": int(plan.client_ids[index]),
                "weight": float(plan.weights[index]), "rank": int(plan.rank[index]),
                "steps": int(plan.steps[index]), "lr": float(plan.lr[index]),
                "tokens": int(block.tokens[i]), "loss_first": _number(block.loss_first[i]),
                "loss_last": _number(block.loss_last[i]), "ok": bool(block.ok[i]),
            })  # fmt: skip
    return lines


def _number(value: float) -> float | None:
    """JSON has no NaN: a loss that is not finite is null."""
    return float(value) if math.isfinite(value) else None


def _mean(losses: list[float | None]) -> float | None:
    """Of those that are; under privacy of examples a step may have drawn nobody."""
    known = [loss for loss in losses if loss is not None]
    return sum(known) / len(known) if known else None


def round_line(
    plan: RoundPlan, rule: LocalRule, clients: list[dict[str, Any]], layout: AdapterLayout,
    meter: Meter, before: float, wire: Wire | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The line of a round: losses over its healthy clients, traffic, seconds, memory.

    Args:
        before: MiB sent in all earlier rounds. wire: what updates take on the way.
    """
    ok = [c for c in clients if c["ok"]]
    ranks = [c["rank"] for c in clients]
    down, up = traffic(rule, layout, ranks, wire)
    total = before + down + up
    return {
        "round": plan.round, "clients": len(clients), "failed": len(clients) - len(ok),
        "lr": float(plan.lr[0]) if len(plan) else None, "tokens": sum(c["tokens"] for c in clients),
        "loss_first": _mean([c["loss_first"] for c in ok]),
        "loss_last": _mean([c["loss_last"] for c in ok]),
        "down_mib": down, "up_mib": up, "total_mib": total,
        "over_budget": total > FLOWERTUNE_BUDGET_MIB,
        "passes": meter.passes, "utilisation": meter.utilisation,
        "seconds": {phase: round(s, 3) for phase, s in meter.seconds.items()},
        "peak_memory_mib": round(peak_memory_mib(meter.device), 1),
    }  # fmt: skip
