"""A base in parts on several processes trains as a whole one does: the same bits.

Real DeepSpeed, in real processes. Compared are every client's line, the scores and the exported
adapters with those of one process that holds the base whole. Clients are unlike, so processes make
empty passes; in one case there are fewer clients than processes.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsim import memory, weights
from fedsim.config import Config, build
from fedsim.errors import ConfigError
from fedsim.sharded import wanted
from tests.conftest import require
from tests.test_workers import configuration, killed, run


@pytest.fixture(autouse=True, scope="module")
def deepspeed() -> None:
    there = importlib.util.find_spec("deepspeed") is not None
    require("deepspeed", there, "DeepSpeed is not installed: pip install fedsim-llm[deepspeed]")


def sharded(tiny: Any, folder: Path, rule: str = "scaffold", **changes: Any) -> Path:
    return configuration(tiny, folder, rule, **{"model__sharding": "zero3", **changes})


def scores(file: Path) -> Any:
    return json.loads((file.parent / "run" / "scores.json").read_text())


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (2, {"evaluate__limit": 8}),
        (2, {"model__offload": "cpu", "adapter__dropout": 0.1}),
        (3, {"clients__number": 2, "server__fraction": 1.0, "train__recompute": "always"}),
    ],
    ids=["evaluated", "dropout", "one without clients, recomputed"],
)
def test_the_same_bits_as_over_a_whole_base(
    tiny: Any, tmp_path: Path, processes: int, changes: dict[str, Any]
) -> None:
    whole = {k: v for k, v in changes.items() if k != "model__offload"}
    alone = configuration(tiny, tmp_path / "1", "scaffold", **whole)
    file = sharded(tiny, tmp_path / "2", **changes)
    assert run(file, processes) == run(alone, 1)
    assert scores(file) == scores(alone)
    model = json.loads((file.parent / "run" / "environment.json").read_text())["model"]
    # 2 layers of 7 linears, each in parts of whole numbers.
    assert (model["held"], model["shards"]) == ("sharded", 14)
    assert model["shard_bytes"] == 4 * 2 * sum(-(-n // processes) for n in LINEARS)


def test_norms_of_a_last_layer_that_stays_whole(tiny: Any, tmp_path: Path) -> None:
    """DoRA needs ||W|| of every weight, which all gather when they load."""
    base = {"model__name": str(tiny("gemma2")), "adapter__dora": True, "server__rounds": 1}
    alone = configuration(tiny, tmp_path / "1", "scaffold", **base)
    assert run(sharded(tiny, tmp_path / "2", **base), 2) == run(alone, 1)


def test_a_lost_process_ends_the_run_and_it_goes_on(tiny: Any, tmp_path: Path) -> None:
    """On another number of processes, with the same bits."""
    rounds = {"server__rounds": 20, "server__export_every": 20}
    alone = run(configuration(tiny, tmp_path / "1", "scaffold", **rounds), 1)
    file = sharded(tiny, tmp_path / "2", **rounds)
    error, done = killed(file, 3, 1, 0.1)
    assert "process 1 is gone" in error and 0 < done < 20
    assert run(file, 2, "--resume") == alone


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "one process"),
        ({"server__strategy": "flora"}, "server.strategy = flora"),
        ({"adapter__init": "pissa"}, "adapter.init = pissa"),
    ],
)
def test_what_cannot_be_shared_is_refused(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
    said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2" if changes else "1")
    config = settings(model__sharding="zero3", **changes)
    with pytest.raises(ConfigError, match=said):
        wanted(config, None, (), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


def test_a_cpu_shares_a_whole_base(
    settings: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` looks at GPUs only, and whether a client and the shortest pass fit beside the base."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    gpu = torch.device("cuda")

    def asks(room: int, device: torch.device = gpu, **model: Any) -> bool:
        monkeypatch.setattr(memory, "room", lambda config, device: room)
        config = settings(**{f"model__{key}": value for key, value in model.items()})
        found = weights.find(config.model.name)
        return wanted(config, found, ("q_proj",), torch.float32, device)

    found = weights.find(settings().model.name)
    slot = 4 * 5 * 2 * 4 * (32 + 32)  # of 2 layers, rank 4
    row = 4 * 2 * (256 + 32 + 4)  # see `memory.activations`
    need = found.numbers * 4 + slot + 256 * row + 256 * 4 * 384
    room = found.numbers * 4 + math.ceil((need - found.numbers * 4) / 0.9)
    assert asks(room - 2) and not asks(room)
    assert not asks(0, torch.device("cpu"))
    assert not asks(0, quantisation="nf4") and not asks(0, sharding="none")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"offload": "nvme"}, "NVMe"),
        ({"offload": "cpu", "sharding": "none"}, "model.offload = cpu"),
        ({"sharding": "zero3", "quantisation": "fp4"}, "model.quantisation = fp4"),
    ],
)
def test_what_does_not_go_together(model: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"model": model}, "here.toml")


# q, k, v, o of width 32 with 4 and 2 heads of 8; gate, up, down of 48.
LINEARS = (32 * 32, 16 * 32, 16 * 32, 32 * 32, 48 * 32, 48 * 32, 32 * 48)
