"""The state of a run as one file, replaced atomically: after a kill it is the old one or the new.

The file also holds how long each JSONL file was when it was written, so that a resumed run cuts
off what a killed round had already appended.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedsim.core import ServerState
from fedsim.errors import CheckpointError, RunError

FILE = "state.safetensors"
PREVIOUS = "previous.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """Everything a resumed run needs besides its configuration."""

    server: ServerState
    scores: list[dict[str, Any]]
    bytes_done: Mapping[str, int]  # JSONL file -> bytes that belong to finished rounds
    clients: Mapping[str, Tensor] = field(default_factory=dict)  # the client memory's index


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file with new content: whole or not at all, and on disk when this returns.

    Raises:
        RunError: the disk is full or not writable.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as failure:
        partial.unlink(missing_ok=True)
        raise write_failed(path, failure) from failure


def write_failed(path: Path, failure: OSError) -> RunError:
    """The error for a file that could not be written."""
    return RunError(
        f"{path} cannot be written ({failure.strerror or failure})",
        remedy="Make room, or choose another place. What was finished is whole: a run that has a "
        "checkpoint goes on with --resume.",
    )


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the state, keeping the one before it."""
    server = checkpoint.server
    tensors: dict[str, Tensor] = {"row": server.row.cpu().contiguous()}
    parts = {"memory": server.memory, "base": server.base, "clients": checkpoint.clients}
    for part, named in parts.items():
        tensors |= {f"{part}.{k}": v.cpu().contiguous() for k, v in named.items()}
    state = json.dumps(
        {
            "round": server.round,
            "scores": checkpoint.scores,
            "bytes": dict(checkpoint.bytes_done),
        }
    )
    content = save(tensors, metadata={"fedsim": state, "sha256": _digest(state, tensors)})
    current, kept = folder / FILE, folder / (PREVIOUS + ".partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if current.exists():
            kept.unlink(missing_ok=True)
            os.link(current, kept)
            kept.replace(folder / PREVIOUS)
            kept.unlink(missing_ok=True)  # renaming onto another link of the same file is a no-op
    except OSError as failure:
        raise write_failed(folder / PREVIOUS, failure) from failure
    write_atomic(current, content)


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        h.update(name.encode() + tensors[name].numpy().tobytes())
    return h.hexdigest()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the state back; None when the run was stopped before its first checkpoint.

    Raises:
        CheckpointError: it is damaged; the message says what to do.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            text, digest = metadata["fedsim"], metadata["sha256"]
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, OSError) as failure:
        raise _damaged(folder, str(failure)) from failure
    if _digest(text, tensors) != digest:
        raise _damaged(folder, "its checksum does not match")
    state = json.loads(text)
    row = tensors.pop("row")
    memory, base, clients = (
        {name[len(part) :]: t for name, t in tensors.items() if name.startswith(part)}
        for part in ("memory.", "base.", "clients.")
    )
    server = ServerState(int(state["round"]), row, memory, base)
    return Checkpoint(server, state["scores"], state["bytes"], clients)


def _damaged(folder: Path, why: str) -> CheckpointError:
    remedy = "Start the run again with --fresh."
    if (folder / PREVIOUS).is_file():
        remedy = f"Move {PREVIOUS} over {FILE} there to resume one checkpoint earlier."
    return CheckpointError(
        f"{folder / FILE} is damaged ({why})", expected="a checkpoint of this run", remedy=remedy
    )
