"""What memory a run takes, and what happens when there is none left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedsim import simulate
from fedsim.batch import PackedBatch
from fedsim.config import Config
from fedsim.errors import RunError
from fedsim.lora import Pass
from fedsim.memory import out_of_memory
from fedsim.record import Meter
from fedsim.train import Trainer

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


def test_the_second_time_it_ends(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, {2, 5})
    with pytest.raises(RunError, match=r"at most 512 tokens.*train\.recompute"):
        simulate.run(settings(**STRICT))


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
