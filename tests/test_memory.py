"""What memory a run takes, and what happens when there is none left."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsim import cost, memory, rehearsal, simulate, strategies, weights
from fedsim.batch import PackedBatch
from fedsim.config import Config, build
from fedsim.core import LocalRule
from fedsim.errors import RunError
from fedsim.lora import Pass
from fedsim.memory import (
    Activations,
    Limits,
    activations,
    fits,
    limits,
    out_of_memory,
    recomputes,
    slot_bytes,
)
from fedsim.pretrained import outline
from fedsim.record import Meter
from fedsim.train import Trainer
from tests.lab import open_lab, plan_of

STRICT: dict[str, Any] = {
    "train__mode": "strict", "train__tile": 16, "train__chunk_tokens": 256,
    "train__budget_tokens": 1024, "train__slots": 3, "clients__number": 8,
    "server__fraction": 1.0, "train__steps": 3, "server__rounds": 2, "evaluate__limit": 0,
}  # fmt: skip


def outcome(folder: Path) -> tuple[str, dict[str, Any]]:
    last = sorted((folder / "adapters").iterdir())[-1]
    rows = {
        k: v.numpy().tobytes() for k, v in load_file(last / "adapter_model.safetensors").items()
    }
    return (folder / "clients.jsonl").read_text(), rows


def failing(monkeypatch: pytest.MonkeyPatch, at: set[int]) -> list[int]:
    """Let memory run out behind some backward passes, whose gradients are then added already.

    Returns:
        Rows of every pass.
    """
    real, sizes = Trainer.backward, list[int]()

    def backward(self: Trainer, batch: PackedBatch, work: Pass) -> torch.Tensor:
        out = real(self, batch, work)
        sizes.append(len(batch))
        if len(sizes) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return out

    monkeypatch.setattr(Trainer, "backward", backward)
    return sizes


@pytest.mark.parametrize("rule", ["fedavg", "scaffold"])
@pytest.mark.parametrize("at", [1, 3, 8])
def test_half_the_budget_and_the_same_bits(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, at: int, rule: str
) -> None:
    config = settings(**STRICT, server__strategy=rule)
    want = outcome(simulate.run(config, fresh=True))
    sizes, meter = failing(monkeypatch, {at}), Meter()
    assert outcome(simulate.run(config, fresh=True, meter=meter)) == want
    assert max(sizes[:at]) > 512 >= max(sizes[at:])
    assert len(meter.notes) == 1 and "at most 512 tokens" in meter.notes[0]


def test_who_has_finished_does_not_train_again(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 2 takes four passes; beside it 3 finishes in the first and 1 in the third, and both
    wait for it. Memory runs out in the fourth: 6 steps have been made, and 4 of client 2 remain."""
    one, how = open_lab(settings), {"slots": 2, "budget_tokens": 2048, "mode": "strict"}
    want, _ = one.train([2, 3, 1], **how)
    failing(monkeypatch, {4})
    meter = Meter()
    meter.begin(1, 7)
    plan, rule = plan_of([2, 3, 1]), LocalRule(one.start)
    updates = list(one.trainer(**how).train(plan, rule, meter))
    assert torch.equal(torch.cat([u.row for u in updates]), want)
    assert len(meter.notes) == 1 and meter.steps_done == 6 + 4


def test_private_examples_begin_again_too(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        **STRICT, privacy__level="example", privacy__noise=1.0, privacy__clip=1.0,
        privacy__delta=1e-3,
    )  # fmt: skip
    want = outcome(simulate.run(config, fresh=True))
    failing(monkeypatch, {3})
    meter = Meter()
    assert outcome(simulate.run(config, fresh=True, meter=meter)) == want
    assert len(meter.notes) == 1


def test_the_second_time_it_ends_and_goes_on_as_it_was_told(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = outcome(simulate.run(settings(**STRICT), fresh=True))
    with monkeypatch.context() as patch:
        sizes = failing(patch, {2, 45})
        with pytest.raises(RunError, match=r"at most 512 tokens.*train\.recompute"):
            simulate.run(settings(**STRICT), fresh=True)
    rounds = Path(settings().run.out) / "run" / "rounds.jsonl"
    assert len(sizes) == 45 and len(rounds.read_text().splitlines()) == 1
    less = {"train__slots": 1, "train__budget_tokens": 256, "train__recompute": "always"}
    assert outcome(simulate.run(settings(**{**STRICT, **less}), resume=True)) == want


def test_no_chunk_is_cut(settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 768 do not fit half of 1,024."""
    failing(monkeypatch, {2})
    with pytest.raises(RunError, match=r"at most 1,024 tokens"):
        simulate.run(settings(**{**STRICT, "train__chunk_tokens": 768}))


def test_other_failures_are_not_of_memory(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(*_: Any) -> torch.Tensor:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Trainer, "backward", backward)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        simulate.run(settings(**STRICT))


def test_an_allocation_that_fails_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes do not match"))


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def counted(config: Config, *targets: str) -> Activations:
    model = outline(weights.find(config.model.name))
    return activations(model, targets, config, CUDA, torch.float32)


def test_activations_by_hand(settings: Callable[..., Config]) -> None:
    """Llama: 2 layers, d 32, q 32, k 16, f 48, so 96 + 96 and 64 of norms, 256 a row and layer;
    all sites read d, d and f more, rank 4 of seven modules is 28."""
    config = settings()
    plain, all_linear = 256, 256 + 32 + 32 + 48 + 7 * 4
    for targets, numbers in (
        (("all-linear",), all_linear), (("q_proj", "v_proj"), plain + 32 + 8),
        (("o_proj",), plain + 4), (("up_proj", "down_proj"), plain + 32 + 48 + 8),
    ):  # fmt: skip
        got = counted(config, *targets)
        assert got.kept == 2 * 4 * numbers
        assert got.recomputed == 4 * (numbers + 2 * 32 + 2 * 48)
        assert got.once == 256 * 4 * 384
    each = 6 * 32 + 48  # what every module reads
    out = 32 + 16 + 16 + 32 + 48 + 48 + 32
    assert counted(settings(adapter__dropout=0.1), "all-linear").kept == 8 * (plain + each + 28)
    assert counted(settings(adapter__dora=True), "all-linear").kept == 8 * (all_linear + out)
    assert counted(settings("gemma2"), "o_proj").kept == 8 * (4 * 32 + 2 * 64 + 2 * 32 + 3 * 48 + 4)
    assert Activations(10, 4, 7).of(3, recompute=False) == 37
    assert Activations(10, 4, 7).rows(37, recompute=False) == 3
    assert Activations(10, 4, 7).rows(6, recompute=True) == 0


def test_the_product_of_queries_keys_and_values_goes(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama: 32 + 16 + 16 numbers a row would be kept; gate and up (96) and values (16) are."""
    real, widths = Trainer.backward, set[float]()

    def backward(self: Trainer, batch: PackedBatch, work: Pass) -> torch.Tensor:
        def note(x: torch.Tensor) -> torch.Tensor:
            widths.add(x.untyped_storage().nbytes() / 4 / len(batch))
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            return real(self, batch, work)

    monkeypatch.setattr(Trainer, "backward", backward)
    open_lab(settings).train([0, 1])
    assert {96, 16} <= widths and 64 not in widths


def test_a_slot_by_hand(settings: Callable[..., Config]) -> None:
    """Row, gradient, two moments and a finished row; what rules keep of each client besides."""
    rules = {"fedavg": 5, "fedprox": 6, "scaffold": 6, "feddyn": 7, "fedsa_lora": 6}
    for rule, rows in rules.items():
        strategy = strategies.load(rule, {})
        kept = rehearsal.rows_kept(strategy, 8)
        assert slot_bytes(settings(), 10, kept) == 4 * 10 * rows
    private = {"level": "example", "noise": 1.0, "clip": 1.0, "delta": 1e-3}
    config = settings(**{f"privacy__{k}": v for k, v in private.items()})
    assert slot_bytes(config, 10, 0) == 4 * 10 * 6
    assert rehearsal.rows_kept(strategies.load("krum", {"f": 1}), 5) == 0, "five at least"


def test_what_does_not_fit_is_lowered(settings: Callable[..., Config]) -> None:
    """Slots of 100 bytes, rows of 10 or 2; nine tenths of the room are used."""
    kept = Activations(10, 2, 0)

    def at(room: float, slots: int = 4, *, recompute: bool = False) -> Limits:
        config = settings(clients__number=16, train__slots=slots, train__budget_tokens=1024)
        return limits(config, kept, 100, math.ceil(room / 0.9), CPU, recompute=recompute)

    assert at(10240 + 400) == Limits(4, 1024, recompute=False)
    assert at(10240 + 390) == Limits(
        4, 768, False, "memory has room for 4 of 4 slots and passes of 768 tokens"
    )
    assert at(2048 + 400, recompute=True) == Limits(4, 1024, recompute=True)
    assert at(2048 + 390, recompute=True).budget == 768
    assert at(700).slots == 3 and at(0).slots == 1
    assert at(0).budget == 256, "a sequence is not cut"
    assert at(0).note == "memory has room for 1 of 4 slots and passes of 256 tokens"
    assert at(2048 + 800, 8, recompute=True) == Limits(8, 1024, recompute=True)
    auto = settings(train__recompute="auto", train__budget_tokens=1024)
    for room, again in ((2 * 10240 / 0.9 + 1, False), (2 * 10240 / 0.9 - 2, True)):
        assert recomputes(auto, kept, int(room), CPU) is again
    for how, again in (("never", False), ("always", True)):
        assert recomputes(settings(train__recompute=how), kept, 0, CPU) is again
    least = settings(train__recompute="never", train__budget_tokens=1024)
    assert fits(least, kept, 100, math.ceil(2660 / 0.9))
    assert not fits(least, kept, 100, math.floor(2659 / 0.9))
    assert fits(auto, kept, 100, math.ceil(612 / 0.9))


def test_a_run_takes_what_it_was_given(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two clients and the shortest pass: said once, the same bits in strict mode, and
    `fedsim plan` knows of it."""
    config = settings(**STRICT)
    want, wide = outcome(simulate.run(config, fresh=True)), cost.estimate(config).memory
    assert wide.limits == Limits(3, 1024, recompute=False) and wide.fits
    bytes_left = math.ceil(4 * wide.slot / 0.9)
    short = (wide.runtime + wide.base + bytes_left) / memory.GIB
    planned = cost.estimate(settings(**STRICT, train__memory=short)).memory
    assert planned.limits == Limits(
        2, 256, False, "memory has room for 2 of 3 slots and passes of 256 tokens"
    )
    monkeypatch.setattr(memory, "room", lambda config, device: bytes_left)
    sizes, meter = failing(monkeypatch, set()), Meter()
    assert outcome(simulate.run(config, fresh=True, meter=meter)) == want
    assert max(sizes) == 256 and meter.notes == [planned.limits.note]


def test_what_a_device_has(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configured size, less what is taken; else what is free."""
    assert 1 << 20 < memory.free_bytes(CPU) < 1 << 50
    assert 1 << 26 < memory.taken_bytes(CPU) < 1 << 40
    rest = memory.room(settings(train__memory=1.0), CPU) + memory.taken_bytes(CPU)
    assert abs(rest - memory.GIB) < 1 << 24
    for more in (0.0, 1e6):
        left = memory.room(settings(train__memory=more), CPU)
        assert abs(left - memory.free_bytes(CPU)) < 1 << 30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    rest = memory.room(settings(train__memory=1.0), CPU) + memory.taken_bytes(CPU)
    assert abs(rest - memory.GIB / 4) < 1 << 24


PEAK = """
import sys
from fedsim.cli import app
app(sys.argv[1:], standalone_mode=False)
lines = open("/proc/self/status").read().splitlines()
print("peak", next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
"""


def the_plan_says_the_peak(values: dict[str, dict[str, Any]]) -> None:
    """Of a whole run in a process of its own, within a tenth."""
    planned = cost.estimate(build(values, "test")).memory
    sets = [f"{s}.{k}={json.dumps(v)}" for s, leaves in values.items() for k, v in leaves.items()]
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, "run", *chain(*(("--set", each) for each in sets))],
        capture_output=True, text=True, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    peak = int(ran.stdout.rpartition("peak ")[2]) << 10
    want = planned.total - planned.rows * planned.kept.heap
    print(f"{want >> 20} MiB planned, {peak >> 20} measured")
    assert planned.rows > 1024 and abs(want / peak - 1) < 0.1, (planned, peak >> 20)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux tells a process's peak")
@pytest.mark.parametrize(
    ("adapter", "slots", "recompute"),
    [
        ({"rank": 16, "targets": ["all-linear"]}, 6, "never"),
        ({"rank": 32, "targets": ["q_proj", "v_proj"]}, 6, "never"),
        ({"rank": 8, "targets": ["all-linear"]}, 3, "always"),
    ],
)
def test_the_plan_says_the_peak(
    tmp_path: Path, adapter: dict[str, Any], slots: int, recompute: str
) -> None:
    """A whole run of SmolLM2 in fp32 from its first import on, within a tenth. Large blocks go
    back to the system at once here: what the heap loses differs by as much from run to run."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "out": str(tmp_path)}, "model": {"dtype": "float32"},
        "adapter": adapter, "data": {"source": "embedded"}, "clients": {"number": slots},
        "server": {"rounds": 1, "fraction": 1.0}, "evaluate": {"limit": 0},
        "train": {"steps": 1, "batch": 12, "slots": slots, "recompute": recompute},
    }  # fmt: skip
    the_plan_says_the_peak(values)
