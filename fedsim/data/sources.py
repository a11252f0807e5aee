"""Where rows come from: the hub, a directory, or the package. Never one in place of another."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from fedsim.config import Data
from fedsim.domains import DataSet, Domain, Row, Task
from fedsim.errors import DataError, nearest


@dataclass(frozen=True)
class Rows:
    """Rows of one set, with a label of their origin and a hash of their content."""

    rows: list[dict[str, Any]]
    origin: str  # "hub:<id>@<revision>", "directory:<file>" or "embedded:<name>"
    digest: str

    def __len__(self) -> int:
        return len(self.rows)


def _digest(rows: Iterable[Row], origin: str, columns: tuple[str, ...]) -> str:
    h = hashlib.sha256()
    for i, row in enumerate(rows):
        try:
            h.update(json.dumps([row[c] for c in columns], ensure_ascii=False).encode())
        except UnicodeEncodeError as half:
            raise DataError(
                f"{origin}, row {i}: a text is no Unicode ({half.reason})",
                remedy="Mend or remove the row.",
            ) from None
    return h.hexdigest()


def _check(rows: list[dict[str, Any]], origin: str, columns: tuple[str, ...]) -> Rows:
    if not rows:
        raise DataError(f"{origin} has no rows", expected="at least one")
    for i, row in enumerate(rows):
        missing = [c for c in columns if row.get(c) is None]
        if missing:
            raise DataError(
                f"{origin}, row {i}: column {missing[0]!r} is missing or null",
                expected=f"columns {', '.join(columns)}",
                remedy=f"The row has {', '.join(row)}.",
            )
    return Rows(rows, origin, _digest(rows, origin, columns))


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


def _read_directory(data: Data, domain: Domain, dataset: DataSet) -> list[dict[str, Any]]:
    folder = directory(data) / domain.folder
    path = folder / f"{dataset.name}.{dataset.split}.jsonl.gz"
    if not path.is_file():
        there = [p.name for p in folder.glob("*.jsonl.gz")] if folder.is_dir() else []
        raise DataError(
            "data file", got=str(path), expected="an existing file",
            remedy=f"In {folder}: {', '.join(sorted(there)) or 'nothing'}.",
        )  # fmt: skip
    rows: list[dict[str, Any]] = []
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"a row is an object, not {line.strip()[:40]!r}")
                rows.append(row)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as failure:
        raise DataError(
            f"{path}, line {len(rows) + 1}: {failure}",
            expected="gzip-compressed JSON lines",
            remedy="Copy the file again.",
        ) from None
    return rows


def _read_hub(dataset: DataSet) -> tuple[list[dict[str, Any]], str]:
    import datasets

    rows: list[dict[str, Any]] = []
    try:
        for config in dataset.configs or (None,):
            if dataset.prepare == "quarter":
                parts = datasets.load_dataset(dataset.hub, config, revision=dataset.revision)
                joined = datasets.concatenate_datasets(list(parts.values()))
                table = joined.train_test_split(test_size=0.25, seed=42)["test"]
            else:
                table = datasets.load_dataset(
                    dataset.hub, config, split=dataset.split, revision=dataset.revision
                )
            rows += table
    except Exception as failure:
        raise DataError(
            f"hub data set {dataset.hub!r} cannot be loaded ({type(failure).__name__}: {failure})",
            remedy="Without a network use --data-dir PATH, or --set data.source=embedded.",
        ) from failure
    return rows, f"hub:{dataset.hub}@{dataset.revision or 'main'}"


def load(data: Data, domain: Domain, dataset: DataSet, columns: tuple[str, ...]) -> Rows:
    """The rows of one set from the configured source. Raises DataError with the remedy."""
    if data.source == "hub":
        rows, origin = _read_hub(dataset)
    elif data.source == "directory":
        rows = _read_directory(data, domain, dataset)
        origin = f"directory:{domain.folder}/{dataset.name}.{dataset.split}"
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
    return _check(rows, origin, columns)


def training_set(data: Data, domain: Domain) -> DataSet:
    """The training set by name: the domain's first unless `data.train` names another."""
    if data.source == "embedded":
        return DataSet(domain.name, "train")
    if data.train is None:
        return domain.train[0]
    for dataset in domain.train:
        if data.train in (dataset.name, dataset.hub):
            return dataset
    if data.source == "hub":
        return DataSet(data.train.rpartition("/")[2], "train", data.train)
    return DataSet(data.train, "train")


def tasks(data: Data, domain: Domain, names: tuple[str, ...]) -> dict[str, Task]:
    """The evaluation tasks by name: all of the source's unless some are named."""
    known = domain.embedded_tasks if data.source == "embedded" else domain.tasks
    for name in names:
        if name not in known:
            raise DataError("evaluate.tasks", got=name, remedy=nearest(name, known))
    return {name: known[name] for name in names or known}
