"""Where rows come from: the hub, a directory, or the package. Never one in place of another."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.config import Data
from fedsim.data import files, hub
from fedsim.domains import DataSet, Domain, Row, Task
from fedsim.errors import DataError, nearest


@dataclass(frozen=True)
class Rows:
    """Rows of one set, with a label of their origin and a hash of their content."""

    rows: list[dict[str, Any]]
    origin: str  # hub:<id>@<revision>, folder:, file:, directory: or embedded:<name>
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def _digest(rows: Iterable[Row], origin: str, columns: tuple[str, ...]) -> str:
    h = hashlib.sha256()
    for i, row in enumerate(rows):
        try:
            cells = [row.get(column) for column in columns]
            h.update(json.dumps(cells, ensure_ascii=False).encode())
        except UnicodeEncodeError as half:
            raise DataError(
                f"{origin}, row {i}: a text is no Unicode ({half.reason})",
                remedy="Mend or remove the row.",
            ) from None
    return h.hexdigest()


def _check(
    rows: list[dict[str, Any]], origin: str, columns: tuple[str, ...], optional: tuple[str, ...]
) -> Rows:
    if not rows:
        raise DataError(f"{origin} has no rows", expected="at least one")
    for i, row in enumerate(rows):
        missing = [c for c in columns if row.get(c) is None]
        if missing:
            raise DataError(
                f"{origin}, row {i}: column {missing[0]!r} is missing or null",
                expected=f"columns {', '.join(columns)}"
                + f", and {', '.join(optional)} if there is one" * bool(optional),
                remedy=f"The row has {', '.join(row)}.",
            )
    return Rows(rows, origin, _digest(rows, origin, (*columns, *optional)))


def directory(data: Data) -> Path:
    """The data directory: `data.dir`, else the environment's FEDSIM_DATA."""
    name = data.dir or os.environ.get("FEDSIM_DATA")
    if not name:
        raise DataError(
            "data.source is 'directory' but no directory is given",
            remedy="Pass --data-dir PATH or set FEDSIM_DATA.",
        )
    path = Path(name)
    if not path.is_dir():
        raise DataError("data directory", got=str(path), expected="an existing directory")
    return path


def load(
    data: Data, domain: Domain, dataset: DataSet, columns: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> Rows:  # fmt: skip
    """The rows of one set from the configured source. Raises DataError with the remedy.

    Args:
        columns: what every row must have. optional: what it may have.
    """
    if data.source == "hub" and Path(dataset.hub).is_file():
        rows, origin = files.read(Path(dataset.hub)), f"file:{Path(dataset.hub).name}"
    elif data.source == "hub":
        rows, origin = hub.read(dataset)
    elif data.source == "directory":
        name = f"{dataset.name}.{dataset.split}"
        rows = files.read(files.find(directory(data) / domain.folder, name))
        origin = f"directory:{domain.folder}/{name}"
    else:
        if domain.embedded is None:
            raise DataError(
                "data.source", got="embedded",
                expected=f"hub or directory: domain {domain.name!r} has no embedded set",
            )  # fmt: skip
        module = import_module(domain.embedded)
        rows = module.train() if dataset.split == "train" else module.test()
        origin = f"embedded:{domain.name}/{dataset.name}.{dataset.split}"
    if dataset.read is not None:
        rows = [dataset.read(row) for row in rows]
    return _check(rows, origin, columns, optional)


def training_set(data: Data, domain: Domain) -> DataSet:
    """The training set by name: the domain's first unless `data.train` names another.

    From the hub that is an id, id@revision, a folder, or a file of JSON lines.
    """
    if data.source == "embedded":
        return DataSet(domain.name, "train")
    if not data.train:
        return domain.train[0]
    for dataset in domain.train:
        if data.train in (dataset.name, dataset.hub):
            return dataset
    if data.source == "directory":
        return DataSet(data.train, "train")
    path = Path(data.train).expanduser()
    if path.is_file() and not path.name.endswith(files.ENDINGS):
        raise DataError(
            "data.train", got=data.train, expected=f"a file {' or '.join(files.ENDINGS)}",
            remedy="Give its folder: CSV and Parquet files are read there.",
        )  # fmt: skip
    if path.exists():
        return DataSet(path.resolve().name, "train", str(path))
    name, _, revision = data.train.partition("@")
    if path.is_absolute() or data.train.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(
            "data.train", got=data.train,
            expected="an existing folder or file, or an id of the hub", remedy="Correct the path.",
        )  # fmt: skip
    return DataSet(name.rpartition("/")[2], "train", name, revision=revision or None)


def tasks(data: Data, domain: Domain, names: tuple[str, ...]) -> dict[str, Task]:
    """The evaluation tasks by name: all of the source's unless some are named."""
    known = domain.embedded_tasks if data.source == "embedded" else domain.tasks
    for name in names:
        if name not in known:
            raise DataError("evaluate.tasks", got=name, remedy=nearest(name, known))
    return {name: known[name] for name in names or known}
