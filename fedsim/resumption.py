"""What a run that goes on must have in common with the one that was begun."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.config import Config, build, read_toml, resolved
from fedsim.errors import CheckpointError
from fedsim.folder import FREE, RunFolder


def check_same(config: Config, path: Path) -> None:
    """A resumed run must have the configuration it began with. Raises CheckpointError."""
    file = path / "config.toml"
    if not file.is_file():  # it died before that
        return
    before, now = resolved(build(read_toml(file), str(file))), resolved(config)
    for section, values in now.items():
        for name in values.keys() | before[section].keys():
            was, value = before[section].get(name), values.get(name)
            if was != value and f"{section}.{name}" not in FREE:
                raise CheckpointError(
                    f"{section}.{name} differs from the run in {path}", got=value,
                    expected=repr(was), remedy="Resume with the run's own configuration.",
                )  # fmt: skip


def check_content(folder: RunFolder, now: Mapping[str, Any]) -> None:
    """A resumed run must have the rows, questions and weights that it began with, by content.

    Args:
        now: what `world.describe` says of those that are here.

    Raises:
        CheckpointError: one is another, or the run did not note what it began with.
    """
    before = folder.read_json("environment.json").get("content")
    if not before:
        raise CheckpointError(
            f"{folder.path} does not say which rows, questions and weights it began with",
            remedy="An earlier version began it: finish it with that, or start with --fresh.",
        )
    for what, value in now["content"].items():
        if (was := before.get(what)) != value:
            raise CheckpointError(
                f"sha256 of {what}", got=value[:12],
                expected=f"{str(was)[:12]}, with which the run in {folder.path} began",
                remedy="Put back what was there, or start again with --fresh.",
            )  # fmt: skip
