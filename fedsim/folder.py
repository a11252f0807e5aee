"""A run's folder: opened, appended to, cut back. Only a checkpoint makes its lines count.

Nothing is written before everything has been checked and loaded. A run that replaces another is
written beside it and takes its place with its first checkpoint, so that until then the old one is
whole. One process at a time has a folder (`locked`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from fedsim.checkpoint import FILE, write_atomic, write_failed
from fedsim.config import Config, resolved
from fedsim.errors import CheckpointError, ConfigError

# What makes no other study of a run: the place, and how clients are packed.
FREE = {"run.out", "run.name", "run.device", "train.slots", "train.budget_tokens", "train.memory",
         "train.recompute"}  # fmt: skip
# What a run's folder may hold before its first checkpoint: nothing that was finished.
_UNFINISHED = {"config.toml", "environment.json", "eval", "scores.json", "checkpoint",
               "clients.jsonl", "rounds.jsonl", "clients"}  # fmt: skip


def default_name(config: Config) -> str:
    """The name of a run that has none: no two studies share it, and the same one has it again."""
    asked = {f"{s}.{k}": v for s, keys in resolved(config).items() for k, v in keys.items()
             if f"{s}.{k}" not in FREE}  # fmt: skip
    code = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:6]
    parts = (config.data.domain, config.server.strategy)
    told = [re.sub(r"[^\w-]+", "-", part.rpartition(".")[2]).strip("-") for part in parts]
    return "-".join([*told, str(config.run.seed), code])


class RunFolder:
    """One run's folder. Lines are appended; only a checkpoint makes them count."""

    def __init__(self, path: Path, final: Path | None = None) -> None:
        """`final`: the folder whose place it takes with its first checkpoint."""
        self.path, self._final = path, final

    @property
    def replaces(self) -> bool:
        """It takes another's place: what lies in it is of one that never came so far."""
        return self._final is not None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def has_checkpoint(self) -> bool:
        return (self.checkpoints / FILE).is_file()

    def begin(self, config: Config) -> None:
        """Make the folder of a new run, with its configuration in it."""
        if self._final is not None:
            shutil.rmtree(self.path, ignore_errors=True)  # of one that never came to a checkpoint
        made(self.path)
        write_atomic(self.path / "config.toml", tomli_w.dumps(resolved(config)).encode())

    def publish(self) -> None:
        """Take the place of the run that this one replaces; after the first time nothing."""
        if self._final is None:
            return
        path, old = self._final, _beside(self._final, "replaced")
        try:
            if path.exists():
                path.rename(old)  # a kill from here on is mended by `recover`
            self.path.rename(path)
        except OSError as failure:
            raise write_failed(path, failure) from failure
        self.path, self._final = path, None
        if (old / "evaluation").is_dir() and not (path / "evaluation").exists():
            (old / "evaluation").rename(path / "evaluation")  # its results say whose they are
        shutil.rmtree(old, ignore_errors=True)

    def write_json(self, name: str, value: Any) -> None:
        """Replace a JSON file."""
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        write_atomic(self.path / name, text.encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises CheckpointError."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds no object")
        except (OSError, ValueError, RecursionError) as failure:
            raise CheckpointError(
                f"{self.path / name} cannot be read ({failure})",
                expected="the file of this run",
                remedy="Put it back, or start again with --fresh.",
            ) from None
        return found

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
            RunError: a file cannot be written.
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
            try:
                with path.open("r+b") as stream:
                    stream.truncate(sizes.get(str(path.relative_to(self.path)), 0))
            except OSError as failure:
                raise write_failed(path, failure) from failure

    def read(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSONL file. Raises CheckpointError."""
        path = self.path / name
        if not path.is_file():
            return []
        try:
            # Not splitlines: a question may hold U+2028 or U+0085, which JSON leaves as they are.
            text = path.read_text(encoding="utf-8")
            found = [json.loads(line) for line in text.split("\n") if line]
            if not all(isinstance(line, dict) for line in found):
                raise ValueError("a line is no object")
            return found
        except (OSError, ValueError) as failure:
            raise CheckpointError(
                f"{path} cannot be read ({failure})",
                expected="JSON lines",
                remedy="Put it back as it was, or give another folder.",
            ) from None


def made(path: Path) -> Path:
    """The folder, made if it is not there. Raises RunError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as failure:
        raise write_failed(path, failure) from failure
    return path


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a folder, there or not, for this process.

    The lock lies beside it and stays: to remove it would let two processes lock two files.

    Raises:
        ConfigError: another process has it.
        RunError: the place cannot be written.
    """
    made(path.parent)
    lock = FileLock(_beside(path, "lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{path} is in use by another process",
            remedy="Wait for it, or give another name with --set run.name=... (of `fedsim eval`: "
            "--out).",
        ) from None
    except (OSError, NotImplementedError) as failure:
        raise write_failed(path, OSError(str(failure))) from failure
    try:
        yield
    finally:
        lock.release()


def recover(path: Path) -> None:
    """Mend what a kill has left in the moment of `publish`. The folder is locked."""
    old = _beside(path, "replaced")
    if old.is_dir():
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(path)


def open_folder(config: Config, *, resume: bool, fresh: bool) -> RunFolder:
    """The run's folder: a new one, one that will replace what is there, or the one to go on with.
    Nothing is written or removed yet.

    Raises:
        ConfigError: it exists and neither `resume` nor `fresh` was asked for, or is no run's.
        CheckpointError: there is nothing to resume.
    """
    if resume and fresh:
        raise ConfigError("--resume with --fresh", expected="one of them")
    path = (Path(config.run.out) / config.run.name).resolve()  # of a link, what it points to
    recover(path)
    folder = RunFolder(path)
    if resume:
        if not path.is_dir():
            raise CheckpointError(f"there is no run in {path}", remedy="Start it without --resume.")
        if not _is_run(path):
            raise CheckpointError(
                f"{path} is not a run's folder", expected="a config.toml and a checkpoint in it",
                remedy="Give another name with --set run.name=...",
            )  # fmt: skip
        return folder
    if not path.exists():
        return folder
    if not (path.is_dir() and _is_run(path)):
        raise ConfigError(
            f"{path} is not a run's folder",
            remedy="Give another name with --set run.name=..., or remove it by hand.",
        )  # fmt: skip
    if folder.has_checkpoint and not fresh:  # without one, nothing was finished
        raise ConfigError(
            f"{path} already exists",
            remedy="Go on with --resume, replace it with --fresh, or give --set run.name=...",
        )
    own = _UNFINISHED | {"adapters", "plots", "report.html", "evaluation"}
    names = {p.name.removesuffix(".partial") for p in path.iterdir()}
    if strange := sorted(n for n in names - own if not n.startswith(".")):
        raise ConfigError(
            f"{path} also holds {', '.join(strange[:3])}",
            remedy="Move what is not of the run elsewhere, or give --set run.name=...",
        )
    return replacing(path)


def _is_run(path: Path) -> bool:
    """Whether a folder is a run's: with a checkpoint, or with nothing but what comes before it."""
    there = {p.name.removesuffix(".partial") for p in path.iterdir()}
    begun = "config.toml" in there and not there - _UNFINISHED
    return not there or begun or (RunFolder(path).has_checkpoint and "config.toml" in there)


def replacing(path: Path) -> RunFolder:
    """A folder beside this one that takes its place when it is published."""
    return RunFolder(_beside(path, "partial"), path)
