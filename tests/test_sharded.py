"""A base in parts on several processes trains as a whole one does: the same bits.

Real DeepSpeed, in real processes. Compared are every client's line, the scores and the exported
adapters with those of one process that holds the base whole; clients are so few and so unlike that
every round has processes without any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import require
from tests.test_workers import configuration, run


@pytest.fixture(autouse=True, scope="module")
def deepspeed() -> None:
    import importlib.util

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
        (3, {"clients__number": 2, "server__fraction": 1.0, "adapter__dora": True}),
        (2, {"train__mode": "fast", "train__recompute": "always"}),
    ],
    ids=["evaluated", "offloaded, dropout", "one without clients, DoRA", "recomputed"],
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
    # 2 layers of 7 linears: 9,216 numbers in each, in parts of whole numbers.
    assert (model["held"], model["shards"]) == ("sharded", 14)
    assert model["shard_bytes"] == 4 * 2 * sum(-(-n // processes) for n in LINEARS)


# q, k, v, o of width 32 with 4 and 2 heads of 8; gate, up, down of 48.
LINEARS = (32 * 32, 16 * 32, 16 * 32, 32 * 32, 48 * 32, 48 * 32, 32 * 48)
