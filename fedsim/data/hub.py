"""Sets on the Hugging Face hub, and what helps where one does not load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedsim.errors import DataError
from fedsim.tasks import CONVERTED, DataSet

NO_HUB = "--data-dir PATH needs no hub."


def read(dataset: DataSet) -> tuple[list[dict[str, Any]], str]:
    """The rows of a set, and where they come from: a folder of the id's name goes before the hub.

    Raises:
        DataError: with the remedy that its cause has.
    """
    rows: list[dict[str, Any]] = []
    if not dataset.hub:
        raise DataError(f"data set {dataset.name!r} is not on the hub", remedy=NO_HUB)
    try:
        for config in dataset.configs or (None,):
            rows += _table(dataset, config)
    except Exception as failure:  # of datasets, its readers, the hub's client and its HTTP library
        what, remedy = cause(failure, dataset)
        raise DataError(f"data set {dataset.hub!r} {what}", remedy=remedy) from failure
    if Path(dataset.hub).is_dir():
        return rows, f"folder:{Path(dataset.hub).resolve().name}"
    return rows, f"hub:{dataset.hub}@{dataset.revision or 'main'}"


def _table(dataset: DataSet, config: str | None) -> Any:
    import datasets

    # The hub's conversion has a folder for each config, and no file that names them.
    part = {"data_dir": config} if dataset.revision == CONVERTED else {"name": config}
    where = {"revision": dataset.revision, **part}
    if dataset.prepare != "quarter":
        return datasets.load_dataset(dataset.hub, split=dataset.split, **where)
    parts = datasets.load_dataset(dataset.hub, **where)
    joined = datasets.concatenate_datasets(list(parts.values()))
    return joined.train_test_split(test_size=0.25, seed=42)["test"]


def _chain(failure: BaseException | None) -> Iterator[BaseException]:
    while failure is not None:
        yield failure
        failure = failure.__cause__ or failure.__context__


def cause(failure: Exception, dataset: DataSet) -> tuple[str, str]:
    """What is wrong with a set that does not load, and what helps, by the kinds of exceptions."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    said = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]
    kinds = tuple(_chain(failure))

    def among(*types: type[BaseException]) -> bool:
        return any(isinstance(one, types) for one in kinds)

    if isinstance(failure, RuntimeError) and "scripts are no longer supported" in said:
        other = f"{dataset.hub}@{CONVERTED}"
        named = f"Name a revision with Parquet files, where there is one: data.train = {other}. "
        offered = dataset.split == "train" and dataset.revision != CONVERTED
        return "has a loading script, which datasets no longer runs", named * offered + NO_HUB
    # `datasets` raises one kind for all three, and drops the hub's own.
    if among(GatedRepoError) or (isinstance(failure, DatasetNotFoundError) and " gated " in said):
        return "is gated", (
            f"Ask for access on https://huggingface.co/datasets/{dataset.hub}, then log in with "
            "`hf auth login`."
        )
    if among(RevisionNotFoundError) or said.startswith("Revision "):
        return f"has no revision {dataset.revision!r}", f"Name another behind @. {NO_HUB}"
    by_http = any(type(one).__module__.startswith("http") for one in kinds)  # httpx, httpcore2 ...
    if by_http or among(ConnectionError, LocalEntryNotFoundError):
        offline = constants.HF_HUB_OFFLINE
        return f"cannot be reached ({'HF_HUB_OFFLINE is set' if offline else said})", (
            f"{'Unset HF_HUB_OFFLINE, or w' if offline else 'W'}ithout a network use --data-dir "
            "PATH, or --set data.source=embedded."
        )
    if among(DatasetNotFoundError, RepositoryNotFoundError):
        return "is not on the hub, or is private", (
            "Correct the name; for a private set log in with `hf auth login`."
        )
    if isinstance(failure, ValueError) and ("BuilderConfig" in said or "Config name" in said):
        whole = " ".join(str(failure).split())
        return f"has no config {', '.join(dataset.configs) or 'of its own'} ({whole[:300]})", NO_HUB
    if isinstance(failure, ValueError) and said.startswith("Unknown split"):
        return f"has other parts ({said})", NO_HUB
    if isinstance(failure, EmptyDatasetError | FileNotFoundError):
        return f"holds no data files ({said})", NO_HUB
    if among(HfHubHTTPError):
        return f"was not given out by the hub ({said})", f"Try again later. {NO_HUB}"
    if isinstance(failure, DatasetsError):
        deepest = str(kinds[-1]).strip().splitlines() or [said]
        return f"has files that cannot be read ({deepest[0][:300]})", "Mend or replace its files."
    return f"does not load ({type(failure).__name__}: {said})", NO_HUB
