"""What the loop leaves on disk: answers, adapters, and the checkpoint that makes them count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedsim import checkpoint as checkpoints
from fedsim import evaluate, peft_io
from fedsim.checkpoint import Checkpoint
from fedsim.config import Config
from fedsim.core import ServerState
from fedsim.folder import RunFolder
from fedsim.record import Meter
from fedsim.world import World


def score(
    folder: RunFolder, subject: evaluate.Subject, tests: evaluate.Suite, meter: Meter
) -> list[dict[str, Any]]:
    """Evaluate adapters and append every example's record."""
    if not len(tests):
        return []
    with meter.timed("evaluate"):
        scores, records = evaluate.evaluate(subject, tests)
    meter.evaluations += 1
    for task, lines in records.items():
        folder.append(f"eval/{task}.jsonl", lines)
    return [s.record() for s in scores]


def export(folder: RunFolder, world: World, config: Config, server: ServerState) -> None:
    """Write the global adapter in PEFT's format."""
    path = folder.path / "adapters" / f"round_{server.round:05d}"
    peft_io.export(
        path,
        server.row,
        world.base.layout,
        config.adapter,
        world.found.name,
        server.base,
        world.found.digest(),
    )


def commit(
    folder: RunFolder, server: ServerState, scores: list[dict[str, Any]],
    clients: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Make everything up to here count: scores, then the checkpoint."""
    folder.write_json("scores.json", scores)
    state = Checkpoint(server, scores, folder.sizes(), clients)
    checkpoints.save_checkpoint(folder.checkpoints, state)
