"""A run's folder: opened, appended to, cut back. Only a checkpoint makes its lines count."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedsim.checkpoint import FILE, write_atomic, write_failed
from fedsim.config import Config, build, read_toml, resolved
from fedsim.errors import CheckpointError, ConfigError

# What may differ between a run and its resumption: the place, and how clients are packed.
_FREE = {"run.out", "run.name", "run.device", "train.slots", "train.budget_tokens", "train.memory",
         "train.recompute"}  # fmt: skip


class RunFolder:
    """One run's folder. Lines are appended; only a checkpoint makes them count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / FILE).is_file()

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / name, text.encode())

    def append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines to a JSONL file. Raises RunError when they cannot be written."""
        path = self.path / name
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as failure:
            raise write_failed(path, failure) from failure

    def _logs(self) -> list[Path]:
        return sorted([*self.path.glob("*.jsonl"), *self.path.glob("eval/*.jsonl")])

    def sizes(self) -> dict[str, int]:
        """Bytes of every JSONL file, for the checkpoint."""
        return {str(p.relative_to(self.path)): p.stat().st_size for p in self._logs()}

    def cut(self, sizes: Mapping[str, int]) -> None:
        """Cut every JSONL file back to what the checkpoint vouches for.

        Raises:
            CheckpointError: a file is shorter than that, so finished rounds are missing.
        """
        for name, size in sizes.items():
            path = self.path / name
            there = path.stat().st_size if path.is_file() else 0
            if there < size:
                raise CheckpointError(
                    f"{path}", got=f"{there} bytes", expected=f"at least {size}",
                    remedy="Lines of finished rounds are gone; start again with --fresh.",
                )  # fmt: skip
        for path in self._logs():
            with path.open("r+b") as stream:
                stream.truncate(sizes.get(str(path.relative_to(self.path)), 0))

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSONL file."""
        path = self.path / name
        if not path.is_file():
            return []
        # Not splitlines: a question may hold U+2028 or U+0085, which JSON leaves as they are.
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def open_folder(config: Config, *, resume: bool, fresh: bool) -> RunFolder:
    """The run's folder: new, emptied, or the one to go on with. Never overwrites unasked.

    Raises:
        ConfigError: it exists and neither `resume` nor `fresh` was asked for.
        CheckpointError: there is nothing to resume, or it has another configuration.
    """
    path = Path(config.run.out) / config.run.name
    folder, file = RunFolder(path), path / "config.toml"
    if resume and not path.is_dir():
        raise CheckpointError(f"there is no run in {path}", remedy="Start it without --resume.")
    if path.exists() and not resume:
        if folder.has_checkpoint and not fresh:  # without one, nothing was finished
            raise ConfigError(
                f"{path} already exists",
                remedy="Go on with --resume, replace it with --fresh, or give --set run.name=...",
            )
        if any(path.iterdir()) and not file.is_file():
            raise ConfigError(f"{path} is not a run's folder", remedy="Remove it by hand.")
        shutil.rmtree(path)
    if resume and file.is_file():
        check_same(config, path)
    else:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise write_failed(path, failure) from failure
        write_atomic(file, tomli_w.dumps(resolved(config)).encode())
    return folder


def check_same(config: Config, path: Path) -> None:
    """A resumed run must have the configuration it began with. Raises CheckpointError."""
    file = path / "config.toml"
    before, now = resolved(build(read_toml(file), str(file))), resolved(config)
    for section, values in now.items():
        for name in values.keys() | before[section].keys():
            was, value = before[section].get(name), values.get(name)
            if was != value and f"{section}.{name}" not in _FREE:
                raise CheckpointError(
                    f"{section}.{name} differs from the run in {path}", got=value,
                    expected=repr(was), remedy="Resume with the run's own configuration.",
                )  # fmt: skip
